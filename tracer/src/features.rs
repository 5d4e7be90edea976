//! Capabilities of this kernel, machine and user, probed once.
//!
//! [`KernelFeatures::probe`] takes about a millisecond: a few calls without side effects, and two children that exist
//! for its duration, one to be traced and one to try namespaces. The children share no memory with us, die with us
//! (`PR_SET_PDEATHSIG`) and send no `SIGCHLD`. A setting and the kernel's behaviour may differ (security modules,
//! containers), so whatever can be tried is tried.

#![allow(unsafe_code)]

mod cpu;
mod table;

use std::fs;
use std::mem::size_of;

use ckpt_sys::helper::{Child, pause_forever};
use nix::errno::Errno;

use crate::capabilities::Held;
use crate::kcmp::{KcmpType, kcmp};
use crate::proc::mounts;
use crate::proc::pagemap::{PagemapScanner, ScanMethod};
use crate::{Pid, Result, Tid};

pub use cpu::{Cpu, FeatureWord, Register, StateComponent};
pub use table::FeatureRow;

/// `MEMBARRIER_CMD_GET_REGISTRATIONS` of `linux/membarrier.h` (Linux 6.3).
const MEMBARRIER_GET_REGISTRATIONS: i64 = 1 << 9;
/// `MADV_GUARD_INSTALL` of `asm-generic/mman-common.h` (Linux 6.13).
const MADV_GUARD_INSTALL: libc::c_int = 102;
/// `PR_TIMER_CREATE_RESTORE_IDS` and its `_GET` of `linux/prctl.h` (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: (libc::c_int, libc::c_ulong) = (77, 2);
/// `PR_SET_VMA` and `PR_SET_VMA_ANON_NAME` of `linux/prctl.h`.
const PR_SET_VMA: (libc::c_int, libc::c_ulong) = (0x5356_4d41, 0);
/// `AT_RSEQ_FEATURE_SIZE` of `linux/auxvec.h` (Linux 6.3).
const AT_RSEQ_FEATURE_SIZE: libc::c_ulong = 27;
/// `UFFD_USER_MODE_ONLY` of `linux/userfaultfd.h` (Linux 5.11).
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// `UFFD_API` and `UFFDIO_API`, `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// `UFFD_FEATURE_WP_UNPOPULATED` (Linux 6.4) and `UFFD_FEATURE_WP_ASYNC` (Linux 6.7).
const UFFD_WP: u64 = 1 << 13 | 1 << 15;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);

/// The result. Each field is explained by its row in [`table`](Self::table).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelFeatures {
    /// Release of the kernel, as `uname -r` prints it.
    pub release: String,
    /// `PTRACE_SEIZE` and `PTRACE_INTERRUPT` work on a child of ours.
    pub ptrace_seize: bool,
    /// `PTRACE_GET_SYSCALL_INFO` (Linux 5.3).
    pub ptrace_syscall_info: bool,
    /// `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13).
    pub ptrace_rseq: bool,
    /// `PTRACE_O_SUSPEND_SECCOMP`, see [`Use::SuspendSeccomp`](crate::capabilities::Use).
    pub suspend_seccomp: bool,
    /// process_vm_readv(2).
    pub process_vm_readv: bool,
    /// pidfd_open(2) (Linux 5.3).
    pub pidfd_open: bool,
    /// pidfd_getfd(2) (Linux 5.6).
    pub pidfd_getfd: bool,
    /// kcmp(2).
    pub kcmp: bool,
    /// `PAGEMAP_SCAN` (Linux 6.7).
    pub pagemap_scan: bool,
    /// `PAGEMAP_SCAN` knows guard pages (Linux 6.15).
    pub pagemap_guard: bool,
    /// userfaultfd can be opened here, and write-protects asynchronously (Linux 6.7).
    pub uffd_wp_async: bool,
    /// clone3(2) exists.
    pub clone3: bool,
    /// clone3 with `set_tid` is permitted in our pid namespace.
    pub set_tid: bool,
    /// `PR_SET_MM_MAP`.
    pub set_mm_map: bool,
    /// `PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.15).
    pub timer_restore_ids: bool,
    /// `PR_SET_VMA_ANON_NAME`.
    pub anon_vma_name: bool,
    /// `MAP_FIXED_NOREPLACE` (Linux 4.17).
    pub map_fixed_noreplace: bool,
    /// `MADV_GUARD_INSTALL` (Linux 6.13).
    pub guard_install: bool,
    /// mseal(2) (Linux 6.10).
    pub mseal: bool,
    /// `MEMBARRIER_CMD_GET_REGISTRATIONS` (Linux 6.3).
    pub membarrier_registrations: bool,
    /// A child of ours may make a user namespace.
    pub user_namespace: bool,
    /// It may make a pid namespace therein.
    pub pid_namespace: bool,
    /// It may make a time namespace therein.
    pub time_namespace: bool,
    /// Links in `/proc/PID/map_files` can be read.
    pub map_files: bool,
    /// Size of `struct rseq` that the kernel fills (`AT_RSEQ_FEATURE_SIZE`); 0 before Linux 6.3.
    pub rseq_feature_size: u32,
    /// The capabilities that we hold.
    pub capabilities: Held,
    /// `kernel.yama.ptrace_scope`; `None` without Yama.
    pub yama_scope: Option<u32>,
    /// Option `hidepid` of our `/proc`: 0, 1, 2 or 4.
    pub hidepid: u32,
    /// `vm.overcommit_memory`
    pub overcommit: u32,
    /// `vm.unprivileged_userfaultfd`
    pub unprivileged_userfaultfd: bool,
    /// Whether there is swap space.
    pub swap: bool,
    /// `vm.max_map_count`: mappings a process may have.
    pub max_map_count: u64,
    /// `kernel.pid_max`: pids are smaller.
    pub pid_max: u64,
    /// `kernel.threads-max`
    pub threads_max: u64,
    /// The processor.
    pub cpu: Cpu,
}

