//! The readers of `/proc` on a process with odd names and one of each kind of descriptor: ourselves.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ckpt_tracer::proc::fdinfo::{FdDetail, FdLink, list_fds, read_fd_link, read_fdinfo};
use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName, read_maps, read_smaps};
use ckpt_tracer::proc::mounts::read_mounts;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::proc::status::read_task;
use ckpt_tracer::proc::tasks;
use ckpt_tracer::proc::timers::{Notify, read_timers};
use ckpt_tracer::{Pid, Tid};

fn own() -> Pid {
    Pid(std::process::id() as i32)
}

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ckpt {name} {}", own()));
        fs::create_dir_all(&path).unwrap();
        Self(fs::canonicalize(path).unwrap())
    }

    fn file(&self, name: &str) -> (PathBuf, File) {
        let path = self.0.join(name);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let mut file = options.open(&path).unwrap();
        file.write_all(&[7; 4096]).unwrap();
        (path, file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Maps a page of a file, or an anonymous one, and leaves it mapped.
fn map(file: Option<&File>) -> u64 {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let (kind, fd) = file.map_or((private, -1), |file| (libc::MAP_SHARED, file.as_raw_fd()));
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, kind, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

fn name_at(address: u64) -> VmaName {
    let vmas = read_maps(own()).unwrap();
    vmas.into_iter()
        .find(|vma| vma.start == address)
        .unwrap()
        .name
}

#[test]
fn mapped_and_open_files_with_odd_names() {
    let scratch = Scratch::new("names");
    let file = |path: &Path, deleted| VmaName::File {
        path: path.to_owned(),
        deleted,
    };
    let link = |path: &Path, deleted| FdLink::File {
        path: path.to_owned(),
        deleted,
    };
    for name in [
        "a b  c",
        "new\nline",
        "x (deleted)",
        r"back\012slash",
        "[heap]",
        "é\u{1b}",
    ] {
        let (path, open) = scratch.file(name);
        let at = map(Some(&open));
        let open_link = || read_fd_link(own(), open.as_raw_fd()).unwrap();
        assert_eq!(name_at(at), file(&path, false), "{name:?}");
        assert_eq!(open_link(), link(&path, false), "{name:?}");
        fs::remove_file(&path).unwrap();
        // Another file of the name that the kernel prints now is not the one that is open.
        for other in [None, Some(scratch.file(&format!("{name} (deleted)")))] {
            assert_eq!(open_link(), link(&path, true), "{name:?} {other:?}");
            // The kernel's text for a deleted file with that name is that of one with a newline.
            if name != r"back\012slash" {
                assert_eq!(name_at(at), file(&path, true), "{name:?} {other:?}");
            }
        }
    }
}

#[test]
fn maps_and_smaps_agree_and_flags_are_known() {
    let at = map(None);
    let vmas = read_smaps(own()).unwrap();
    let unknown: Vec<_> = vmas.iter().flat_map(|vma| &vma.unknown_flags).collect();
    assert!(unknown.is_empty(), "flags without a name: {unknown:?}");
    for vma in vmas.iter().filter(|vma| vma.name != VmaName::Vsyscall) {
        assert_eq!(vma.read, vma.flags.contains(VmFlags::READ), "{vma:x?}");
        assert_eq!(vma.write, vma.flags.contains(VmFlags::WRITE), "{vma:x?}");
        assert!(
            !vma.flags.is_empty() && vma.kernel_page_size == 4096,
            "{vma:x?}"
        );
        assert!(vma.rss <= vma.len() && vma.pss <= vma.rss, "{vma:x?}");
    }
    // Other tests map at the same time: look at the mappings that stay.
    let plain = read_maps(own()).unwrap();
    let range = |vmas: &[Vma], name: &VmaName| {
        vmas.iter()
            .find(|vma| vma.name == *name)
            .map(|vma| (vma.start, vma.end))
    };
    for name in [VmaName::Stack, VmaName::Vdso, VmaName::Vvar] {
        assert!(range(&plain, &name).is_some(), "{name:?}");
        assert_eq!(range(&plain, &name), range(&vmas, &name), "{name:?}");
    }
    assert!(plain.iter().any(|vma| (vma.start..vma.end).contains(&at)));
    let mounts = read_mounts(own()).unwrap();
    assert!(
        mounts
            .all()
            .iter()
            .any(|mount| mount.mount_point == Path::new("/"))
    );
}

/// Takes what a call returned as a descriptor of ours.
fn descriptor(fd: libc::c_int) -> OwnedFd {
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call before made the descriptor and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn link(fd: &impl AsRawFd) -> FdLink {
    read_fd_link(own(), fd.as_raw_fd()).unwrap()
}

fn detail(fd: &OwnedFd) -> FdDetail {
    read_fdinfo(own(), fd.as_raw_fd()).unwrap().detail
}

fn anon(name: &str) -> FdLink {
    FdLink::AnonInode(name.into())
}

#[test]
fn counters_signals_and_timers() {
    // SAFETY: the calls get plain numbers, and a set and a struct that live on.
    unsafe {
        let event = descriptor(libc::eventfd(42, libc::EFD_SEMAPHORE | libc::EFD_CLOEXEC));
        assert_eq!(link(&event), anon("eventfd"));
        assert!(matches!(
            detail(&event),
            FdDetail::EventFd { count: 42, .. }
        ));
        let info = read_fdinfo(own(), event.as_raw_fd()).unwrap();
        assert!(info.cloexec && info.flags == libc::O_RDWR as u32);

        let mut set = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        let signal = descriptor(libc::signalfd(-1, &raw const set, 0));
        assert_eq!(link(&signal), anon("signalfd"));
        assert_eq!(
            detail(&signal),
            FdDetail::SignalFd {
                mask: 1 << (libc::SIGUSR1 - 1)
            }
        );

        let timer = descriptor(libc::timerfd_create(libc::CLOCK_MONOTONIC, 0));
        let time = |seconds| libc::timespec {
            tv_sec: seconds,
            tv_nsec: 5,
        };
        let spec = libc::itimerspec {
            it_interval: time(3),
            it_value: time(1000),
        };
        let none = std::ptr::null_mut();
        assert_eq!(
            libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const spec, none),
            0
        );
        let FdDetail::TimerFd(read) = detail(&timer) else {
            panic!("{:?}", detail(&timer))
        };
        assert_eq!((read.clockid, read.ticks), (libc::CLOCK_MONOTONIC, 0));
        assert_eq!(read.interval, (3, 5));
        assert!((900..=1000).contains(&read.value.0));
    }
}

#[test]
fn sets_of_watched_things() {
    // SAFETY: the calls get plain numbers, a string that ends in 0, and a struct that lives on.
    unsafe {
        let event = descriptor(libc::eventfd(0, 0));
        let epoll = descriptor(libc::epoll_create1(0));
        assert_eq!(
            (link(&epoll), detail(&epoll)),
            (anon("eventpoll"), FdDetail::Plain)
        );
        let mut wanted = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: u64::MAX - 1,
        };
        let (set, watched) = (epoll.as_raw_fd(), event.as_raw_fd());
        assert_eq!(
            libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, watched, &raw mut wanted),
            0
        );
        let FdDetail::Epoll { targets } = detail(&epoll) else {
            panic!("{:?}", detail(&epoll))
        };
        assert_eq!(
            (targets.len(), targets[0].tfd, targets[0].data),
            (1, watched, u64::MAX - 1)
        );

        let scratch = Scratch::new("watched");
        let inotify = descriptor(libc::inotify_init1(0));
        let path = std::ffi::CString::new(scratch.0.to_str().unwrap()).unwrap();
        let wd = libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_CREATE);
        let FdDetail::Inotify { watches } = detail(&inotify) else {
            panic!("{:?}", detail(&inotify))
        };
        assert_eq!(link(&inotify), anon("inotify"));
        assert_eq!((watches[0].wd, watches[0].mask), (wd, libc::IN_CREATE));
        assert_eq!(watches[0].ino, fs::metadata(&scratch.0).unwrap().ino());
        assert_eq!(watches[0].handle.len(), watches[0].handle_bytes as usize);
    }
}

