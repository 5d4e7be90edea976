use super::*;

fn pty() -> (OwnedFd, OwnedFd) {
    let master = tty::new_pty(libc::O_NONBLOCK).unwrap();
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    let slave = tty::peer(&master, flags).unwrap();
    (master, slave)
}

fn read_now(fd: &OwnedFd) -> Option<Vec<u8>> {
    ckpt_sys::events::poll_now(fd, libc::POLLIN);
    let mut block = [0; 8192];
    read(fd, &mut block).ok().map(|n| block[..n].to_vec())
}

fn write_now(fd: &OwnedFd, other: &OwnedFd, bytes: &[u8]) {
    write_all(fd, other, bytes).unwrap();
    ckpt_sys::events::poll_now(other, libc::POLLIN);
}

#[test]
fn output_stays_and_is_put_into_another_one() {
    let (master, slave) = pty();
    write_now(&slave, &master, b"one\ntwo");
    let waiting = look(&master, Some(&slave), &[]).unwrap();
    assert_eq!(waiting.output, b"one\r\ntwo");
    assert_eq!(
        look(&master, Some(&slave), &[]).unwrap().output,
        b"one\r\ntwo"
    );
    assert_eq!(read_now(&master).unwrap(), b"one\r\ntwo");
    let (master, slave) = pty();
    let modes = tty::modes(&slave).unwrap();
    put(&master, &slave, modes, &waiting).unwrap();
    assert_eq!(tty::modes(&slave).unwrap(), modes);
    assert_eq!(read_now(&master).unwrap(), b"one\r\ntwo");
}

#[test]
fn a_full_pty_stays_full() {
    for (first, then) in [
        (1, 1),
        (4095, 8192),
        (4095, 256),
        (100, 1000),
        (1024, 511),
        (1792, 7),
    ] {
        let (master, slave) = pty();
        tty::set_modes(&slave, &tty::modes(&slave).unwrap().raw()).unwrap();
        let all: Vec<u8> = (0..30_000u32).map(|i| (i % 251) as u8).collect();
        let mut written = 0;
        let mut fill = |len: usize| {
            let chunk = &all[written..written + len];
            let n = nix::unistd::write(&slave, chunk).unwrap_or(0);
            ckpt_sys::events::poll_now(&master, libc::POLLIN);
            written += n;
            n > 0
        };
        fill(first);
        while fill(then) {}
        for _ in 0..3 {
            let waiting = look(&master, Some(&slave), &[]).unwrap();
            assert!(
                waiting.output == all[..written],
                "{first}, {then}: {written} bytes"
            );
        }
        let mut read = Vec::new();
        while let Some(block) = read_now(&master) {
            read.extend(block);
        }
        assert!(read == all[..written], "{first}, {then}: {written} bytes");
    }
}

#[test]
fn lines_stay_lines_and_a_begun_one_begun() {
    let (master, slave) = pty();
    write_now(&master, &slave, b"first\nsec\x04\x04begu");
    let echoed = read_now(&master);
    for _ in 0..2 {
        let waiting = look(&master, Some(&slave), &[]).unwrap();
        let pieces = waiting.input.iter().map(|i| (&i.bytes[..], i.ending));
        let expected: [(&[u8], Ending); 4] = [
            (b"first\n", Ending::Line),
            (b"sec", Ending::EndOfFile),
            (b"", Ending::EndOfFile),
            (b"begu", Ending::Open),
        ];
        assert_eq!(pieces.collect::<Vec<_>>(), expected);
        assert_eq!(
            waiting.output, b"",
            "nothing is echoed again; before: {echoed:?}"
        );
    }
    let waiting = look(&master, Some(&slave), &[]).unwrap();
    let (other, new) = pty();
    let modes = tty::modes(&slave).unwrap();
    put(&other, &new, modes, &waiting).unwrap();
    for (master, slave) in [(&master, &slave), (&other, &new)] {
        assert_eq!(read_now(slave).unwrap(), b"first\n");
        assert_eq!(read_now(slave).unwrap(), b"sec");
        assert_eq!(read_now(slave).unwrap(), b"");
        assert_eq!(read_now(slave), None);
        write_now(master, slave, b"n\n");
        assert_eq!(read_now(slave).unwrap(), b"begun\n");
    }
}

#[test]
fn bytes_in_raw_mode_are_not_looked_at() {
    let (master, slave) = pty();
    let modes = tty::modes(&slave).unwrap();
    tty::set_modes(&slave, &modes.raw()).unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    write_now(&master, &slave, &bytes);
    tty::set_modes(
        &slave,
        &Modes {
            local: modes.raw().local | libc::ISIG,
            ..modes
        },
    )
    .unwrap();
    let waiting = look(&master, Some(&slave), &[]).unwrap();
    assert_eq!(waiting.input[0].bytes, bytes);
    assert_eq!(read_now(&slave).unwrap(), bytes);
    assert_eq!(read_now(&master), None);
}

