//! Lines as kernels write them.

use super::*;

const HEAD: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n";

fn detail_of(lines: &str) -> FdDetail {
    parse(format!("{HEAD}{lines}").as_bytes()).unwrap().detail
}

#[test]
fn common_fields_and_locks() {
    let text = "pos:\t-4096\nflags:\t02100001\nmnt_id:\t27\nino:\t10010660\n\
        lock:\t1: FLOCK  ADVISORY  WRITE 5626 fe:00:10010660 0 EOF\n\
        lock:\t2: POSIX  ADVISORY  READ  5626 00:2a:10010660 5 14\n\
        lock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:10010660 9 18446744073709551615\n";
    let info = parse(text.as_bytes()).unwrap();
    assert_eq!(info.pos, -4096i64 as u64);
    assert_eq!((info.flags, info.cloexec), (0o100001, true));
    assert_eq!((info.mnt_id, info.ino), (27, 10_010_660));
    assert_eq!(info.detail, FdDetail::Plain);
    let [flock, posix, ofd] = info.locks.as_slice() else {
        panic!("{:?}", info.locks)
    };
    assert_eq!(
        (flock.kind.as_str(), flock.access.as_str(), flock.end),
        ("FLOCK", "WRITE", None)
    );
    assert_eq!(
        (flock.mode.as_str(), flock.dev, flock.ino),
        ("ADVISORY", (254, 0), 10_010_660)
    );
    assert_eq!((posix.dev, posix.start, posix.end), ((0, 42), 5, Some(14)));
    assert_eq!(
        (ofd.kind.as_str(), ofd.pid, ofd.end),
        ("OFDLCK", -1, Some(u64::MAX))
    );
}

#[test]
fn counters_signals_and_timers() {
    assert_eq!(
        detail_of("eventfd-count:               2a\neventfd-id: 1\neventfd-semaphore: 1\n"),
        FdDetail::EventFd {
            count: 42,
            semaphore: Some(true)
        }
    );
    assert_eq!(
        detail_of("eventfd-count: ffffffffffffffff\n"),
        FdDetail::EventFd {
            count: u64::MAX,
            semaphore: None
        }
    );
    let mask = FdDetail::SignalFd { mask: 0x200 };
    assert_eq!(detail_of("sigmask:\t0000000000000200\n"), mask);
    let timer = "clockid: 7\nticks: 3\nsettime flags: 03\nit_value: (99, 997717465)\n\
        it_interval: (3, 5)\n";
    let expected = TimerFd {
        clockid: 7,
        ticks: 3,
        settime_flags: 3,
        value: (99, 997_717_465),
        interval: (3, 5),
    };
    assert_eq!(detail_of(timer), FdDetail::TimerFd(expected));
    let pidfd = FdDetail::PidFd {
        pid: Pid(-1),
        nspid: vec![],
    };
    assert_eq!(detail_of("Pid:\t-1\nNSpid:\t\n"), pidfd);
    let nested = FdDetail::PidFd {
        pid: Pid(7),
        nspid: vec![7, 1],
    };
    assert_eq!(detail_of("Pid:\t7\nNSpid:\t7\t1\n"), nested);
}

#[test]
fn sets_of_watched_things() {
    let text = "tfd:        3 events:       19 data:     deadbeef0003  pos:0 ino:40e sdev:10\n\
        tfd:      200 events: c000001d data: ffffffffffffffff  pos:-1 ino:3c4a7 sdev:fe00003\n";
    let FdDetail::Epoll { targets } = detail_of(text) else {
        panic!("no epoll")
    };
    let first = EpollTarget {
        tfd: 3,
        events: 0x19,
        data: 0xdead_beef_0003,
        pos: 0,
        ino: 0x40e,
        sdev: (0, 16),
    };
    assert_eq!(targets[0], first);
    assert_eq!(
        (targets[1].tfd, targets[1].events, targets[1].sdev),
        (200, 0xc000_001d, (254, 3))
    );
    assert_eq!((targets[1].data, targets[1].pos), (u64::MAX, u64::MAX));
    let text = "inotify wd:1f ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 \
        fhandle-type:81 f_handle:a7c40300000000ff\n\
        inotify wd:2 ino:1 sdev:0 mask:fff ignored_mask:0 \n";
    let FdDetail::Inotify { watches } = detail_of(text) else {
        panic!("no inotify")
    };
    let first = InotifyWatch {
        wd: 0x1f,
        ino: 0x3c4a7,
        sdev: (254, 0),
        mask: 0x100,
        ignored_mask: 0,
        handle_bytes: 8,
        handle_type: 0x81,
        handle: vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0xff],
    };
    assert_eq!(watches[0], first);
    assert_eq!((watches[1].wd, watches[1].handle.len()), (2, 0));
}

#[test]
fn kinds_that_stay_text() {
    let ring = "SqMask:\t0x7\nSqHead:\t0\nPollList:\n  op=6, task_works=0\nNAPI:\tdisabled\n";
    let FdDetail::IoUring(text) = detail_of(ring) else {
        panic!("no io_uring")
    };
    assert!(text.starts_with("SqMask:") && text.ends_with("NAPI:\tdisabled"));
    // Fields of a kind must not be taken for the common ones.
    let other = detail_of("pending:\t0\nflags:\t07\npos:\t9\n");
    assert_eq!(
        other,
        FdDetail::Other("pending:\t0\nflags:\t07\npos:\t9".into())
    );
}

#[test]
fn odd_text_is_an_error_that_names_the_line() {
    let odd = [
        "flags:\t9",
        "pos:\tfar",
        "lock:\t1: FLOCK  ADVISORY  WRITE 5626 <none>:0 0 EOF",
        "eventfd-count: x",
        "tfd: 1 events: zz",
        "inotify wd:1 f_handle:a7c4é",
    ];
    for line in odd {
        assert_eq!(parse(line.as_bytes()).unwrap_err(), line.as_bytes());
    }
}

#[test]
fn marks_of_fanotify() {
    let text = "fanotify flags:202 event-flags:8000\n\
        fanotify ino:3c4a7 sdev:fe00000 mflags:40 mask:2 ignored_mask:8 fhandle-bytes:8 fhandle-type:1 \
        f_handle:a7c4030000000000\n\
        fanotify mnt_id:1b mflags:0 mask:8 ignored_mask:0\n\
        fanotify sdev:fe00000 mflags:0 mask:20 ignored_mask:0\n";
    let FdDetail::Fanotify(group) = detail_of(text) else {
        panic!("no group")
    };
    assert_eq!((group.flags, group.event_flags), (0x202, 0x8000));
    let [file, mount, system] = group.marks.as_slice() else {
        panic!("{:?}", group.marks)
    };
    let MarkOn::File(of) = &file.on else {
        panic!("{file:?}")
    };
    assert_eq!((of.ino, of.sdev, of.handle.len()), (0x3c4a7, (254, 0), 8));
    assert_eq!((file.flags, file.mask, file.ignored), (0x40, 2, 8));
    assert_eq!((&mount.on, mount.mask), (&MarkOn::Mount(27), 8));
    assert_eq!(system.on, MarkOn::FileSystem((254, 0)));
}
