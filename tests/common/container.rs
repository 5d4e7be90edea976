//! A container as docker makes one by default, as far as it can be imitated without docker: its
//! seccomp profile, its capabilities, what it hides of `/proc`, and a UTS namespace beside those that
//! every test has. The test, process 1 of its pid namespace, is the container's.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::path::Path;

use nix::errno::Errno;

use super::isolate::{Case, isolated, open_to_all};

pub mod profile;

#[allow(unused_imports)]
pub use profile::cap;

/// What is asked of the container: the options of `docker run`.
#[derive(Clone, Copy, Default)]
pub struct Container {
    /// `--user`: no capability.
    user: bool,
    /// `--cap-add`
    added: &'static [u32],
    /// `--security-opt systempaths=unconfined`
    open_paths: bool,
    /// `--security-opt seccomp=unconfined`
    open_calls: bool,
    /// The highest pid is soon reached.
    few_pids: bool,
    /// The first pids have been given.
    aged: bool,
}

impl Container {
    /// `docker run`
    pub fn root() -> Self {
        Self::default()
    }

    /// `docker run --user`
    pub fn user() -> Self {
        Self {
            user: true,
            ..Self::default()
        }
    }

    /// `docker run --cap-add`
    pub fn with(added: &'static [u32]) -> Self {
        Self {
            added,
            ..Self::default()
        }
    }

    /// Pids begin again soon, so that each can be awaited.
    pub fn few_pids(self) -> Self {
        Self {
            few_pids: true,
            ..self
        }
    }

    /// Likewise, and the first pids have been given already, which come only once.
    pub fn aged(self) -> Self {
        Self {
            aged: true,
            ..self.few_pids()
        }
    }

    /// `--security-opt systempaths=unconfined`
    pub fn open_paths(self) -> Self {
        Self {
            open_paths: true,
            ..self
        }
    }

    /// `--security-opt seccomp=unconfined`
    pub fn open_calls(self) -> Self {
        Self {
            open_calls: true,
            ..self
        }
    }
}

/// Runs the body of test `name` as process 1 of a container.
#[track_caller]
pub fn contained(name: &str, container: Container, body: impl FnOnce(&Case)) {
    isolated(name, |case| {
        if let Err(lacking) = container.enter(case) {
            case.skip(&lacking);
        }
        body(case);
    });
}

impl Container {
    fn capabilities(&self) -> Vec<u32> {
        let all = profile::CAPABILITIES.iter().chain(self.added);
        all.copied().collect()
    }

    fn enter(&self, case: &Case) -> Result<(), String> {
        let step = |what: &str, r: i64| match Errno::result(r) {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("{what} of a container ({e})")),
        };
        // SAFETY: a call without pointers.
        let uts = unsafe { libc::unshare(libc::CLONE_NEWUTS) };
        step("the UTS namespace", uts.into())?;
        if self.few_pids {
            few_pids()?;
        }
        if self.aged {
            let written = fs::write("/proc/sys/kernel/ns_last_pid", "320");
            written.map_err(|e| format!("choosing the last pid ({e})"))?;
        }
        if !self.open_paths {
            hide_paths()?;
        }
        if !self.open_calls {
            step("the seccomp filter", install(&self.capabilities()))?;
        }
        let me = case.is_root();
        open_to_all(case.dir());
        // In a user namespace of one id, the user is the one without capabilities.
        let keeps: Vec<u32> = match self.user && !me {
            true => Vec::new(),
            false => self.capabilities(),
        };
        step("the capabilities", drop_all_but(&keeps, self.user && me))
    }
}

/// Since Linux 6.14 each pid namespace has a highest pid of its own.
fn few_pids() -> Result<(), String> {
    const FILE: &str = "/proc/sys/kernel/pid_max";
    let highest = fs::read_to_string(FILE).unwrap_or_default();
    if highest
        .trim()
        .parse()
        .is_ok_and(|highest: u32| highest <= 65536)
    {
        return Ok(());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0u32);
    let lacking = "a highest pid of a pid namespace's own (Linux 6.14)";
    match (next(), next()) >= (6, 14) {
        true => fs::write(FILE, "1200").map_err(|e| format!("{lacking}: {e}")),
        false => Err(lacking.into()),
    }
}

