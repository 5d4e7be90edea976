//! Prepares a process of a new pid namespace and runs its work.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ckpt_sys::credentials::{self, Capabilities};
use ckpt_sys::prctl::{self, die_with_parent};
use ckpt_sys::process::leave;
use ckpt_sys::{Errno, mounts};
use nix::unistd::geteuid;

use super::first::First;
use super::init;
use super::link::{Event, Link};

/// The process that rebuilds or starts the job: the namespace's first one, which reaps afterwards, or the building
/// process beside the `first`, which ends.
pub(super) fn work(link: Link, first: Option<First>, body: impl Body) -> ! {
    let beside = first.is_some();
    let name = if beside { c"ckpt-restore" } else { init::NAME };
    prctl::set_name(name);
    if link.wait().is_err() {
        leave(1);
    }
    // Until the job runs, it ends with the process outside.
    die_with_parent(true);
    keep_exit_codes();
    if link.is_ready() {
        // That process ended before.
        leave(1);
    }
    let done = mount_proc().and_then(|()| {
        catch_unwind(AssertUnwindSafe(|| body(&link, first)))
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

/// Returns the pid of the job's root, or an error.
pub trait Body: FnOnce(&Link, Option<First>) -> Result<i32, String> {}

impl<F: FnOnce(&Link, Option<First>) -> Result<i32, String>> Body for F {}

/// With an inherited SIG_IGN the kernel would reap our children and discard their status.
pub(super) fn keep_exit_codes() {
    let _ = ckpt_sys::signals::by_default(libc::SIGCHLD);
}

/// Mounts `/proc` of this namespace.
fn mount_proc() -> Result<(), String> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mounts::mount(c"proc", c"/proc", c"proc", flags).map_err(|errno| {
        let error = io::Error::from(errno);
        format!(
            "cannot mount /proc in a pid namespace: {error}; a container whose own /proc is partly \
             hidden forbids that, restore outside of it"
        )
    })
}

/// Makes the capabilities of an ordinary user inside inheritable and ambient, so that they survive exec: job
/// processes create others with chosen pids.
pub(super) fn keep_capabilities() -> Result<(), Errno> {
    if geteuid().is_root() {
        return Ok(());
    }
    let own = Capabilities::own()?;
    let inheritable = own.permitted;
    Capabilities { inheritable, ..own }.set()?;
    let mut all = (0..64).filter(|capability| inheritable & 1 << capability != 0);
    all.try_for_each(credentials::raise_ambient)
}
