//! Flags and constants by name.

/// The names of the bits of `value`, unnamed bits as a number; `zero` if no bit is set.
pub(super) fn bits(value: u64, names: &[(u64, &str)], zero: &str) -> String {
    let mut left = value;
    let mut out: Vec<String> = Vec::new();
    for (bits, name) in names {
        if *bits != 0 && left & bits == *bits {
            out.push((*name).into());
            left &= !bits;
        }
    }
    if left != 0 {
        out.push(format!("{left:#x}"));
    }
    if out.is_empty() {
        zero.into()
    } else {
        out.join("|")
    }
}

/// The name of `value`, or its number.
pub(super) fn one(value: u64, names: &[(u64, &str)]) -> String {
    let name = names.iter().find(|(known, _)| *known == value);
    name.map_or_else(|| (value as i64).to_string(), |(_, name)| (*name).into())
}

/// A signal's name.
pub(super) fn signal(number: u64) -> String {
    let known = i32::try_from(number)
        .ok()
        .and_then(|n| nix::sys::signal::Signal::try_from(n).ok());
    match (known, number) {
        (Some(signal), _) => signal.as_str().into(),
        (None, 34..=64) => format!("SIGRTMIN+{}", number - 34),
        _ => (number as i64).to_string(),
    }
}

macro_rules! named {
    ($($(#[$doc:meta])* $table:ident: $($name:ident)*;)*) => { $(
        $(#[$doc])*
        pub(super) const $table: &[(u64, &str)] = &[$((libc::$name as u64, stringify!($name)),)*];
    )* };
}

named! {
    /// open(2), without the access mode. `O_SYNC` and `O_TMPFILE` include other flags.
    OPEN: O_TMPFILE O_SYNC O_DSYNC O_CREAT O_EXCL O_NOCTTY O_TRUNC O_APPEND O_NONBLOCK O_DIRECT
        O_DIRECTORY O_NOFOLLOW O_NOATIME O_CLOEXEC O_PATH O_ASYNC;
    /// mmap(2)
    PROT: PROT_READ PROT_WRITE PROT_EXEC;
    /// mmap(2); `MAP_SHARED_VALIDATE` includes the bits of the next two.
    MAP: MAP_SHARED_VALIDATE MAP_SHARED MAP_PRIVATE MAP_FIXED MAP_ANONYMOUS MAP_GROWSDOWN
        MAP_LOCKED MAP_NORESERVE MAP_POPULATE MAP_NONBLOCK MAP_STACK MAP_HUGETLB
        MAP_FIXED_NOREPLACE;
    /// poll(2)
    POLL: POLLIN POLLPRI POLLOUT POLLERR POLLHUP POLLNVAL POLLRDNORM POLLRDBAND POLLWRNORM
        POLLWRBAND POLLRDHUP;
    /// waitpid(2), waitid(2)
    WAIT: WNOHANG WUNTRACED WEXITED WCONTINUED WNOWAIT __WALL __WCLONE __WNOTHREAD;
    /// send(2), recv(2)
    MSG: MSG_OOB MSG_PEEK MSG_DONTROUTE MSG_TRUNC MSG_DONTWAIT MSG_WAITALL MSG_NOSIGNAL MSG_MORE
        MSG_WAITFORONE MSG_CMSG_CLOEXEC;
    /// clock_gettime(2)
    CLOCK: CLOCK_REALTIME CLOCK_MONOTONIC CLOCK_PROCESS_CPUTIME_ID CLOCK_THREAD_CPUTIME_ID
        CLOCK_MONOTONIC_RAW CLOCK_REALTIME_COARSE CLOCK_MONOTONIC_COARSE CLOCK_BOOTTIME
        CLOCK_REALTIME_ALARM CLOCK_BOOTTIME_ALARM CLOCK_TAI;
    /// clock_nanosleep(2)
    TIMER: TIMER_ABSTIME;
    /// futex(2), the operation without its flags.
    FUTEX: FUTEX_WAIT FUTEX_WAKE FUTEX_REQUEUE FUTEX_CMP_REQUEUE FUTEX_WAKE_OP FUTEX_LOCK_PI
        FUTEX_UNLOCK_PI FUTEX_TRYLOCK_PI FUTEX_WAIT_BITSET FUTEX_WAKE_BITSET
        FUTEX_WAIT_REQUEUE_PI FUTEX_CMP_REQUEUE_PI;
    /// lseek(2)
    SEEK: SEEK_SET SEEK_CUR SEEK_END SEEK_DATA SEEK_HOLE;
    /// fcntl(2)
    FCNTL: F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_GETLK F_SETLK F_SETLKW F_SETOWN F_GETOWN
        F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_DUPFD_CLOEXEC F_SETPIPE_SZ F_GETPIPE_SZ;
    /// flock(2); the last one is combined with the others.
    FLOCK: LOCK_SH LOCK_EX LOCK_UN LOCK_NB;
    /// rt_sigprocmask(2)
    HOW: SIG_BLOCK SIG_UNBLOCK SIG_SETMASK;
    /// waitid(2)
    ID: P_ALL P_PID P_PGID P_PIDFD;
    /// socket(2)
    FAMILY: AF_UNSPEC AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET AF_VSOCK;
    /// epoll_ctl(2)
    EPOLL_CTL: EPOLL_CTL_ADD EPOLL_CTL_DEL EPOLL_CTL_MOD;
    /// madvise(2)
    MADV: MADV_NORMAL MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MADV_DONTNEED MADV_FREE
        MADV_REMOVE MADV_DONTFORK MADV_DOFORK MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTDUMP;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_have_names() {
        assert_eq!(
            bits(libc::O_CLOEXEC as u64 | 1 << 40, OPEN, "0"),
            "O_CLOEXEC|0x10000000000"
        );
        assert_eq!(bits(0, PROT, "PROT_NONE"), "PROT_NONE");
        assert_eq!(bits(0x22, MAP, "0"), "MAP_PRIVATE|MAP_ANONYMOUS");
        assert_eq!(bits(3, MAP, "0"), "MAP_SHARED_VALIDATE");
        assert_eq!(one(1, CLOCK), "CLOCK_MONOTONIC");
        assert_eq!(one(u64::MAX, CLOCK), "-1");
        assert_eq!(signal(15), "SIGTERM");
        assert_eq!(signal(36), "SIGRTMIN+2");
    }
}
