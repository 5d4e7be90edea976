//! A restored job before it is let go.

use std::os::fd::OwnedFd;

use super::Restored;
use super::decided::Decided;
use super::files::put;
use super::ready::Undone;
use super::run::handover::{self, Complete};
use super::run::spawn::Brood;
use crate::error::Result;
use crate::objects::files::inotify::Overflows;
use crate::supervise::foreground::JobTerminal;

/// All processes are as they were, and stopped. Dropped, they are killed, and all is as it was before.
pub(super) struct Built<'d> {
    pub(super) decided: &'d Decided<'d>,
    /// Children before their parents.
    pub(super) complete: Vec<Complete>,
    pub(super) brood: Brood,
    pub(super) overflows: Overflows,
    pub(super) master: Option<OwnedFd>,
    pub(super) warnings: Vec<String>,
    pub(super) undone: Undone,
}

impl Built<'_> {
    /// Lets the job go; `lend` is told before what it wants of our terminal, if it shall have it.
    ///
    /// # Errors
    /// Where a file cannot be cut or a task not be let go.
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
        self.brood.keep();
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
