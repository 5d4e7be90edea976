//! Which kernel objects two tasks share: kcmp(2).

#![allow(unsafe_code)]

use std::cmp::Ordering;
use std::mem::{offset_of, size_of};
use std::os::fd::RawFd;

use ckpt_sys::helper::{Child, pause_forever};
use nix::errno::Errno;

use crate::{Error, Result, Tid};

/// What is compared. The numbers are `KCMP_*` of `linux/kcmp.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KcmpType {
    /// The open file descriptions behind a descriptor of the first and of the second task.
    File(i32, i32),
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Root directory, working directory and umask.
    Fs,
    /// Signal actions.
    Sighand,
    /// I/O contexts.
    Io,
    /// System V semaphore undo lists.
    Sysvsem,
    /// The open file description behind a descriptor of the first task, and the one that the second
    /// task's epoll set watches.
    EpollTfd {
        /// Descriptor of the first task.
        fd: i32,
        /// The second task's epoll descriptor.
        efd: i32,
        /// The number that the watched description had when it was added.
        tfd: u32,
        /// Index among the entries of that number: 0 is the first.
        toff: u32,
    },
}

/// `struct kcmp_epoll_slot` of `linux/kcmp.h`.
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

const _: () = assert!(size_of::<EpollSlot>() == 12);
const _: () = assert!(offset_of!(EpollSlot, toff) == 8);

/// Compares an object of two tasks. `Equal` means the same object; otherwise the order is arbitrary but consistent
/// for all callers until the next boot, so objects can be sorted.
///
/// # Errors
/// [`Error::Died`] when a task is gone; [`Error::Kernel`] with `EBADF` when a descriptor is not
/// open, `EPERM` without the right to ptrace both, `ENOSYS` when the kernel lacks the call, `ENOENT`
/// when the epoll set has no such entry.
pub fn kcmp(first: Tid, second: Tid, what: KcmpType) -> Result<Ordering> {
    let errno = match compare(first, second, what) {
        Ok(ordering) => return Ok(ordering),
        Err(errno) => errno,
    };
    if errno == Errno::ESRCH {
        // The kernel does not report which of the two.
        let tid = if exists(first) { second } else { first };
        return Err(Error::Died { tid });
    }
    let object = format!("{} of tasks {first} and {second}", what.describe());
    Err(Error::Kernel {
        call: "kcmp",
        object,
        errno,
    })
}

fn compare(first: Tid, second: Tid, what: KcmpType) -> Result<Ordering, Errno> {
    let slot;
    let (kind, index1, index2) = match what {
        KcmpType::File(fd1, fd2) => (0, fd1 as u64, fd2 as u64),
        KcmpType::Vm => (1, 0, 0),
        KcmpType::Files => (2, 0, 0),
        KcmpType::Fs => (3, 0, 0),
        KcmpType::Sighand => (4, 0, 0),
        KcmpType::Io => (5, 0, 0),
        KcmpType::Sysvsem => (6, 0, 0),
        KcmpType::EpollTfd { fd, efd, tfd, toff } => {
            slot = EpollSlot {
                efd: efd as u32,
                tfd,
                toff,
            };
            (7, fd as u64, &raw const slot as u64)
        }
    };
    // SAFETY: kcmp reads memory of ours only for KCMP_EPOLL_TFD, where the last argument points at
    // `slot`, which lives until the end of this function.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            first.raw(),
            second.raw(),
            kind,
            index1,
            index2,
        )
    };
    match answer {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3 means "different, not orderable"; the kernel never returns it.
        3 => Err(Errno::EINVAL),
        _ => Err(Errno::last()),
    }
}

fn exists(tid: Tid) -> bool {
    // SAFETY: signal 0 is not delivered; the call only looks the task up.
    unsafe { libc::kill(tid.raw(), 0) == 0 || Errno::last() != Errno::ESRCH }
}

impl KcmpType {
    fn describe(self) -> String {
        match self {
            Self::File(fd1, fd2) => format!("descriptors {fd1} and {fd2}"),
            Self::Vm => "address spaces".into(),
            Self::Files => "descriptor tables".into(),
            Self::Fs => "working directories".into(),
            Self::Sighand => "signal actions".into(),
            Self::Io => "I/O contexts".into(),
            Self::Sysvsem => "semaphore undo lists".into(),
            Self::EpollTfd { fd, efd, tfd, .. } => {
                format!("descriptor {fd} and entry {tfd} of epoll descriptor {efd}")
            }
        }
    }
}

