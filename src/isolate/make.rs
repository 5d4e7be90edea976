//! The making of the namespaces, see unshare(2), user_namespaces(7), pid_namespaces(7).
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ckpt_tracer::capabilities::{Held, Use};
use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, getegid, geteuid};

use super::init;
use super::link::{Event, Link};
use super::outside::Init;
use crate::error::{Error, Result};

/// How ids inside a user namespace lead to those outside: (inside, outside, how many).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    /// `/proc/PID/uid_map`.
    pub uids: Vec<(u32, u32, u32)>,
    /// `/proc/PID/gid_map`.
    pub gids: Vec<(u32, u32, u32)>,
}

/// Somebody whom root becomes before anything is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What is made: a pid namespace, with a mount namespace whose `/proc` fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// All in a user namespace, with these ids.
    pub ids: Option<IdMaps>,
    /// Who makes and has it, if not we.
    pub owner: Option<Owner>,
}

impl Spec {
    /// For whoever we are: the user remains the user.
    pub fn own() -> Self {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let ids = IdMaps {
            uids: vec![(uid, uid, 1)],
            gids: vec![(gid, gid, 1)],
        };
        Self {
            ids: (!may_without_user_namespace()).then_some(ids),
            owner: None,
        }
    }
}

/// Makes the namespaces; `body` is the work of the first process. It answers the pid of the job's
/// root, a child of its own, or what went wrong.
///
/// To be called while this process has one thread.
///
/// # Errors
/// When the namespaces cannot be made. Nothing is left of them.
pub fn start(spec: &Spec, body: impl FnOnce(&mut Link) -> Result<i32, String>) -> Result<Init> {
    // The first process becomes ours when the one in the middle ends.
    crate::supervise::adopt_orphans();
    let (mut link, inner) = Link::pair().map_err(cannot("prepare"))?;
    // SAFETY: we have one thread, so that the child has all of us.
    let middle = match unsafe { fork() }.map_err(|e| cannot("prepare")(e.into()))? {
        ForkResult::Child => {
            drop(link);
            in_the_middle(spec, inner, body)
        }
        ForkResult::Parent { child } => {
            drop(inner);
            child
        }
    };
    let born = arrange(&mut link, spec.ids.as_ref(), middle.as_raw());
    // Without the link, those who wait for us end.
    let link = born.is_ok().then_some(link);
    let _ = waitpid(middle, None);
    let (pid, mut link) = (born?, link.ok_or_else(lost)?);
    link.go().map_err(|_| lost())?;
    Ok(Init::new(pid, link))
}

/// Whether we may make a pid namespace without a user namespace around it. Other users than root
/// have capabilities only until the next exec, so that they are better off with one.
fn may_without_user_namespace() -> bool {
    geteuid().is_root() && Held::now().allows(Use::PidNamespace)
}

fn cannot(what: &str) -> impl Fn(io::Error) -> Error {
    let text = format!("cannot {what} a pid namespace");
    move |error| Error::Restore(format!("{text}: {error}"))
}

fn lost() -> Error {
    cannot("make")(io::Error::other("the process that makes it was killed"))
}

/// The outer part of the making: the ids are mapped from here, where there is a right to it.
fn arrange(link: &mut Link, ids: Option<&IdMaps>, middle: i32) -> Result<i32> {
    match link.hear().map_err(|_| lost())? {
        Event::Made => {}
        Event::Failed(text) => return Err(Error::Restore(text)),
        _ => return Err(lost()),
    }
    if let Some(ids) = ids {
        map_ids(ids, middle).map_err(cannot("map ids in"))?;
    }
    link.go().map_err(|_| lost())?;
    match link.hear().map_err(|_| lost())? {
        Event::Born(pid) => Ok(pid),
        Event::Failed(text) => Err(Error::Restore(text)),
        _ => Err(lost()),
    }
}

/// An ordinary user may map one id, their own, and only after giving up setgroups(2).
fn map_ids(ids: &IdMaps, pid: i32) -> io::Result<()> {
    let lines = |map: &[(u32, u32, u32)]| -> String {
        let lines = map.iter().map(|(i, o, n)| format!("{i} {o} {n}\n"));
        lines.collect()
    };
    std::fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    std::fs::write(format!("/proc/{pid}/uid_map"), lines(&ids.uids))?;
    std::fs::write(format!("/proc/{pid}/gid_map"), lines(&ids.gids))
}