#[test]
fn much_raw_input_stays_and_is_put_into_another_one() {
    let (master, slave) = pty();
    let raw = tty::modes(&slave).unwrap().raw();
    tty::set_modes(&slave, &raw).unwrap();
    let all: Vec<u8> = (0..9_000u32).map(|i| (i % 251) as u8).collect();
    for piece in all.chunks(500) {
        write_now(&master, &slave, piece);
    }
    assert!(soon(ATTEMPTS, || tty::unread(&slave) == DISCIPLINE));
    for _ in 0..2 {
        let waiting = look(&master, Some(&slave), &[]).unwrap();
        assert!(waiting.input.iter().flat_map(|i| i.bytes.iter()).eq(&all));
    }
    let waiting = look(&master, Some(&slave), &[]).unwrap();
    let (other, new) = pty();
    put(&other, &new, raw, &waiting).unwrap();
    for slave in [&slave, &new] {
        let mut read = Vec::new();
        while let Some(block) = read_now(slave) {
            read.extend(block);
        }
        assert!(read == all, "{} bytes", read.len());
    }
}

#[test]
fn much_input_in_lines_is_left_alone() {
    let (master, slave) = pty();
    for _ in 0..40 {
        write_now(&master, &slave, &[[b'x'; 63].as_slice(), b"\n"].concat());
    }
    assert!(soon(ATTEMPTS, || tty::unread(&slave) == 40 * 64));
    assert_eq!(
        look(&master, Some(&slave), &[]).unwrap_err(),
        CopyError::Much
    );
}

/// Another thread of the kernel takes in what was put back. It may come late, and must find the modes for that.
#[test]
fn a_begun_line_is_not_echoed_again() {
    for _ in 0..50 {
        let (master, slave) = pty();
        write_now(&master, &slave, b"one\ntwo");
        while tty::unread(&master) < 8 {
            ckpt_sys::events::poll_now(&master, libc::POLLIN);
        }
        look(&master, Some(&slave), &[]).unwrap();
        nap(30);
        assert_eq!(read_now(&master).unwrap(), b"one\r\ntwo");
        assert!(takes_output(&slave));
    }
}

/// With a status that a reader in packet mode has not been told of, whatever bytes the line has.
#[test]
fn a_begun_line_in_packet_mode() {
    let any: Vec<u8> = (1..=255).filter(|c| *c != b'\n' && *c != 4).collect();
    for line in [b"two".to_vec(), any.repeat(6)] {
        let (master, slave) = pty();
        let mut modes = tty::modes(&slave).unwrap().raw();
        modes.local |= libc::ICANON;
        modes.chars = [0; 19];
        modes.chars[libc::VEOF] = 4;
        tty::set_modes(&slave, &modes).unwrap();
        tty::set_packet_mode(&master, true).unwrap();
        tty::flush(&slave, libc::TCIOFLUSH).unwrap();
        write_now(&slave, &master, b"output");
        write_now(&master, &slave, &[b"one\n", &line[..]].concat());
        let waiting = look(&master, Some(&slave), &[]).unwrap();
        let (other, new) = pty();
        put(&other, &new, modes, &waiting).unwrap();
        for (master, slave) in [(&master, &slave), (&other, &new)] {
            // What was flushed, and no change of flow.
            assert_eq!(read_now(master).unwrap(), [3]);
            assert_eq!(read_now(master).unwrap(), b"\0output");
            assert_eq!(read_now(master), None);
            assert_eq!(tty::modes(slave).unwrap(), modes);
            assert_eq!(read_now(slave).unwrap(), b"one\n");
            write_now(master, slave, b"\n");
            assert!(read_now(slave).unwrap() == [&line[..], b"\n"].concat());
        }
    }
}

/// tcflow(3) works on either side; nothing of what waits is lost.
#[test]
fn a_master_that_is_stopped() {
    let (master, slave) = pty();
    write_now(&master, &slave, b"one\ntwo");
    while tty::unread(&master) < 8 {
        ckpt_sys::events::poll_now(&master, libc::POLLIN);
    }
    let stop = |master: &OwnedFd| tty::flow(master, libc::TCOOFF).unwrap();
    stop(&master);
    for _ in 0..2 {
        look(&master, Some(&slave), &[]).unwrap();
    }
    let waiting = look(&master, Some(&slave), &[]).unwrap();
    let (other, new) = pty();
    put(&other, &new, tty::modes(&slave).unwrap(), &waiting).unwrap();
    for (master, slave) in [(&master, &slave), (&other, &new)] {
        assert_eq!(nix::unistd::write(master, b"x"), Err(Errno::EAGAIN));
        assert_eq!(read_now(slave).unwrap(), b"one\n");
        tty::flow(master, libc::TCOON).unwrap();
        write_now(master, slave, b"\n");
        assert_eq!(read_now(slave).unwrap(), b"two\n");
    }
    // Nothing waits, and it is stopped.
    let (master, slave) = pty();
    stop(&master);
    assert!(look(&master, Some(&slave), &[]).unwrap().master_stopped);
    assert!(!takes_output(&master));
}
