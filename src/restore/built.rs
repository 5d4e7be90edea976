//! A rebuilt job before its release.

use std::os::fd::OwnedFd;

use super::Restored;
use super::decided::Decided;
use super::files::put;
use super::ready::Undone;
use super::run::handover::{self, Complete};
use super::run::spawn::NewProcesses;
use crate::error::Result;
use crate::objects::files::inotify::Overflows;
use crate::supervise::foreground::JobTerminal;

/// All processes are rebuilt, and stopped. Dropping it kills them and undoes everything.
pub(super) struct Built<'d> {
    pub(super) decided: &'d Decided<'d>,
    /// Children before their parents.
    pub(super) complete: Vec<Complete>,
    pub(super) created: NewProcesses,
    pub(super) overflows: Overflows,
    pub(super) master: Option<OwnedFd>,
    pub(super) warnings: Vec<String>,
    pub(super) undone: Undone,
}

impl Built<'_> {
    /// Releases the job. `lend` is called before with the terminal state that the job needs, if it gets our terminal.
    ///
    /// # Errors
    /// If a file cannot be truncated or a task not be released; the job is killed.
    pub(super) fn release(self, lend: &mut dyn FnMut(Option<JobTerminal>)) -> Result<Restored> {
        let Decided {
            request,
            snapshot,
            job,
            cuts,
            ..
        } = self.decided;
        let root = &snapshot.processes[0];
        self.overflows.make()?;
        let ours = request.foreground && self.master.is_none() && root.session != root.pid;
        lend(ours.then(|| job.terminals.wanted(snapshot)));
        handover::release(self.complete, cuts)?;
        self.created.keep();
        let mut warnings = self.warnings;
        let nothing_put = put::warning(request.put_files, snapshot);
        warnings.extend(self.undone.keep(nothing_put));
        Ok(Restored {
            pid: root.pid,
            warnings,
            master: self.master,
        })
    }
}