#[test]
fn memory_processes_pipes_sockets_and_namespaces() {
    // SAFETY: the calls get plain numbers and a string that ends in 0.
    let (memfd, pidfd) = unsafe {
        let memfd = descriptor(libc::memfd_create(c"x (deleted)\n".as_ptr(), 0));
        (
            memfd,
            descriptor(libc::syscall(libc::SYS_pidfd_open, own().raw(), 0) as i32),
        )
    };
    assert_eq!(link(&memfd), FdLink::Memfd(b"x (deleted)\n".to_vec()));
    assert_eq!(link(&pidfd), FdLink::PidFd);
    assert!(matches!(detail(&pidfd), FdDetail::PidFd { pid, .. } if pid == own()));
    let mut ends = [-1; 2];
    // SAFETY: the array has room for two descriptors.
    let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(made, 0);
    let [reader, writer] = ends.map(descriptor);
    assert!(matches!(link(&reader), FdLink::Pipe(inode) if inode != 0));
    assert_eq!(link(&reader), link(&writer));
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(matches!(link(&socket), FdLink::Socket(inode) if inode != 0));
    let namespace = File::open("/proc/self/ns/mnt").unwrap();
    let inode = namespace.metadata().unwrap().ino();
    assert_eq!(link(&namespace), FdLink::Namespace("mnt".into(), inode));
    let all = list_fds(own()).unwrap();
    assert!(all.is_sorted() && all.contains(&memfd.as_raw_fd()));
}