/// A process of its own makes the namespaces, since only its children are in the new pid namespace
/// and it would itself stay in the new user namespace.
fn in_the_middle(
    spec: &Spec,
    mut link: Link,
    body: impl FnOnce(&mut Link) -> Result<i32, String>,
) -> ! {
    let user = spec.ids.is_some();
    let made = spec.owner.as_ref().map_or(Ok(()), become_owner);
    let made = made.and_then(|()| make(user)).and_then(|()| {
        link.tell(&Event::Made)?;
        link.wait()?;
        // SAFETY: we have one thread.
        Ok(unsafe { fork() }?)
    });
    match made {
        Ok(ForkResult::Child) => first(link, body),
        Ok(ForkResult::Parent { child }) => {
            let _ = link.tell(&Event::Born(child.as_raw()));
            leave(0)
        }
        Err(error) => {
            let text = format!("cannot make a {} namespace: {error}", kinds(user));
            let _ = link.tell(&Event::Failed(text));
            leave(1)
        }
    }
}

/// Nothing of root's is left: that is not only the ids but what they would give a right to.
fn become_owner(owner: &Owner) -> io::Result<()> {
    // SAFETY: calls on values and on a live list of that length.
    unsafe {
        Errno::result(libc::setgroups(owner.groups.len(), owner.groups.as_ptr()))?;
        Errno::result(libc::setresgid(owner.gid, owner.gid, owner.gid))?;
        Errno::result(libc::setresuid(owner.uid, owner.uid, owner.uid))?;
        // Root's keys are not theirs (session-keyring(7)); without keyrings there are none.
        const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
        match Errno::result(libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            0,
        )) {
            Ok(_) | Err(Errno::ENOSYS) => {}
            Err(e) => return Err(e.into()),
        }
        // Else our files in /proc would be root's from now on.
        libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
    }
    Ok(())
}

fn kinds(user: bool) -> &'static str {
    if user { "user and pid" } else { "pid" }
}

fn make(user: bool) -> io::Result<()> {
    let user = if user { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: calls with constants.
    unsafe {
        Errno::result(libc::unshare(user | libc::CLONE_NEWPID | libc::CLONE_NEWNS))?;
    }
    // What is mounted outside later is seen inside, and not the other way round.
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_SLAVE)
}

fn mount(what: &CStr, at: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> io::Result<()> {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: C strings that outlive the call, and no data.
    let r = unsafe { libc::mount(what.as_ptr(), at.as_ptr(), kind, flags, std::ptr::null()) };
    Ok(Errno::result(r).map(drop)?)
}

/// The first process of the namespace.
fn first(mut link: Link, body: impl FnOnce(&mut Link) -> Result<i32, String>) -> ! {
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, init::NAME.as_ptr()) };
    if link.wait().is_err() {
        leave(1);
    }
    // Until the job runs, the end of whoever wants it is its end.
    die_with_parent(true);
    keep_exit_codes();
    if link.is_ready() {
        // It died before.
        leave(1);
    }
    let done = settle_in().and_then(|()| {
        catch_unwind(AssertUnwindSafe(|| body(&mut link)))
            .unwrap_or_else(|_| Err("the restore failed by a defect of ckpt".into()))
    });
    match done {
        Ok(root) => init::reap(root, link),
        Err(text) => {
            let _ = link.tell(&Event::Failed(text));
            leave(1)
        }
    }
}

/// Whether the kernel kills us when our parent ends.
pub(super) fn die_with_parent(yes: bool) {
    let signal = if yes { libc::SIGKILL } else { 0 };
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) };
}

/// An inherited "ignore" would make the kernel reap our children and keep their status.
pub(super) fn keep_exit_codes() {
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// `/proc` of this namespace; and capabilities that an ordinary user has inside go through exec.
fn settle_in() -> Result<(), String> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(c"proc", c"/proc", Some(c"proc"), flags).map_err(|error| {
        format!(
            "cannot mount /proc in a pid namespace: {error}; a container whose own /proc is partly \
             hidden forbids that, restore outside of it"
        )
    })?;
    if !geteuid().is_root() {
        keep_capabilities().map_err(|e| format!("cannot keep capabilities: {}", e.desc()))?;
    }
    Ok(())
}

/// All permitted capabilities become inheritable and ambient: job processes create others under
/// chosen pids, after an exec.
fn keep_capabilities() -> Result<(), Errno> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    // effective, permitted, inheritable; twice 32 bits.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: header and sets have the layout of capget(2), version 3.
    unsafe {
        Errno::result(libc::syscall(
            libc::SYS_capget,
            header.as_ptr(),
            sets.as_mut_ptr(),
        ))?;
        for half in &mut sets {
            half[2] = half[1];
        }
        Errno::result(libc::syscall(
            libc::SYS_capset,
            header.as_ptr(),
            sets.as_ptr(),
        ))?;
        for cap in 0..64 {
            if sets[cap / 32][1] & 1 << (cap % 32) != 0 {
                let raise = libc::PR_CAP_AMBIENT_RAISE;
                Errno::result(libc::prctl(libc::PR_CAP_AMBIENT, raise, cap, 0, 0))?;
            }
        }
    }
    Ok(())
}

/// Ends this process without what its parent has to do at its end.
pub(super) fn leave(code: i32) -> ! {
    // SAFETY: a call without pointers.
    unsafe { libc::_exit(code) }
}
