//! Root becomes another user, with nothing left of root's.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, User, getgrouplist, setresgid, setresuid};

/// A user whom root becomes.
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
    /// The groups that a login would give to a user; `None` for one whom the system does not know.
    pub fn of(user: &User) -> Option<Self> {
        let name = CString::new(user.name.as_str()).ok()?;
        let groups = getgrouplist(&name, user.gid).ok()?;
        Some(Self {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
            groups: groups.into_iter().map(Gid::as_raw).collect(),
        })
    }

    /// Takes all ids and groups, for good. The kernel takes away every capability with them
    /// (capabilities(7), "Effect of user ID changes on capabilities"), but for the inheritable ones. It does
    /// neither allocate nor lock.
    ///
    /// # Errors
    /// Without CAP_SETUID and CAP_SETGID.
    pub fn take_over(&self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // SAFETY: a list of that length, of the type that a Gid is made of.
        Errno::result(unsafe { libc::setgroups(self.groups.len(), self.groups.as_ptr()) })?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        let none = [0u32; 6];
        const VERSION_3: u32 = 0x2008_0522;
        let header = [VERSION_3, 0];
        const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
        // SAFETY: header and sets have the layout of capset(2), version 3; the others have no pointers.
        unsafe {
            let call = libc::SYS_capset;
            Errno::result(libc::syscall(call, header.as_ptr(), none.as_ptr()))?;
            // Root's keys are not theirs (session-keyring(7)); without keyrings there are none.
            let join = KEYCTL_JOIN_SESSION_KEYRING;
            match Errno::result(libc::syscall(libc::SYS_keyctl, join, 0)) {
                Ok(_) | Err(Errno::ENOSYS) => {}
                Err(e) => return Err(e.into()),
            }
            // Else our files in /proc would be root's from now on.
            libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
        }
        Ok(())
    }
}
