use super::*;

/// Bytes at an address.
struct Bytes(u64, Vec<u8>);

impl TargetMemory for Bytes {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        let at = address
            .checked_sub(self.0)
            .and_then(|at| self.1.get(at as usize..));
        let got = at.map_or(0, |bytes| bytes.len().min(into.len()));
        into[..got].copy_from_slice(&at.unwrap_or_default()[..got]);
        got
    }
}

fn text(call: libc::c_long, arguments: [u64; 6], memory: &[u8]) -> String {
    let memory = Bytes(0x1000, memory.into());
    let fd = |fd| (fd == 3).then(|| "/etc/passwd".to_owned());
    describe(
        &Context {
            memory: &memory,
            fd: &fd,
        },
        call as u64,
        arguments,
    )
}

#[test]
fn descriptors_show_what_they_are() {
    let read = text(libc::SYS_read, [3, 0x7ffe_1000, 4096, 9, 9, 9], &[]);
    assert_eq!(read, "read(3</etc/passwd>, 0x7ffe1000, 4096)");
    assert_eq!(
        text(libc::SYS_close, [(-1i64) as u64, 0, 0, 0, 0, 0], &[]),
        "close(-1)"
    );
}

#[test]
fn times_and_texts_come_from_memory() {
    let mut time = 5i64.to_le_bytes().to_vec();
    time.extend(20_000_000i64.to_le_bytes());
    let sleep = text(libc::SYS_clock_nanosleep, [1, 0, 0x1000, 0, 0, 0], &time);
    assert_eq!(
        sleep,
        "clock_nanosleep(CLOCK_MONOTONIC, 0, {5.020000000 s}, NULL)"
    );
    let at = libc::AT_FDCWD as u32 as u64;
    let open = text(
        libc::SYS_openat,
        [at, 0x1000, 0x80000, 0, 0, 0],
        b"/tmp/a\nb\0",
    );
    assert_eq!(
        open,
        "openat(AT_FDCWD, \"/tmp/a\\nb\", O_RDONLY|O_CLOEXEC, 0o0)"
    );
    let unreadable = text(libc::SYS_chdir, [0x9000, 0, 0, 0, 0, 0], b"");
    assert_eq!(unreadable, "chdir(0x9000)");
}

#[test]
fn poll_shows_its_descriptors() {
    let fds = [3, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0];
    let poll = text(libc::SYS_poll, [0x1000, 2, u64::MAX, 0, 0, 0], &fds);
    assert_eq!(
        poll,
        "poll([{3</etc/passwd>, POLLIN}, {4, POLLOUT}], 2, -1)"
    );
    let bad = text(libc::SYS_poll, [0x1000, u64::MAX, 0, 0, 0, 0], &fds);
    assert_eq!(bad, "poll(0x1000, -1, 0)");
}

#[test]
fn a_futex_waits_or_wakes() {
    let wait = text(libc::SYS_futex, [0x2000, 0x189, 2, 0, 0, 0xffff_ffff], &[]);
    let expected = "futex(0x2000, FUTEX_WAIT_BITSET|FUTEX_PRIVATE_FLAG|FUTEX_CLOCK_REALTIME, 2, \
                    NULL, NULL, 0xffffffff)";
    assert_eq!(wait, expected);
    let requeue = text(libc::SYS_futex, [0x2000, 3, 1, 7, 0x3000, 0], &[]);
    assert_eq!(requeue, "futex(0x2000, FUTEX_REQUEUE, 1, 7, 0x3000, 0)");
}

#[test]
fn signal_sets_show_the_shorter_side() {
    assert_eq!(set(0), "[]");
    assert_eq!(set(1 << 1 | 1 << 14), "[SIGINT SIGTERM]");
    assert_eq!(set(!(1 << 8)), "~[SIGKILL]");
    assert_eq!(set(u64::MAX), "~[]");
}

#[test]
fn unknown_calls_show_numbers() {
    assert_eq!(
        text(9999, [1, 2, 3, 4, 5, 6], &[]),
        "system call 9999(0x1, 0x2, 0x3, 0x4, 0x5, 0x6)"
    );
    assert!(text(libc::SYS_reboot, [1, 2, 3, 4, 5, 6], &[]).starts_with("reboot(0x1, "));
}

#[test]
fn every_described_call_exists() {
    for (described, _) in CALLS {
        let known = (0..500).any(|number| name(number) == Some(described));
        assert!(known, "{described}");
    }
}