fn hide_paths() -> Result<(), String> {
    for path in profile::MASKED {
        let covered = match fs::metadata(path) {
            Err(_) => continue,
            Ok(meta) if meta.is_dir() => mount("tmpfs", path, Some("tmpfs"), libc::MS_RDONLY),
            Ok(_) => mount("/dev/null", path, None, libc::MS_BIND),
        };
        covered.map_err(|e| format!("covering {path} ({e})"))?;
    }
    for path in profile::READ_ONLY {
        if Path::new(path).exists() {
            let again = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
            let inherited = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            mount(path, path, None, libc::MS_BIND)
                .and_then(|()| mount("none", path, None, again | inherited))
                .map_err(|e| format!("making {path} read-only ({e})"))?;
        }
    }
    Ok(())
}

fn mount(what: &str, at: &str, kind: Option<&str>, flags: libc::c_ulong) -> Result<(), Errno> {
    let c = |text: &str| CString::new(text).expect("no zero is in it");
    let (what, at, kind) = (c(what), c(at), kind.map(c));
    let kind = kind.as_ref().map_or(std::ptr::null(), |k| k.as_ptr());
    // SAFETY: strings that live on; no data.
    let r = unsafe { libc::mount(what.as_ptr(), at.as_ptr(), kind, flags, std::ptr::null()) };
    Errno::result(r).map(drop)
}

/// Installs docker's filter for all of our threads.
fn install(capabilities: &[u32]) -> i64 {
    filter(
        &mut profile::program(capabilities),
        libc::SECCOMP_FILTER_FLAG_TSYNC,
    )
}

/// Installs a filter.
pub fn filter(program: &mut [libc::sock_filter], flags: libc::c_ulong) -> i64 {
    let fprog = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    const SET_MODE_FILTER: libc::c_int = 1;
    // SAFETY: the kernel copies the program.
    unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const fprog) }
}

/// All of our threads, and all that they start, are killed when they make this call.
pub fn kills_on(nr: i64) {
    on_call(nr, libc::SECCOMP_RET_KILL_PROCESS);
}

/// All of our threads, and all that they start, get this error of this call.
pub fn fails_on(nr: i64, error: Errno) {
    on_call(nr, libc::SECCOMP_RET_ERRNO | error as u32);
    // SAFETY: the call is not made.
    let answer = unsafe { libc::syscall(nr, 0, 0, 0, 0, 0, 0) };
    assert_eq!(Errno::result(answer), Err(error));
}

fn on_call(nr: i64, action: u32) {
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(0x20, 0, 0, 0),
        op(0x15, 0, 1, nr as u32),
        op(0x06, 0, 0, action),
        op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(filter(&mut program, libc::SECCOMP_FILTER_FLAG_TSYNC), 0);
}

/// Leaves this thread, and all that it starts, those capabilities at most; as another user none.
fn drop_all_but(keep: &[u32], as_user: bool) -> i64 {
    let bits = keep.iter().fold(0u64, |bits, cap| bits | 1 << cap);
    let (low, high) = (bits as u32, (bits >> 32) as u32);
    /// `_LINUX_CAPABILITY_VERSION_3`, and ourselves.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    // Effective, permitted, inheritable; the low halves first.
    let data = [low, low, 0, high, high, 0];
    // SAFETY: the kernel reads 8 and 24 bytes.
    unsafe {
        for cap in 0..64 {
            if bits & 1 << cap == 0 {
                libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0);
            }
        }
        if as_user {
            let groups = std::ptr::null::<libc::gid_t>();
            let r = libc::syscall(libc::SYS_setgroups, 0, groups)
                | libc::syscall(libc::SYS_setresgid, USER, USER, USER)
                | libc::syscall(libc::SYS_setresuid, USER, USER, USER);
            // Else our own /proc files are root's.
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
            return r;
        }
        libc::syscall(libc::SYS_capset, HEADER.as_ptr(), data.as_ptr())
    }
}

/// The user in the container.
const USER: u32 = 65534;