impl KernelFeatures {
    /// Probes everything. What cannot be determined counts as missing.
    pub fn probe() -> Self {
        let mut found = Self {
            release: setting("/proc/sys/kernel/osrelease").unwrap_or_default(),
            capabilities: Held::now(),
            cpu: Cpu::probe(),
            yama_scope: number("/proc/sys/kernel/yama/ptrace_scope").map(|scope| scope as u32),
            hidepid: hidepid(),
            overcommit: number("/proc/sys/vm/overcommit_memory").unwrap_or(0) as u32,
            unprivileged_userfaultfd: number("/proc/sys/vm/unprivileged_userfaultfd") == Some(1),
            swap: fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1),
            max_map_count: max_map_count(),
            pid_max: number("/proc/sys/kernel/pid_max").unwrap_or(32768),
            threads_max: number("/proc/sys/kernel/threads-max").unwrap_or(0),
            map_files: map_files_readable(),
            ..Self::default()
        };
        found.probe_calls();
        found.set_tid = found.clone3 && ckpt_sys::process::may_choose_pids();
        found.probe_target();
        found.probe_namespaces();
        found
    }

    /// Version of the kernel, (6, 18) for `6.18.44-generic`.
    pub fn version(&self) -> (u32, u32) {
        let mut numbers = self
            .release
            .split(|c: char| !c.is_ascii_digit())
            .map(str::parse);
        let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
        (next(), next())
    }

    /// Calls without side effects on ourselves.
    fn probe_calls(&mut self) {
        self.probe_mappings();
        self.uffd_wp_async = userfaultfd_features().is_some_and(|all| all & UFFD_WP == UFFD_WP);
        let mut size: libc::c_uint = 0;
        // SAFETY: the two prctls read; the first stores a u32 in `size`, which lives on.
        // membarrier(QUERY) and getauxval read. mseal of no bytes does nothing. clone3 with a size
        // of 0 is refused before it looks at its argument.
        unsafe {
            self.set_mm_map = libc::prctl(
                libc::PR_SET_MM,
                libc::PR_SET_MM_MAP_SIZE as libc::c_ulong,
                &raw mut size,
                0 as libc::c_ulong,
                0 as libc::c_ulong,
            ) == 0;
            let (option, get) = PR_TIMER_CREATE_RESTORE_IDS;
            self.timer_restore_ids = libc::prctl(option, get, 0, 0, 0) >= 0;
            let commands = libc::syscall(libc::SYS_membarrier, 0, 0, 0);
            self.membarrier_registrations =
                commands > 0 && commands & MEMBARRIER_GET_REGISTRATIONS != 0;
            self.rseq_feature_size = libc::getauxval(AT_RSEQ_FEATURE_SIZE) as u32;
            self.mseal = libc::syscall(libc::SYS_mseal, 0usize, 0usize, 0usize) == 0;
            libc::syscall(libc::SYS_clone3, 0usize, 0usize);
            self.clone3 = Errno::last() != Errno::ENOSYS;
        }
    }

    /// Operations on mappings, tried on one page of our own.
    fn probe_mappings(&mut self) {
        let page = crate::proc::pagemap::PAGE_SIZE as usize;
        let (prot, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: all calls concern the page that the first one makes and that no other code knows of.
        // The second mmap may not replace it: an old kernel that does not know the flag takes the
        // address for a hint and maps elsewhere, and that is removed as well.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), page, prot, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return;
            }
            let again = libc::mmap(at, page, prot, flags | libc::MAP_FIXED_NOREPLACE, -1, 0);
            self.map_fixed_noreplace = again == libc::MAP_FAILED && Errno::last() == Errno::EEXIST;
            if again != libc::MAP_FAILED {
                libc::munmap(again, page);
            }
            self.guard_install = libc::madvise(at, page, MADV_GUARD_INSTALL) == 0;
            let (option, what) = PR_SET_VMA;
            self.anon_vma_name = libc::prctl(option, what, at, page, c"ckpt".as_ptr()) == 0;
            libc::munmap(at, page);
        }
    }

    /// Operations on another process, tried on a child that waits for signals.
    fn probe_target(&mut self) {
        static MARK: u64 = 0x636b_7074;
        let Some(child) = Child::start(pause_forever) else {
            return;
        };
        let pid = child.pid();
        let mut copy = 0u64;
        let local = libc::iovec {
            iov_base: (&raw mut copy).cast(),
            iov_len: 8,
        };
        let remote = libc::iovec {
            iov_base: (&raw const MARK).cast_mut().cast(),
            iov_len: 8,
        };
        // SAFETY: `local` describes `copy`, which outlives the call; the remote address is read in
        // the child, a copy of us.
        let read = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
        self.process_vm_readv = read == 8 && copy == MARK;
        if let Ok(scanner) = PagemapScanner::open(Pid(pid)) {
            self.pagemap_scan = scanner.method() == ScanMethod::Ioctl;
            self.pagemap_guard = self.pagemap_scan && scanner.has_guard();
        }
        self.kcmp = kcmp(Pid::own().leader(), Tid(pid), KcmpType::Vm).is_ok();
        // SAFETY: descriptors only; each is closed once. That number -1 is no descriptor (EBADF) is
        // found out after permission was checked.
        unsafe {
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int;
            if pidfd >= 0 {
                self.pidfd_open = true;
                libc::syscall(libc::SYS_pidfd_getfd, pidfd, -1, 0);
                self.pidfd_getfd = Errno::last() == Errno::EBADF;
                libc::close(pidfd);
            }
        }
        self.probe_ptrace(pid);
    }

    fn probe_ptrace(&mut self, pid: libc::pid_t) {
        let mut buffer = [0u8; 128];
        let data = buffer.as_mut_ptr();
        // SAFETY: the child is ours and not yet waited for, so `pid` is it. The two queries write at
        // most the given number of bytes to `buffer`.
        unsafe {
            if libc::ptrace(libc::PTRACE_SEIZE, pid, 0usize, 0usize) != 0 {
                return;
            }
            let interrupted = libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0usize, 0usize) == 0;
            let mut what = 0;
            self.ptrace_seize = interrupted
                && libc::waitpid(pid, &mut what, libc::__WALL) == pid
                && libc::WIFSTOPPED(what);
            if !self.ptrace_seize {
                return;
            }
            let size = buffer.len();
            let query = |request| libc::ptrace(request, pid, size, data);
            self.ptrace_syscall_info = query(libc::PTRACE_GET_SYSCALL_INFO) > 0;
            let rseq = libc::ptrace(libc::PTRACE_GET_RSEQ_CONFIGURATION, pid, 24usize, data);
            self.ptrace_rseq = rseq > 0;
            let options = libc::PTRACE_O_SUSPEND_SECCOMP as usize;
            self.suspend_seccomp = libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0usize, options) == 0;
        }
    }

    fn probe_namespaces(&mut self) {
        let Some(child) = Child::start(try_namespaces) else {
            return;
        };
        let code = child.exit_code().unwrap_or(0);
        self.user_namespace = code & 1 != 0;
        self.pid_namespace = code & 2 != 0;
        self.time_namespace = code & 4 != 0;
    }
}

