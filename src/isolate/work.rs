//! A process of a new pid namespace on its way to its work.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::unistd::geteuid;

use super::first::First;
use super::init;
use super::link::{Event, Link};

/// The process that rebuilds or starts the job: the namespace's first one, which reaps when that is
/// done, or the builder beside the `first`, which ends.
pub(super) fn work(mut link: Link, first: Option<First>, body: impl Body) -> ! {
    let beside = first.is_some();
    let name = if beside { c"ckpt-restore" } else { init::NAME };
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
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
    let done = mount_proc().and_then(|()| {
        catch_unwind(AssertUnwindSafe(|| body(&mut link, first)))
            .unwrap_or_else(|_| Err("the restore failed by a defect of ckpt".into()))
    });
    match done {
        Ok(_) if beside => leave(0),
        Ok(root) => init::reap(root, link),
        Err(text) => {
            let _ = link.tell(&Event::Failed(text));
            leave(1)
        }
    }
}

/// Answers the pid of the job's root, or what went wrong.
pub trait Body: FnOnce(&mut Link, Option<First>) -> Result<i32, String> {}

impl<F: FnOnce(&mut Link, Option<First>) -> Result<i32, String>> Body for F {}

/// mount(2) without data.
pub(crate) fn mount(
    what: &CStr,
    at: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: C strings that outlive the call, and no data.
    let r = unsafe { libc::mount(what.as_ptr(), at.as_ptr(), kind, flags, std::ptr::null()) };
    Ok(Errno::result(r).map(drop)?)
}

/// Whether the kernel kills us when our parent ends.
pub(crate) fn die_with_parent(yes: bool) {
    let signal = if yes { libc::SIGKILL } else { 0 };
    // SAFETY: a call without pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) };
}

/// An inherited "ignore" would make the kernel reap our children and keep their status.
pub(super) fn keep_exit_codes() {
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// `/proc` of this namespace.
fn mount_proc() -> Result<(), String> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(c"proc", c"/proc", Some(c"proc"), flags).map_err(|error| {
        format!(
            "cannot mount /proc in a pid namespace: {error}; a container whose own /proc is partly \
             hidden forbids that, restore outside of it"
        )
    })
}

/// Capabilities that an ordinary user has inside go through exec: they
/// become inheritable and ambient, since job processes create others under chosen pids.
pub(super) fn keep_capabilities() -> Result<(), Errno> {
    if geteuid().is_root() {
        return Ok(());
    }
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
pub(crate) fn leave(code: i32) -> ! {
    // SAFETY: a call without pointers.
    unsafe { libc::_exit(code) }
}
