//! The table. A test compares it with `docs/privileges.md`.

use super::Capability::{
    AuditControl, CheckpointRestore, Chown, DacOverride, DacReadSearch, Fowner, IpcLock, Lease,
    NetAdmin, NetBindService, Setgid, Setpcap, Setuid, SysAdmin, SysChroot, SysNice, SysPtrace,
    SysRawio, SysResource, SysTime,
};
use super::HeldIn::{First, Own, Owner, Target};
use super::Row;
use super::Takes::{All, Any};

macro_rules! uses {
    ($($(#[$doc:meta])* $variant:ident {
        $takes:expr, $held_in:expr, $what:literal, without $without:literal, kernel $kernel:literal
    })*) => {
        /// A use of capabilities.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Use { $($(#[$doc])* $variant,)* }

        impl Use {
            /// All of them, in the order of a checkpoint and a restore.
            pub const ALL: &[Use] = &[$(Use::$variant),*];

            /// Its row.
            pub fn row(self) -> Row {
                match self {
                    $(Use::$variant => Row {
                        takes: $takes,
                        held_in: $held_in,
                        what: $what,
                        kernel: $kernel,
                        without: $without,
                    },)*
                }
            }
        }
    };
}

uses! {
    /// PTRACE_SEIZE, PTRACE_ATTACH.
    Trace {
        Any(&[SysPtrace]), Target,
        "to attach to a process that is another user's, is not dumpable, or has capabilities that you lack; with Yama, that you did not start",
        without "refused",
        kernel "`__ptrace_may_access` (kernel/ptrace.c), `cap_ptrace_access_check` (security/commoncap.c), `yama_ptrace_access_check` (security/yama/yama_lsm.c)"
    }
    /// Files of `/proc/PID` of other users.
    OthersProc {
        Any(&[DacOverride]), Target,
        "to open such a process's files in `/proc`, which belong to its user, or to root when it is not dumpable",
        without "refused",
        kernel "`generic_permission` (fs/namei.c), `task_dump_owner` (fs/proc/base.c)"
    }
    /// `PTRACE_O_SUSPEND_SECCOMP`, `PTRACE_SECCOMP_GET_FILTER`.
    SuspendSeccomp {
        Any(&[SysAdmin]), First,
        "to checkpoint a process with seccomp filters: they are read, and suspended while calls are made in it",
        without "refused",
        kernel "`check_ptrace_options` (kernel/ptrace.c), `seccomp_get_filter` (kernel/seccomp.c)"
    }
    /// `/proc/PID/map_files`.
    MappedFiles {
        Any(&[CheckpointRestore, SysAdmin]), First,
        "to read a mapped file that was deleted as a whole",
        without "only its mapped parts are stored",
        kernel "`proc_map_files_get_link` (fs/proc/base.c)"
    }
    /// open_by_handle_at(2).
    FileHandles {
        Any(&[DacReadSearch]), First,
        "to find the paths of inotify watches",
        without "they are searched near the job's files; refused if not found",
        kernel "`may_decode_fh` (fs/fhandle.c)"
    }
    /// `SIOCUNIXFILE`.
    SocketFile {
        Any(&[NetAdmin]), Owner("net"),
        "to find the renamed file of a unix socket",
        without "it is found in its directory only",
        kernel "`unix_ioctl` (net/unix/af_unix.c)"
    }
    /// setns(2).
    EnterNamespaces {
        Any(&[SysAdmin]), Target,
        "to checkpoint a job in a pid namespace of its own, from outside; the owner of its user namespace holds it there",
        without "refused",
        kernel "`pidns_install` (kernel/pid_namespace.c), `mntns_install` (fs/namespace.c)"
    }
    /// clone3(2) with `set_tid`.
    ChoosePids {
        Any(&[CheckpointRestore, SysAdmin]), Owner("pid"),
        "to restore with the old pids in the present pid namespace; for several pids, held by root or as an ambient capability",
        without "a new pid namespace",
        kernel "`alloc_pid` (kernel/pid.c)"
    }
    /// unshare(2), mount(2).
    PidNamespace {
        Any(&[SysAdmin]), Own,
        "to create a pid namespace",
        without "within a user namespace, in which you hold it",
        kernel "`copy_namespaces` (kernel/nsproxy.c)"
    }
    /// unshare(2), `/proc/PID/timens_offsets`.
    OwnClocks {
        All(&[SysAdmin, SysTime]), Own,
        "to continue the clocks from their values at the checkpoint",
        without "those of the machine; refused if they would go back",
        kernel "`unshare_nsproxy_namespaces` (kernel/nsproxy.c), `proc_timens_set_offset` (kernel/time/namespace.c)"
    }
    /// setresuid(2).
    SetUser {
        Any(&[Setuid]), Own,
        "to restore user ids that are not your own, also those of senders of unread messages",
        without "refused; of messages, your ids with a warning",
        kernel "`__sys_setresuid` (kernel/sys.c), `scm_check_creds` (net/core/scm.c)"
    }
    /// setresgid(2), setgroups(2).
    SetGroups {
        Any(&[Setgid]), Own,
        "to restore group ids and supplementary groups that are not your own, also those of senders of unread messages",
        without "refused; of messages, your ids with a warning",
        kernel "`__sys_setresgid` (kernel/sys.c), `may_setgroups` (kernel/groups.c), `scm_check_creds` (net/core/scm.c)"
    }
    /// Tracing a process after its ids have changed.
    RebuildOthers {
        All(&[SysPtrace, DacOverride]), Own,
        "to restore any ids that are not your own: the job is traced until it continues",
        without "refused",
        kernel "`__ptrace_may_access` (kernel/ptrace.c), `generic_permission` (fs/namei.c)"
    }
    /// capset(2), `PR_CAPBSET_DROP`, `PR_SET_SECUREBITS`.
    Setpcap {
        Any(&[Setpcap]), Own,
        "to restore a smaller bounding set than yours, other securebits, or to change from root's ids to others with the resulting capabilities",
        without "refused",
        kernel "`cap_prctl_drop`, `cap_task_prctl` (security/commoncap.c)"
    }
    /// chroot(2).
    RootDirectory {
        Any(&[SysChroot]), Own,
        "to restore a process with a root directory of its own",
        without "refused",
        kernel "`ksys_chroot` (fs/open.c)"
    }
    /// seccomp(2).
    InstallSeccomp {
        Any(&[SysAdmin]), First,
        "to restore seccomp filters",
        without "refused",
        kernel "`seccomp_prepare_filter` (kernel/seccomp.c), `check_ptrace_options` (kernel/ptrace.c)"
    }
    /// `/proc/sys/kernel/*_next_id`.
    ChooseIpcIds {
        Any(&[CheckpointRestore]), Owner("ipc"),
        "to create a missing System V object with its old id",
        without "refused",
        kernel "`ipc_permissions` (ipc/ipc_sysctl.c)"
    }
    /// msgctl(2).
    LargeQueue {
        Any(&[SysResource]), First,
        "a System V message queue with a capacity above `kernel.msgmnb` bytes",
        without "a smaller capacity, with a warning",
        kernel "`msgctl_down` (ipc/msg.c)"
    }
    /// setrlimit(2).
    HardLimits {
        Any(&[SysResource]), First,
        "hard limits above your own",
        without "yours, with a warning",
        kernel "`do_prlimit` (kernel/sys.c)"
    }
    /// `/proc/PID/oom_score_adj`.
    OomScore {
        Any(&[SysResource]), First,
        "an `oom_score_adj` below your own",
        without "yours, with a warning",
        kernel "`__set_oom_adj` (fs/proc/base.c)"
    }
    /// `/proc/PID/loginuid`.
    LoginUid {
        Any(&[AuditControl]), First,
        "to restore an audit login uid that is not yours",
        without "yours, with a warning",
        kernel "`audit_set_loginuid_perm` (kernel/auditsc.c)"
    }
    /// `EPIOCSPARAMS`.
    BusyPoll {
        Any(&[NetAdmin]), First,
        "to let an epoll set poll network devices for more than 64 packets a time (`EPIOCSPARAMS`)",
        without "it does not poll them, with a warning",
        kernel "`ep_eventpoll_bp_ioctl` (fs/eventpoll.c)"
    }
    /// `TIOCSLCKTRMIOS`.
    LockedModes {
        Any(&[CheckpointRestore, SysAdmin]), First,
        "to lock modes of the job's ptys again (`TIOCSLCKTRMIOS`)",
        without "they can be changed, with a warning",
        kernel "`tty_mode_ioctl` (drivers/tty/tty_ioctl.c)"
    }
    /// ioperm(2).
    IoPorts {
        Any(&[SysRawio]), First,
        "to let a thread use I/O ports again (`ioperm`)",
        without "it may not, with a warning",
        kernel "`ksys_ioperm` (arch/x86/kernel/ioport.c)"
    }
    /// `PR_SET_IO_FLUSHER`.
    IoFlusher {
        Any(&[SysResource]), First,
        "to make a task an I/O flusher again (`PR_SET_IO_FLUSHER`)",
        without "it is not one, with a warning",
        kernel "`sys_prctl` (kernel/sys.c)"
    }
    /// `F_SETPIPE_SZ`.
    LargePipe {
        Any(&[SysResource]), First,
        "pipes of more than `fs.pipe-max-size` bytes",
        without "refused",
        kernel "`pipe_set_size` (fs/pipe.c)"
    }
    /// mlock(2).
    LockMemory {
        Any(&[IpcLock]), First,
        "locked memory above RLIMIT_MEMLOCK",
        without "it is not locked, with a warning",
        kernel "`can_do_mlock` (mm/mlock.c)"
    }
    /// sched_setattr(2), setpriority(2), ioprio_set(2).
    Scheduling {
        Any(&[SysNice]), First,
        "real-time policies, lower nice values and real-time I/O priorities above your limits",
        without "yours, with a warning",
        kernel "`user_check_sched_setscheduler` (kernel/sched/syscalls.c), `ioprio_check_cap` (block/ioprio.c)"
    }
    /// `SO_SNDBUFFORCE`.
    SocketBuffers {
        Any(&[NetAdmin]), First,
        "buffers of sockets above `net.core.wmem_max` and `rmem_max`",
        without "smaller ones, with a warning",
        kernel "`sk_setsockopt` (net/core/sock.c)"
    }
    /// `SO_MARK`, `SO_PRIORITY`, `SO_RCVMARK`, `SO_DEBUG`, `SO_BUSY_POLL`, `SO_PREFER_BUSY_POLL`, `SO_TXTIME`.
    SocketMark {
        Any(&[NetAdmin]), Owner("net"),
        "socket marks, priorities above 6, `SO_DEBUG`, busy polling, `SO_TXTIME` with other clocks",
        without "not set, with a warning",
        kernel "`sk_setsockopt` (net/core/sock.c)"
    }
    /// bind(2) to a low port.
    LowPorts {
        Any(&[NetBindService]), Owner("net"),
        "to give sockets their ports below `net.ipv4.ip_unprivileged_port_start` (1024)",
        without "refused",
        kernel "`inet_port_requires_bind_service` (include/net/ip.h)"
    }
    /// `F_SETLEASE`.
    Lease {
        Any(&[Lease]), First,
        "a lease on a file of another user",
        without "refused",
        kernel "`vfs_setlease` (fs/locks.c)"
    }
    /// chown(2).
    GiveFiles {
        Any(&[Chown]), Own,
        "to give files that are put back, and sockets' files, to their owner",
        without "they are yours, with a warning",
        kernel "`setattr_prepare` (fs/attr.c)"
    }
    /// `O_NOATIME` by `F_SETFL`.
    NoAccessTime {
        Any(&[Fowner]), Own,
        "to open a file of another user with O_NOATIME, as the job had it",
        without "refused",
        kernel "`setfl` (fs/fcntl.c)"
    }
}
