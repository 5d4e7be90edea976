//! `restore --any-owner`: root restores another user's image, as that user.
//!
//! ```text
//! restore (root): waits, passes signals on, tells the kernel which pid comes next
//!    └── restore (the owner, in a session of its own)
//!           └── the job
//! ```
//!
//! Whatever is in the image is done by a process that has the owner's ids and groups and no capability, and an
//! environment without anything of root's: so the kernel says what may be done, as if that user had typed it. What root
//! adds is to choose pids, by numbers alone ([`next_pid::serve`]). See `docs/privileges.md`.
#![allow(unsafe_code)]

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::{Uid, User};

use super::exit::{Failure, Outcome};
use super::run::{take_over_signals, wait, watch};
use crate::isolate::{Owner, die_with_parent};
use crate::restore::{ImageFile, next_pid};
use crate::supervise::{self, Child, NoTerminal};
use crate::text::Shown;

/// Tells the process that has become the owner which descriptors it was given: the image, and who chooses pids.
const HANDED: &str = "CKPT_RESTORE_AS_OWNER";

/// What the owner's environment has of root's: how to speak to whoever reads, and our own settings.
const KEPT: [&str; 8] = [
    "TERM", "LANG", "LANGUAGE", "TZ", "NO_COLOR", "LC_", "CKPT_", "DMTCP_",
];

/// The image that was opened by root for us, if that is what we are for.
///
/// # Errors
/// When what was handed over is not there.
pub(super) fn handed(path: &Path) -> Result<Option<ImageFile>, Failure> {
    let Ok(text) = env::var(HANDED) else {
        return Ok(None);
    };
    let numbers = text.split_once(' ');
    let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let handed = numbers.and_then(|(image, broker)| Some((own(image)?, own(broker)?)));
    let Some((image, broker)) = handed else {
        let text = format!("{HANDED} is set to {text}, and these are no descriptors: unset it");
        return Err(Failure::Message(text));
    };
    next_pid::ask_there(UnixStream::from(broker));
    Ok(Some(ImageFile::of(File::from(image), path)?))
}

/// Takes an inherited descriptor over.
fn own(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: it is open, and its number was handed to us, so that nothing else in this process has it.
    let fd = unsafe {
        let open = fd > 2 && libc::fcntl(fd, libc::F_GETFD) >= 0;
        open.then(|| OwnedFd::from_raw_fd(fd))
    }?;
    set_inherited(fd.as_raw_fd(), false).ok()?;
    Some(fd)
}

/// Has the owner of the image restore it; its exit code is ours.
///
/// # Errors
/// When the owner is not known here, or the process cannot be created.
pub(super) fn run(image: ImageFile) -> Outcome {
    let uid = image.owner();
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let found = user.and_then(|user| Some((Owner::of(&user)?, user)));
    let Some((owner, user)) = found else {
        return Err(Failure::Message(format!(
            "the image {} belongs to uid {uid}, whom this system does not know, so that nobody can tell the groups \
             of that user; restore it as that user, for instance by setpriv --reuid {uid} --regid GID --clear-groups",
            image.path().shown()
        )));
    };
    let signals = take_over_signals()?;
    let (broker, theirs) = UnixStream::pair().map_err(cannot)?;
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(arguments.next().unwrap_or_else(|| "restore".into()))
        .args(arguments)
        .env_clear()
        .envs(environment(&user))
        .env(
            HANDED,
            format!("{} {}", image.as_fd().as_raw_fd(), theirs.as_raw_fd()),
        );
    let handed = [image.as_fd().as_raw_fd(), theirs.as_raw_fd()];
    let become_owner = move || {
        let own = std::os::unix::process::parent_id();
        begin_anew();
        owner.take_over()?;
        leave_descriptors(handed)?;
        die_with_parent(true);
        // It may have ended before.
        match std::os::unix::process::parent_id() == own {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    };
    // SAFETY: we have one thread, so that the closure may do what it likes.
    unsafe { command.pre_exec(become_owner) };
    let pid = supervise::start(command, &signals, false, None).map_err(cannot)?;
    drop((image, theirs));
    std::thread::spawn(|| next_pid::serve(broker));
    wait(
        &mut Child(pid),
        &signals,
        None,
        &mut NoTerminal,
        &mut watch(None),
    )
}

fn cannot(error: io::Error) -> Failure {
    Failure::Message(format!("cannot restore as the owner of the image: {error}"))
}

fn environment(user: &User) -> Vec<(OsString, OsString)> {
    let kept = |name: &OsString| {
        let name = name.to_string_lossy();
        let is = |kept: &&str| match kept.ends_with('_') {
            true => name.starts_with(*kept),
            false => name == **kept,
        };
        KEPT.iter().any(is)
    };
    let mut all: Vec<(OsString, OsString)> =
        env::vars_os().filter(|(name, _)| kept(name)).collect();
    all.extend([
        ("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into()),
        ("HOME".into(), user.dir.clone().into()),
        ("SHELL".into(), user.shell.clone().into()),
        ("USER".into(), user.name.clone().into()),
        ("LOGNAME".into(), user.name.clone().into()),
    ]);
    all
}

/// What a process inherits and only root may have: priorities, protection from the OOM killer, securebits; and the
/// session, from whose terminal root may be read.
fn begin_anew() {
    let other = libc::sched_param { sched_priority: 0 };
    const IOPRIO_WHO_PROCESS: i64 = 1;
    // SAFETY: calls on values and on a live structure.
    unsafe {
        libc::setsid();
        libc::umask(0o022);
        libc::prctl(libc::PR_SET_SECUREBITS, 0, 0, 0, 0);
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &other);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0);
        if libc::getpriority(libc::PRIO_PROCESS, 0) < 0 {
            libc::setpriority(libc::PRIO_PROCESS, 0, 0);
        }
    }
    let file = "/proc/self/oom_score_adj";
    if fs::read_to_string(file).is_ok_and(|score| score.starts_with('-')) {
        let _ = fs::write(file, "0");
    }
}

/// Nothing of root's that is open goes on, but for standard streams and what is handed over.
fn leave_descriptors(handed: [RawFd; 2]) -> io::Result<()> {
    // SAFETY: a call without pointers.
    let all = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    Errno::result(all)?;
    handed
        .into_iter()
        .try_for_each(|fd| set_inherited(fd, true))
}

fn set_inherited(fd: RawFd, inherited: bool) -> io::Result<()> {
    let flags = if inherited { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: a call without pointers.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, flags) };
    Ok(Errno::result(set).map(drop)?)
}
