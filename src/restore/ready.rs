//! A restore whose files, IPC objects and descriptors exist.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::built::Built;
use super::decided::Decided;
use super::files::{contents, pty, put};
use super::run::{driver, spawn};
use crate::error::Result;
use crate::isolate::First;
use crate::objects::cgroup::settings;
use crate::objects::files::inotify::Overflows;
use crate::objects::{ipc, sockets};

/// Files are put back, control groups and IPC objects created, and inherited descriptors open. Dropping it undoes all of
/// that.
pub(super) struct Ready<'d> {
    pub(super) decided: &'d Decided<'d>,
    /// Descriptors that the root inherits, with their numbers there.
    descriptors: Vec<(OwnedFd, i32)>,
    /// Queues of inotify instances, to be overflowed as a last step.
    overflows: Overflows,
    executable: File,
    /// Master of the job's terminal, if that is a new pty.
    master: Option<OwnedFd>,
    /// Warnings: what could not be restored exactly, one sentence each.
    warnings: Vec<String>,
    undone: Undone,
}

/// Changes that are undone unless kept, in reverse order of creation.
pub(super) struct Undone {
    bound: sockets::Made,
    objects: ipc::Prepared,
    groups: settings::Made,
    put: put::Undo,
}

impl Undone {
    /// Keeps the changes. Returns warnings, `nothing_put` among them.
    pub(super) fn keep(self, nothing_put: Option<String>) -> Vec<String> {
        self.bound.keep();
        let mut warnings = self.objects.keep();
        warnings.extend(nothing_put);
        warnings.extend(self.put.keep());
        warnings.extend(self.groups.keep());
        warnings
    }
}

impl<'p> Decided<'p> {
    /// Puts files back, creates control groups and IPC objects, and opens what the root inherits.
    ///
    /// # Errors
    /// If any of that fails; it is undone.
    pub(super) fn make_ready(&self) -> Result<Ready<'_>> {
        let (request, image, snapshot) = (self.request, self.image, self.snapshot);
        let rights = self.job.host.rights.as_ref();
        let put = put::put(&self.puts, image, rights)?;
        let groups = settings::make(snapshot, &request.cgroups)?;
        let objects = ipc::Prepared::new(snapshot, image, &request.objects)?;
        let ptys = pty::Ptys::make(snapshot, &self.job.terminals)?;
        let by = (rights, request.objects.files);
        let opened = contents::open_all(&self.inherit, snapshot, image, &ptys, by)?;
        let (descriptors, incomplete) = opened;
        let overflows = Overflows::of(&self.inherit, &descriptors, snapshot)?;
        let mut warnings = ptys.warnings.clone();
        warnings.extend(incomplete);
        let master = ptys.finish(snapshot)?;
        let executable = snapshot.processes[0].memory.executable;
        let executable = contents::executable(executable, snapshot, image, by)?;
        let bound = sockets::Made::before(snapshot, rights);
        Ok(Ready {
            decided: self,
            descriptors,
            overflows,
            executable,
            master,
            warnings,
            undone: Undone {
                bound,
                objects,
                groups,
                put,
            },
        })
    }
}

impl<'d> Ready<'d> {
    /// Creates and rebuilds all processes, which stay stopped. With `first`, that process becomes the root.
    ///
    /// # Errors
    /// If that fails; the processes are killed, and everything is undone.
    pub(super) fn build(self, first: Option<First>) -> Result<Built<'d>> {
        let Decided {
            job, image, clocks, ..
        } = self.decided;
        // Orphaned processes of the job are reparented to us.
        ckpt_sys::prctl::adopt_orphans();
        let root = &self.decided.snapshot.processes[0];
        let (mut created, leader) = spawn::spawn(
            root,
            &self.executable,
            self.descriptors,
            *clocks,
            (first, job.host.pid_method),
        )?;
        let (complete, mut warnings) = driver::build(job, image, &mut created, leader)?;
        warnings.extend(self.decided.placed.opened.findings.notes.iter().cloned());
        warnings.extend(self.warnings);
        Ok(Built {
            decided: self.decided,
            complete,
            created,
            overflows: self.overflows,
            master: self.master,
            warnings,
            undone: self.undone,
        })
    }
}
