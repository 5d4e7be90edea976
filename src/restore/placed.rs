//! The decision whether a job is restored in our pid namespace or in a new one.

use std::borrow::Cow;

use ckpt_tracer::Pid;

use super::adapted::Adapted;
use super::decide::pids;
use super::opened::Opened;
use super::probed::Probed;
use super::{Looked, Pids, Place};
use crate::error::{Obstacle, Result};
use crate::isolate::{First, Owner, Spec};
use crate::objects::findings::Findings;
use crate::objects::plan::PidMethod;
use crate::objects::{Snapshot, credentials};

/// A job whose pid namespace is decided. The process that restores it there calls
/// [`restored_here`](Self::restored_here) or [`restored_inside`](Self::restored_inside) first.
pub struct Placed<'a> {
    pub(super) opened: Opened<'a>,
    place: Place,
    /// How ids are chosen in our pid namespace.
    pub(super) pid_method: PidMethod,
    /// Ids in use in the pid namespace of the job, if they have been looked up.
    pub(super) taken: Option<Vec<Obstacle>>,
    /// Obstacles to either pid namespace, found for a look.
    pub(super) against: Findings,
    /// Supplementary groups of the restoring process outside of a user namespace, which the kernel does not show inside.
    pub(super) groups: Vec<u32>,
    /// Supplementary groups of new processes in the namespaces of the job.
    pub(super) groups_there: Vec<u32>,
    /// We are in the namespaces of the job.
    pub(super) inside: bool,
    /// The first process of our pid namespace, if it becomes the root of the job.
    pub(super) first: Option<First>,
}

impl<'a> Placed<'a> {
    pub(super) fn at(opened: Opened<'a>, place: Place) -> Self {
        let groups = opened.probed.ours.groups.clone();
        Self {
            pid_method: pids::pid_method(&opened.snapshot, &opened.probed),
            opened,
            place,
            taken: None,
            against: Findings::default(),
            groups_there: groups.clone(),
            groups,
            inside: false,
            first: None,
        }
    }

    pub(super) fn of(opened: Opened<'a>, wanted: Pids) -> Result<Self> {
        let mut placed = Self::at(opened, Place::Here);
        (placed.place, placed.taken) = pids::decide(&placed, wanted)?;
        Ok(placed)
    }

    pub(super) fn for_a_look(opened: Opened<'a>) -> Result<Self> {
        let mut placed = Self::at(opened, Place::Here);
        let mut against = Findings::default();
        let decided = pids::decide(&placed, Pids::Auto).map(Some);
        if let Some((place, taken)) = against.collect(decided)? {
            (placed.place, placed.taken) = (place, taken);
            match placed.place {
                Place::Here => against.extend(pids::in_the_way(&placed, false)),
                Place::Namespace(_) => {
                    against.collect(placed.namespaces().map(drop))?;
                }
            }
        }
        placed.against = against;
        Ok(placed)
    }

    /// The decision.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The namespaces to be created. From then on the restoring process is the owner they name, if any.
    ///
    /// # Errors
    /// If the user namespace cannot be recreated.
    pub fn namespaces(&mut self) -> Result<Spec> {
        let spec = pids::namespaces(self)?;
        if let Some(Owner { groups, .. }) = &spec.owner {
            self.groups = groups.clone();
            self.groups_there = groups.clone();
        }
        Ok(spec)
    }

    /// Supplementary groups of the restoring process.
    pub fn groups_of_the_job(&self) -> &[u32] {
        &self.groups
    }

    /// The calling process restores the job. With `--detach` it exits once the job runs. The root must not get the
    /// signal that it asked for at the end of its parent (`PR_SET_PDEATHSIG`), which would usually kill it.
    pub fn restored_here(&mut self) {
        let opened = &mut self.opened;
        if !opened.request.foreground && opened.snapshot.keep_from_parents_end() {
            opened.findings.notes.push(format!(
                "process {} asked for a signal at the end of its parent and gets none: its parent is restore, \
                 which ends before it",
                opened.snapshot.processes[0].pid
            ));
        }
    }

    /// The calling process is in the new namespaces, where permissions and used ids differ, and restores the job there. With
    /// `first`, that process becomes the root.
    ///
    /// # Errors
    /// If the ids of our helpers cannot be kept apart from those of the job.
    pub fn restored_inside(&mut self, first: Option<First>) -> Result<()> {
        let probed = Probed::here()?;
        self.pid_method = pids::pid_method(&self.opened.snapshot, &probed);
        self.taken = None;
        self.first = first;
        self.inside = true;
        if credentials::groups_can_be_set() {
            self.groups_there = probed.ours.groups.clone();
        }
        self.opened.probed = Cow::Owned(probed);
        pids::keep_clear(self)
    }

    /// Edits the snapshot for a rehearsal, which does not change ids, sessions or groups.
    pub(crate) fn edit<T>(&mut self, edit: impl FnOnce(&mut Snapshot) -> T) -> T {
        self.opened.snapshot.edit(edit)
    }

    /// Makes all remaining decisions, for `check` and `--dry-run`.
    ///
    /// # Errors
    /// If this machine cannot be examined.
    pub fn look(&mut self) -> Result<Looked<'_>> {
        Looked::at(self)
    }

    pub(super) fn snapshot(&self) -> &Adapted {
        &self.opened.snapshot
    }

    pub(super) fn probed(&self) -> &Probed {
        &self.opened.probed
    }

    /// Processes of our pid namespace whose ids count as free.
    pub(super) fn leaving(&self) -> &'a [Pid] {
        match self.inside {
            true => &[],
            false => &self.opened.request.objects.leaving,
        }
    }
}
