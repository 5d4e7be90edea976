//! Fault injection for the tests: a named step at which attach or restore fails or is killed.
//!
//! Compiled in with the feature `faults`; without it [`hit`] does nothing. The environment variable `CKPT_FAULT`
//! holds `STEP` (fail there with [`Error::Injected`](crate::Error::Injected)), `STEP:kill` (SIGKILL to oneself),
//! `STEP:wait=FILE` (create FILE, then stop by SIGSTOP) or `STEP:hold=FILE` (create FILE, and continue when it is
//! removed; the first process of a pid namespace cannot stop itself).

use std::fmt;

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The steps.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            /// Every step, in the order of execution.
            pub const ALL: &'static [Step] = &[$(Step::$name,)*];

            /// Its name in `CKPT_FAULT`.
            pub const fn name(self) -> &'static str {
                match self { $(Step::$name => $text,)* }
            }
        }
    };
}

steps! {
    /// Some tasks seized, none interrupted.
    Seized = "seized",
    /// Every task stopped.
    Frozen = "frozen",
    /// The code cave is written, no task in it yet.
    CaveWritten = "cave-written",
    /// A task's registers point into the cave, its signals are not blocked yet.
    CaveEntered = "cave-entered",
    /// Between two remote calls.
    RemoteCall = "remote-call",
    /// The task's signal mask is restored, its registers are not.
    CaveLeaving = "cave-leaving",
    /// The process's state is captured, no page read yet.
    StateCaptured = "state-captured",
    /// Some pages are written.
    PagesHalf = "pages-half",
    /// Every page is read, tasks are about to be released.
    Release = "release",
    /// Some tasks released.
    ReleaseHalf = "release-half",
    /// Everything is written, nothing is synced.
    BeforeSync = "before-sync",
    /// Synced, not yet renamed.
    BeforeRename = "before-rename",
    /// Restore: the process exists and has not executed anything.
    RestoreSpawned = "restore-spawned",
    /// Restore: the address space is built, pages are missing.
    RestoreMapped = "restore-mapped",
    /// Restore: all pages are filled.
    RestoreFilled = "restore-filled",
    /// Restore: all threads exist.
    RestoreThreads = "restore-threads",
    /// Restore: registers are set, nothing is released.
    RestoreRelease = "restore-release",
    /// With `--kill` and `--stop`: the image is about to be checked.
    Check = "check",
    /// Rehearsal: the copy gets a signal mask different from the job's.
    RehearseMask = "rehearse-mask",
    /// Rehearsal: a page of the copy differs from the job's.
    RehearsePage = "rehearse-page",
    /// Rehearsal: the copy has been checkpointed, and still exists.
    Rehearsed = "rehearsed",
    /// A notification of a message queue is unregistered, and not registered again yet.
    Unregistered = "unregistered",
    /// Descriptors are passed by the process itself, whose table and umask are changed meanwhile.
    Lending = "lending",
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Marks a step; fails or is killed there when a test asked for it.
#[cfg(feature = "faults")]
pub fn hit(step: Step) -> crate::Result<()> {
    let Ok(wanted) = std::env::var("CKPT_FAULT") else {
        return Ok(());
    };
    let (name, action) = wanted.split_once(':').unwrap_or((&wanted, ""));
    if name != step.name() {
        return Ok(());
    }
    let me = nix::unistd::Pid::this();
    match action.split_once('=') {
        None if action == "kill" => {
            let _ = nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGKILL);
            Ok(())
        }
        Some(("wait", file)) => {
            let _ = std::fs::write(file, b"");
            let _ = nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGSTOP);
            Ok(())
        }
        Some(("hold", file)) => {
            let _ = std::fs::write(file, b"");
            while std::path::Path::new(file).exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Ok(())
        }
        _ => Err(crate::Error::Injected(step)),
    }
}

/// Marks a step; does nothing without the feature `faults`.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn hit(_step: Step) -> crate::Result<()> {
    Ok(())
}