/// Which of kcmp(2) and pidfd_getfd(2) is not available to us at all: because of a seccomp filter (docker's default
/// profile) or the kernel's configuration. Tried on ourselves, which needs no permission.
pub fn withheld() -> Option<&'static str> {
    let me = std::process::id() as i32;
    // SAFETY: calls without pointers; a descriptor that is closed once. -1 is no descriptor, which is
    // found out after permission was checked.
    let getfd = unsafe {
        let own = libc::syscall(libc::SYS_pidfd_open, me, 0) as i32;
        libc::syscall(libc::SYS_pidfd_getfd, own, -1, 0);
        let errno = Errno::last();
        libc::close(own);
        errno
    };
    if getfd != Errno::EBADF {
        return Some("pidfd_getfd(2)");
    }
    compare(Tid(me), Tid(me), KcmpType::Vm)
        .is_err()
        .then_some("kcmp(2)")
}

/// Whether two descriptors of ours share an open file description, without kcmp(2); `None` if unknown.
pub fn same_description(first: RawFd, second: RawFd) -> Option<bool> {
    /// Linux 6.10.
    const F_DUPFD_QUERY: i32 = 1024 + 3;
    // SAFETY: a call without pointers.
    match unsafe { libc::fcntl(first, F_DUPFD_QUERY, second) } {
        0 => Some(false),
        1 => Some(true),
        _ => same_by_epoll(first, second),
    }
}

/// An epoll set distinguishes entries by number and description (`ep_find`, fs/eventpoll.c): adding the same number
/// again gives EEXIST only for the same description. Files that cannot be polled, regular files above all, give no
/// answer.
fn same_by_epoll(first: RawFd, second: RawFd) -> Option<bool> {
    // SAFETY: calls on descriptors of ours; the number that comes and goes is that of a copy of ours,
    // and all are closed once. The set goes with its entries.
    unsafe {
        let set = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let number = libc::fcntl(first, libc::F_DUPFD_CLOEXEC, 0);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        let mut add = || libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, number, &raw mut event);
        let mut same = None;
        if number >= 0 && add() == 0 && libc::dup3(second, number, libc::O_CLOEXEC) == number {
            same = match add() {
                0 => Some(false),
                _ if Errno::last() == Errno::EEXIST => Some(true),
                _ => None,
            };
        }
        libc::close(number);
        libc::close(set);
        same
    }
}

/// Sorts candidates into groups of equal identity by the given total order, in N log N comparisons. Groups and their
/// members keep the input order.
///
/// # Errors
/// The first error of a comparison.
fn group_by<T, E>(
    candidates: Vec<T>,
    mut compare: impl FnMut(&T, &T) -> Result<Ordering, E>,
) -> Result<Vec<Vec<T>>, E> {
    // Binary insertion: `sort_by` cannot stop at an error, and must not see an inconsistent order (a descriptor
    // closed meanwhile).
    let mut groups: Vec<Vec<(usize, T)>> = Vec::new();
    for (place, candidate) in candidates.into_iter().enumerate() {
        let (mut low, mut high) = (0, groups.len());
        let mut same = None;
        while low < high && same.is_none() {
            let middle = low + (high - low) / 2;
            let Some((_, representative)) = groups[middle].first() else {
                break;
            };
            match compare(&candidate, representative)? {
                Ordering::Equal => same = Some(middle),
                Ordering::Less => high = middle,
                Ordering::Greater => low = middle + 1,
            }
        }
        match same {
            Some(group) => groups[group].push((place, candidate)),
            None => groups.insert(low, vec![(place, candidate)]),
        }
    }
    groups.sort_by_key(|group| group.first().map(|(place, _)| *place));
    Ok(groups
        .into_iter()
        .map(|group| group.into_iter().map(|(_, item)| item).collect())
        .collect())
}

/// Groups tasks by something they may share: [`KcmpType::Vm`], `Files`, `Fs`, `Sighand`, `Io` or `Sysvsem`.
///
/// # Errors
/// As [`kcmp`].
pub fn group_tasks(tasks: Vec<Tid>, what: KcmpType) -> Result<Vec<Vec<Tid>>> {
    group_by(tasks, |&tid1, &tid2| kcmp(tid1, tid2, what))
}

