//! Where a job has its pids, and who does the work there.

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
use crate::objects::plan::Means;
use crate::objects::{Snapshot, credentials};

/// A job of which is known where its pids will be. The work is done here or in a namespace, by a process
/// there, which is told by [`restored_here`](Self::restored_here) or [`restored_inside`](Self::restored_inside).
pub struct Placed<'a> {
    pub(super) opened: Opened<'a>,
    place: Place,
    /// How tasks come by their ids where we are.
    pub(super) means: Means,
    /// Which ids are taken where the work is done, as far as that was looked at.
    pub(super) taken: Option<Vec<Obstacle>>,
    /// What stands in the way of a place.
    pub(super) against: Findings,
    /// Supplementary groups of whoever does the work, outside of a user namespace, which the kernel does not show inside.
    pub(super) groups: Vec<u32>,
    /// Those that a process of ours has where the work is done.
    pub(super) groups_there: Vec<u32>,
    /// The namespaces are made, and we are in them.
    pub(super) inside: bool,
    /// The first process of our namespace, if the job begins with it.
    pub(super) first: Option<First>,
}

impl<'a> Placed<'a> {
    pub(super) fn at(opened: Opened<'a>, place: Place) -> Self {
        let groups = opened.probed.ours.groups.clone();
        Self {
            means: pids::means(&opened.snapshot, &opened.probed),
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

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What has to be made for the job's namespaces. From then on the work is done by who that says.
    ///
    /// # Errors
    /// A user namespace that cannot be made again.
    pub fn namespaces(&mut self) -> Result<Spec> {
        let spec = pids::namespaces(self)?;
        if let Some(Owner { groups, .. }) = &spec.owner {
            self.groups = groups.clone();
            self.groups_there = groups.clone();
        }
        Ok(spec)
    }

    /// Supplementary groups of whoever does the work.
    pub fn groups_of_the_job(&self) -> &[u32] {
        &self.groups
    }

    /// The work is done by us. With `--detach` the job's parent ends when the job runs. That is not to come to its
    /// first process as the signal that it asked for (`PR_SET_PDEATHSIG`), which would be the end of most; one
    /// that is ignored may.
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

    /// The work is done in a namespace, where we are now, and where other things are permitted and other ids are taken; with
    /// `first`, that one becomes the job's root.
    ///
    /// # Errors
    /// When the kernel gives ids of the job's to our helpers.
    pub fn restored_inside(&mut self, first: Option<First>) -> Result<()> {
        let probed = Probed::here()?;
        self.means = pids::means(&self.opened.snapshot, &probed);
        self.taken = None;
        self.first = first;
        self.inside = true;
        if credentials::groups_can_be_set() {
            self.groups_there = probed.ours.groups.clone();
        }
        self.opened.probed = Cow::Owned(probed);
        pids::keep_clear(self)
    }

    /// What is restored: a rehearsal has it otherwise than it was, but for ids, sessions and groups.
    pub(crate) fn edit<T>(&mut self, edit: impl FnOnce(&mut Snapshot) -> T) -> T {
        self.opened.snapshot.edit(edit)
    }

    /// Decides all that is left, to say what stands in the way, and what would be done.
    ///
    /// # Errors
    /// Those of looking.
    pub fn look(&mut self) -> Result<Looked<'_>> {
        Looked::at(self)
    }

    pub(super) fn snapshot(&self) -> &Adapted {
        &self.opened.snapshot
    }

    pub(super) fn probed(&self) -> &Probed {
        &self.opened.probed
    }

    /// Processes whose ids will be free, outside of the namespaces.
    pub(super) fn leaving(&self) -> &'a [Pid] {
        match self.inside {
            true => &[],
            false => &self.opened.request.objects.leaving,
        }
    }
}
