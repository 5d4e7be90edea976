//! A restore for which everything is there that its processes are made from.

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

/// Files are back in their places, control groups and IPC objects exist, and what the root needs from us is open.
/// Dropped, all is as it was before.
pub(super) struct Ready<'d> {
    pub(super) decided: &'d Decided<'d>,
    /// What the root needs from us, and the numbers that it has there.
    descriptors: Vec<(OwnedFd, i32)>,
    /// inotify instances that are told of an overflow when nothing else is left to fail.
    overflows: Overflows,
    executable: File,
    /// The master of the job's terminal, when that is a new one.
    master: Option<OwnedFd>,
    /// What is not as it was, one sentence each.
    warnings: Vec<String>,
    undone: Undone,
}

/// What is undone unless it is kept, the last first.
pub(super) struct Undone {
    bound: sockets::Made,
    objects: ipc::Prepared,
    groups: settings::Made,
    put: put::Undo,
}

impl Undone {
    /// It stays; what is not as it was, one sentence each, among which `nothing_put` has its place.
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
    /// Makes it.
    ///
    /// # Errors
    /// Those of making; all is as it was before.
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
    /// Builds the processes up to where they are let go; with `first`, that one becomes the root.
    ///
    /// # Errors
    /// Those of building; no process is left behind, and all is as it was before.
    pub(super) fn build(self, first: Option<First>) -> Result<Built<'d>> {
        let Decided {
            job, image, clocks, ..
        } = self.decided;
        // Processes of the job that lose their parents become ours.
        ckpt_sys::prctl::adopt_orphans();
        let root = &self.decided.snapshot.processes[0];
        let (mut brood, leader) = spawn::spawn(
            root,
            &self.executable,
            self.descriptors,
            *clocks,
            (first, job.host.means),
        )?;
        let (complete, mut warnings) = driver::build(job, image, &mut brood, leader)?;
        warnings.extend(self.decided.placed.opened.findings.notes.iter().cloned());
        warnings.extend(self.warnings);
        Ok(Built {
            decided: self.decided,
            complete,
            brood,
            overflows: self.overflows,
            master: self.master,
            warnings,
            undone: self.undone,
        })
    }
}
