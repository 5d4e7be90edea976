//! Our own ids, groups, capabilities and keyrings: credentials(7), capabilities(7), keyrings(7).
//!
//! Functions documented for "this thread" make the bare system call; the C library would change all threads.
#![allow(unsafe_code)]

use crate::{Errno, Result};

/// Sets the effective ids of this thread (setresuid(2), setresgid(2)) as far as possible: an id that our user
/// namespace does not map is left out. Changing groups needs root's id, so root's id is set before the groups and
/// dropped after them.
pub fn set_effective(uid: u32, gid: u32) {
    const SAME: u32 = u32::MAX;
    // SAFETY: calls without pointers, which change this thread alone.
    unsafe {
        if uid == 0 {
            libc::syscall(libc::SYS_setresuid, SAME, uid, SAME);
        }
        libc::syscall(libc::SYS_setresgid, SAME, gid, SAME);
        if uid != 0 {
            libc::syscall(libc::SYS_setresuid, SAME, uid, SAME);
        }
    }
}

/// Our supplementary groups (getgroups(2)).
pub fn groups() -> Vec<u32> {
    let groups = nix::unistd::getgroups().unwrap_or_default();
    groups.into_iter().map(nix::unistd::Gid::as_raw).collect()
}

/// Sets the supplementary groups of this thread (setgroups(2)).
///
/// # Errors
/// `EPERM` without CAP_SETGID, and where the user namespace forbids it.
pub fn set_thread_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: a live list of that length.
    let set = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    Errno::result(set).map(drop)
}

/// Sets the supplementary groups of all threads (setgroups(3)). It allocates nothing.
///
/// # Errors
/// As for [`set_thread_groups`].
pub fn set_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: a live list of that length.
    Errno::result(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }).map(drop)
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;

/// Effective, permitted and inheritable set of this thread, bit N for capability N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Effective.
    pub effective: u64,
    /// Permitted.
    pub permitted: u64,
    /// Inheritable.
    pub inheritable: u64,
}

impl Capabilities {
    /// capget(2).
    ///
    /// # Errors
    /// None known.
    pub fn own() -> Result<Self> {
        let header = [VERSION_3, 0];
        // Two words of 32 bits for each set.
        let mut sets = [[0u32; 3]; 2];
        // SAFETY: header and sets have the layout of capget(2), version 3.
        let r = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
        Errno::result(r)?;
        let set = |which: usize| u64::from(sets[0][which]) | u64::from(sets[1][which]) << 32;
        Ok(Self {
            effective: set(0),
            permitted: set(1),
            inheritable: set(2),
        })
    }

    /// capset(2). It allocates nothing.
    ///
    /// # Errors
    /// `EPERM` for what is not permitted.
    pub fn set(self) -> Result<()> {
        let header = [VERSION_3, 0];
        let all = [self.effective, self.permitted, self.inheritable];
        let sets = [all.map(|set| set as u32), all.map(|set| (set >> 32) as u32)];
        // SAFETY: header and sets have the layout of capset(2), version 3.
        let r = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
        Errno::result(r).map(drop)
    }
}

/// `PR_CAP_AMBIENT_RAISE`: the capability stays effective across an exec.
///
/// # Errors
/// `EPERM` unless it is permitted and inheritable.
pub fn raise_ambient(capability: u32) -> Result<()> {
    let (raise, none) = (libc::PR_CAP_AMBIENT_RAISE, 0u64);
    // SAFETY: a call without pointers.
    let r = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            raise,
            u64::from(capability),
            none,
            none,
        )
    };
    Errno::result(r).map(drop)
}

/// `PR_GET_SECUREBITS`: `SECBIT_*` of this thread.
pub fn securebits() -> u32 {
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) }.max(0) as u32
}

/// `PR_SET_SECUREBITS`.
///
/// # Errors
/// `EPERM` without CAP_SETPCAP, and for locked bits.
pub fn set_securebits(bits: u32) -> Result<()> {
    // SAFETY: a call without pointers.
    let r = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, u64::from(bits), 0u64, 0u64, 0u64) };
    Errno::result(r).map(drop)
}

/// Whether this kernel has keyrings (keyrings(7)); the question creates none.
pub fn keyrings_exist() -> bool {
    const KEYCTL_GET_KEYRING_ID: i64 = 0;
    const KEY_SPEC_SESSION_KEYRING: i64 = -3;
    keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING) != Err(Errno::ENOSYS)
}

/// Joins a new, empty session keyring (session-keyring(7)); does nothing where there are no keyrings.
///
/// # Errors
/// `EDQUOT` above the user's quota.
pub fn join_new_session_keyring() -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i64 = 1;
    match keyctl(KEYCTL_JOIN_SESSION_KEYRING, 0) {
        Err(Errno::ENOSYS) => Ok(()),
        other => other,
    }
}

/// keyctl(2) with a number or a null pointer.
fn keyctl(operation: i64, number: i64) -> Result<()> {
    // SAFETY: called with operations that take a number or a null pointer.
    let r = unsafe { libc::syscall(libc::SYS_keyctl, operation, number, 0) };
    Errno::result(r).map(drop)
}

/// Whether the kernel has Landlock and it is enabled (landlock_create_ruleset(2)).
pub fn has_landlock() -> bool {
    const VERSION: u32 = 1;
    let (call, none) = (libc::SYS_landlock_create_ruleset, 0usize);
    // SAFETY: with this flag the call answers a version and takes no structure.
    unsafe { libc::syscall(call, none, none, VERSION) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_that_status_shows() {
        let own = Capabilities::own().unwrap();
        let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let set = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!(own.effective, set("CapEff:"));
        assert_eq!(own.permitted, set("CapPrm:"));
        own.set().unwrap();
        assert_eq!(Capabilities::own(), Ok(own));
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Groups:"))
            .unwrap();
        let shown: Vec<u32> = line
            .split_whitespace()
            .map(|g| g.parse().unwrap())
            .collect();
        assert_eq!(groups(), shown);
    }
}
