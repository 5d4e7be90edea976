//! Changes root to another user, completely.

use std::ffi::CString;
use std::io;

use ckpt_sys::credentials::{self, Capabilities};
use nix::unistd::{Gid, Uid, User, getgrouplist, setresgid, setresuid};

/// A user to change to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Owner {
    /// A user with the supplementary groups of a login; `None` if unknown to the system.
    pub fn of(user: &User) -> Option<Self> {
        let name = CString::new(user.name.as_str()).ok()?;
        let groups = getgrouplist(&name, user.gid).ok()?;
        Some(Self {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            groups: groups.into_iter().map(Gid::as_raw).collect(),
        })
    }

    /// Changes all ids and groups irrevocably. The kernel then drops every capability (capabilities(7), "Effect of
    /// user ID changes on capabilities"), except inheritable ones. Does not allocate or lock.
    ///
    /// # Errors
    /// Without CAP_SETUID and CAP_SETGID.
    pub fn take_over(&self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        credentials::set_groups(&self.groups)?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        Capabilities::default().set()?;
        // Root's keys must not be accessible (session-keyring(7)).
        credentials::join_new_session_keyring()?;
        // Otherwise our files in /proc would be root's from now on.
        ckpt_sys::prctl::make_dumpable();
        Ok(())
    }
}