/// Whether a task has a System V semaphore undo list. Two tasks without one are equal to [`kcmp`] although they share
/// nothing. So the task is compared with a newly forked process, which has none (`copy_semundo`, ipc/sem.c).
///
/// # Errors
/// As [`kcmp`]; [`Error::Kernel`] when no process can be created.
pub fn has_undo_list(task: Tid) -> Result<bool> {
    let blank = Child::start(pause_forever).ok_or_else(|| Error::Kernel {
        call: "fork",
        object: "a process to compare with".into(),
        errno: Errno::last(),
    })?;
    Ok(kcmp(Tid(blank.pid()), task, KcmpType::Sysvsem)?.is_ne())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn own() -> Tid {
        crate::Pid::own().leader()
    }

    /// Reports a skip where the kernel has no kcmp (CONFIG_KCMP).
    fn available() -> bool {
        let works = kcmp(own(), own(), KcmpType::Vm).is_ok();
        if !works {
            eprintln!("skipped: this kernel or sandbox has no kcmp");
        }
        works
    }

    #[test]
    fn a_duplicate_is_the_same_file_and_a_second_opening_is_not() {
        if !available() {
            return;
        }
        let first = File::open("/dev/null").unwrap();
        let duplicate = first.try_clone().unwrap();
        let second = File::open("/dev/null").unwrap();
        let fds = [&first, &second, &duplicate].map(|file| (own(), file.as_raw_fd()));
        let same = |&(tid1, fd1): &(Tid, i32), &(tid2, fd2): &(Tid, i32)| {
            kcmp(tid1, tid2, KcmpType::File(fd1, fd2))
        };
        let groups = group_by(fds.to_vec(), same).unwrap();
        assert_eq!(groups, [vec![fds[0], fds[2]], vec![fds[1]]]);
    }

    #[test]
    fn descriptors_of_ours_are_told_apart_without_it() {
        let (reader, writer) = std::io::pipe().unwrap();
        let again = reader.try_clone().unwrap();
        let file = File::open("/etc/passwd").unwrap();
        let number = |fd: &dyn AsRawFd| fd.as_raw_fd();
        for same in [same_description, same_by_epoll] {
            assert_eq!(same(number(&reader), number(&again)), Some(true));
            assert_eq!(same(number(&reader), number(&writer)), Some(false));
        }
        let copy = file.try_clone().unwrap();
        assert_eq!(same_by_epoll(number(&file), number(&copy)), None);
        let newer = same_description(number(&file), number(&copy));
        assert!(matches!(newer, None | Some(true)));
        assert_eq!(withheld().is_none(), available());
    }

    #[test]
    fn a_list_of_adjustments_is_there_or_not() {
        if !available() {
            return;
        }
        // clone(2) with CLONE_SYSVSEM allocates one for the creating thread and shares it with the new one.
        std::thread::spawn(|| assert!(has_undo_list(own()).unwrap()))
            .join()
            .unwrap();
        let blank = Child::start(pause_forever).unwrap();
        assert!(!has_undo_list(Tid(blank.pid())).unwrap());
    }

    #[test]
    fn errors_are_told_apart() {
        if !available() {
            return;
        }
        let no_task = Tid(0x7fff_fff0);
        assert!(matches!(
            kcmp(own(), no_task, KcmpType::Vm),
            Err(Error::Died {
                tid: Tid(0x7fff_fff0)
            })
        ));
        assert!(matches!(
            kcmp(own(), own(), KcmpType::File(0, 1 << 20)),
            Err(Error::Kernel {
                errno: Errno::EBADF,
                ..
            })
        ));
    }

    #[test]
    fn grouping_keeps_the_order_of_arrival_and_stops_at_an_error() {
        let groups = group_by(vec![5, 1, 5, 9, 1], |a, b| Ok::<_, ()>(a.cmp(b))).unwrap();
        assert_eq!(groups, [vec![5, 5], vec![1, 1], vec![9]]);
        assert_eq!(
            group_by(vec![1, 2], |_, _| Err::<Ordering, _>("no")),
            Err("no")
        );
        assert_eq!(
            group_by(Vec::<u8>::new(), |_, _| Err::<Ordering, _>("no")),
            Ok(vec![])
        );
    }
}