/// Whether we may create a pid and a mount namespace, within a user namespace if necessary.
#[must_use]
pub fn namespaces_permitted() -> bool {
    let code = Child::start(try_pid_and_mounts).and_then(|child| child.exit_code());
    code == Some(1)
}

fn try_pid_and_mounts() -> ! {
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    // SAFETY: plain system calls; they change the child alone.
    unsafe {
        let with_user = || libc::syscall(libc::SYS_unshare, kinds | libc::CLONE_NEWUSER) == 0;
        let made = libc::syscall(libc::SYS_unshare, kinds) == 0 || with_user();
        libc::_exit(i32::from(made))
    }
}

/// One after the other: a security module may permit a user namespace and then no capability in it.
fn try_namespaces() -> ! {
    let mut code = 0;
    let kinds = [libc::CLONE_NEWUSER, libc::CLONE_NEWPID, libc::CLONE_NEWTIME];
    // SAFETY: plain system calls; they change the child alone.
    unsafe {
        for (bit, kind) in kinds.into_iter().enumerate() {
            code |= i32::from(libc::syscall(libc::SYS_unshare, kind) == 0) << bit;
        }
        libc::_exit(code)
    }
}

fn setting(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// `vm.max_map_count`; a process may have one mapping more.
pub fn max_map_count() -> u64 {
    number("/proc/sys/vm/max_map_count").unwrap_or(65530)
}

fn number(path: &str) -> Option<u64> {
    setting(path)?.parse().ok()
}

fn hidepid() -> u32 {
    let own = Pid::own();
    let Ok(table) = mounts::read_mounts(own) else {
        return 0;
    };
    // The last mount on a mount point covers those before it.
    let proc = table
        .all()
        .iter()
        .rev()
        .find(|mount| mount.mount_point.as_os_str() == "/proc");
    let option = proc.and_then(|mount| {
        mount
            .super_options
            .split(',')
            .find_map(|option| option.strip_prefix("hidepid="))
    });
    match option {
        Some("noaccess") => 1,
        Some("invisible") => 2,
        Some("ptraceable") => 4,
        Some(number) => number.parse().unwrap_or(0),
        None => 0,
    }
}

fn map_files_readable() -> bool {
    let Ok(mut entries) = fs::read_dir("/proc/self/map_files") else {
        return false;
    };
    // readlink(2) is unrestricted; only following the link needs the permission.
    entries
        .next()
        .is_some_and(|entry| entry.is_ok_and(|entry| fs::File::open(entry.path()).is_ok()))
}

/// `UFFD_FEATURE_*` of a userfaultfd that an ordinary user may open; `None` when refused.
fn userfaultfd_features() -> Option<u64> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: the descriptor is ours and closed once; the ioctl reads and fills `api`. Asking for no
    // feature makes the kernel name all.
    unsafe {
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
        let fd = libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int;
        if fd < 0 {
            return None;
        }
        let rc = libc::ioctl(fd, UFFDIO_API, &raw mut api);
        libc::close(fd);
        (rc == 0).then_some(api.features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_finds_this_machine_and_leaves_no_child() {
        let begin = std::time::Instant::now();
        let found = KernelFeatures::probe();
        let took = begin.elapsed();
        for row in found.table() {
            println!(
                "{:3} {:32} {:60} {}",
                row.available, row.name, row.needed_for, row.detail
            );
        }
        println!("{took:?} {found:?}");
        assert!(found.version() >= (4, 0), "{}", found.release);
        assert_eq!(
            found.cpu.xcr0 & 3,
            3,
            "x87 and SSE state are always enabled with XSAVE"
        );
        assert!(found.cpu.xsave_size >= 576);
        assert!(
            found.process_vm_readv,
            "a child of one's own can always be read"
        );
        // The children were reaped: this process has none left to wait for.
        // SAFETY: only asks.
        let left =
            unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WCLONE | libc::WNOHANG) };
        assert_eq!((left, Errno::last()), (-1, Errno::ECHILD));
    }

    #[test]
    fn a_release_has_a_version() {
        let of = |release: &str| {
            KernelFeatures {
                release: release.into(),
                ..KernelFeatures::default()
            }
            .version()
        };
        assert_eq!(of("6.18.44-fc-v595"), (6, 18));
        assert_eq!(of("7.0-rc1"), (7, 0));
        assert_eq!(of(""), (0, 0));
    }
}
