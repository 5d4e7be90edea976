//! `restore --any-owner`: root restores another user's image, as that user.
//!
//! ```text
//! restore (root): waits, passes signals on, chooses the next pid
//!    └── restore (the owner, in a session of its own)
//!           └── the job
//! ```
//!
//! Everything in the image is executed by a process with the owner's ids and groups, without capabilities, and
//! without root's environment: so the kernel decides what is permitted, as if that user had typed the command. Root
//! only chooses pids, which are numbers ([`next_pid::serve`]). See `docs/privileges.md`.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use ckpt_sys::files::{self, inherited};
use ckpt_sys::prctl::die_with_parent;
use ckpt_sys::process::before_exec;
use ckpt_sys::{credentials, tasks};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Uid, User, setsid};

use super::exit::{Failure, Outcome};
use super::run::{take_over_signals, wait, watch};
use crate::isolate::Owner;
use crate::restore::{ImageFile, next_pid};
use crate::supervise::{self, Child, NoTerminal};
use crate::text::Shown;

/// Tells the process that has become the owner the numbers of its descriptors: the image, and the channel for
/// choosing pids.
const HANDED: &str = "CKPT_RESTORE_AS_OWNER";

/// Variables of root's environment that the owner gets: locale, and our own settings.
const KEPT: [&str; 8] = [
    "TERM", "LANG", "LANGUAGE", "TZ", "NO_COLOR", "LC_", "CKPT_", "DMTCP_",
];

/// The image that root opened for us, if we are that process.
///
/// # Errors
/// When the descriptors are not valid.
pub(super) fn handed(path: &Path) -> Result<Option<ImageFile>, Failure> {
    let Ok(text) = env::var(HANDED) else {
        return Ok(None);
    };
    let numbers = text.split_once(' ');
    let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let handed = numbers.and_then(|(image, broker)| Some((inherited(image)?, inherited(broker)?)));
    let Some((image, broker)) = handed else {
        let text = format!("{HANDED} is set to {text}, which is no list of descriptors: unset it");
        return Err(Failure::Message(text));
    };
    next_pid::ask_there(UnixStream::from(broker));
    Ok(Some(ImageFile::of(File::from(image), path)?))
}

/// Makes the owner of the image restore it; returns its exit code.
///
/// # Errors
/// When the owner is unknown here, or the process cannot be created.
pub(super) fn run(image: ImageFile) -> Outcome {
    let uid = image.owner();
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let found = user.and_then(|user| Some((Owner::of(&user)?, user)));
    let Some((owner, user)) = found else {
        return Err(Failure::Message(format!(
            "the image {} belongs to uid {uid}, which is not in this system's user database, so the groups \
             of that user are unknown; restore it as that user, for instance by setpriv --reuid {uid} \
             --regid GID --clear-groups",
            image.path().shown()
        )));
    };
    let signals = take_over_signals()?;
    let (broker, theirs) = UnixStream::pair().map_err(cannot)?;
    // Duplicates without close-on-exec.
    let handed = [image.as_fd(), theirs.as_fd()].map(|fd| fd.try_clone_to_owned());
    let [image_there, broker_there] = handed;
    let handed = [image_there.map_err(cannot)?, broker_there.map_err(cannot)?];
    let [image_there, broker_there] = handed.each_ref().map(AsRawFd::as_raw_fd);
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(arguments.next().unwrap_or_else(|| "restore".into()))
        .args(arguments)
        .env_clear()
        .envs(environment(&user))
        .env(HANDED, format!("{image_there} {broker_there}"));
    let become_owner = move || {
        let own = std::os::unix::process::parent_id();
        begin_anew();
        owner.take_over()?;
        leave_descriptors(&handed)?;
        die_with_parent(true);
        // The parent may have ended before.
        match std::os::unix::process::parent_id() == own {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    };
    // We are single-threaded, so the function may do anything.
    before_exec(&mut command, become_owner);
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

/// Resets what a process inherits and only root may have: priorities, OOM score, securebits; and the session, through
/// whose terminal root's input could be read.
fn begin_anew() {
    let _ = setsid();
    umask(Mode::from_bits_truncate(0o022));
    let _ = credentials::set_securebits(0);
    tasks::become_ordinary();
    let _ = tasks::set_io_priority(0);
    let file = "/proc/self/oom_score_adj";
    if fs::read_to_string(file).is_ok_and(|score| score.starts_with('-')) {
        let _ = fs::write(file, "0");
    }
}

/// Closes everything of root's but standard streams and the passed descriptors.
fn leave_descriptors(handed: &[OwnedFd]) -> io::Result<()> {
    files::close_on_exec_from(3)?;
    let mut handed = handed.iter();
    Ok(handed.try_for_each(|fd| files::set_close_on_exec(fd, false))?)
}