#[test]
fn locks_of_a_file() {
    let scratch = Scratch::new("locks");
    let (_, file) = scratch.file("locked");
    // SAFETY: plain numbers, and a struct that lives on.
    unsafe {
        assert_eq!(libc::flock(file.as_raw_fd(), libc::LOCK_EX), 0);
        let mut range: libc::flock = std::mem::zeroed();
        (range.l_type, range.l_start, range.l_len) = (libc::F_WRLCK as i16, 5, 10);
        assert_eq!(
            libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw mut range),
            0
        );
    }
    let locks = read_fdinfo(own(), file.as_raw_fd()).unwrap().locks;
    let inode = file.metadata().unwrap().ino();
    let mut seen: Vec<_> = locks
        .iter()
        .map(|lock| (lock.kind.as_str(), lock.ino, lock.start, lock.end))
        .collect();
    seen.sort_unstable();
    assert_eq!(
        seen,
        [("FLOCK", inode, 0, None), ("POSIX", inode, 5, Some(14))]
    );
}

#[test]
fn timers_with_their_notification() {
    let kinds = [libc::SIGEV_NONE, libc::SIGEV_SIGNAL, libc::SIGEV_THREAD_ID];
    // SAFETY: sigevent and the id live on while a call runs; the timers are deleted before it ends.
    let (ids, tid, timers) = unsafe {
        let tid = libc::gettid();
        let ids = kinds.map(|kind| {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = kind;
            event.sigev_signo = libc::SIGUSR2;
            event.sigev_value.sival_ptr = 0x1234 as *mut libc::c_void;
            event.sigev_notify_thread_id = tid;
            let (clock, mut id) = (libc::CLOCK_BOOTTIME, -1);
            let made = libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut id);
            assert_eq!(made, 0);
            id
        });
        let timers = read_timers(own()).unwrap();
        for id in ids {
            libc::syscall(libc::SYS_timer_delete, id);
        }
        (ids, tid, timers)
    };
    let expected = [Notify::None, Notify::Signal, Notify::Thread(Tid(tid))];
    for (id, notify) in ids.into_iter().zip(expected) {
        let timer = timers.iter().find(|timer| timer.id == id).unwrap();
        assert_eq!((timer.notify, timer.clock), (notify, libc::CLOCK_BOOTTIME));
        assert_eq!((timer.signal, timer.sigval), (libc::SIGUSR2, 0x1234));
    }
}

#[test]
fn the_name_of_a_thread_may_be_any_bytes() {
    let name = b"a) S 1\\\n(\xff\xfe";
    // SAFETY: the string ends in 0 and lives on.
    let tid = unsafe {
        let text = std::ffi::CString::new(name).unwrap();
        assert_eq!(libc::prctl(libc::PR_SET_NAME, text.as_ptr()), 0);
        Tid(libc::gettid())
    };
    assert_eq!(&*tasks::comm((own(), tid)).unwrap(), name);
    assert_eq!(&*read_stat((own(), tid)).unwrap().comm, name);
    let status = read_task(own(), tid).unwrap();
    assert_eq!(&*status.name, name);
    assert_eq!((status.tgid, status.tid), (own(), tid));
}
