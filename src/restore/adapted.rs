//! A snapshot adapted to this machine and to the options: paths mapped, descriptors dropped, bundled files chosen, the vDSO
//! replaced. It is another type than the snapshot that was read, so that neither is taken for the other.

use std::ops::Deref;
use std::path::PathBuf;

use super::Request;
use super::adapt::{bundle, paths};
use super::decide::clock::{self, ClockPolicy};
use super::decide::pids;
use super::files::put;
use super::probed::Probed;
use crate::error::{Error, Obstacle, Result};
use crate::objects::clock::Clocks;
use crate::objects::files::left;
use crate::objects::findings::Findings;
use crate::objects::process_tree::{self, Creations};
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Snapshot, signals};

/// The adapted snapshot, and what is derived from it alone.
#[derive(Debug)]
pub(super) struct Adapted {
    snapshot: Snapshot,
    /// The vDSO code to be patched.
    pub(super) vdso: Replaced,
    /// Which process creates which.
    creations: Result<Vec<Creations>, Vec<Obstacle>>,
    /// Ids of all tasks, zombies and temporary helper processes, ascending.
    pub(super) ids: Vec<i32>,
    /// Paths of files that are taken from the image, since they are missing or different here.
    pub(super) given: Vec<PathBuf>,
}

impl Deref for Adapted {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl Adapted {
    /// Adapts a snapshot. Obstacles are added to `findings`.
    ///
    /// # Errors
    /// If this machine cannot be examined.
    pub(super) fn of(
        mut snapshot: Snapshot,
        request: &Request<'_>,
        findings: &mut Findings,
    ) -> Result<Self> {
        let mapped = paths::apply(&request.map_paths, &mut snapshot);
        findings.extend(mapped.err().into_iter().flatten());
        findings.extend(left::unknown_numbers(&snapshot, &request.drop));
        left::drop_from(&mut snapshot, &request.drop);
        put::forget(request.put_files, &mut snapshot);
        let vdso = vdso::adapt(&mut snapshot).map_err(Error::Refused);
        let vdso = findings.collect(vdso)?;
        let given = bundle::choose(&mut snapshot, request);
        let creations = process_tree::decide(&snapshot);
        let ids = pids::ids(&snapshot, creations.as_deref().unwrap_or_default());
        Ok(Self {
            snapshot,
            vdso,
            creations,
            ids,
            given,
        })
    }

    /// Which processes each process creates.
    ///
    /// # Errors
    /// Sessions and groups that cannot be recreated.
    pub(super) fn creations(&self) -> Result<&[Creations], &[Obstacle]> {
        self.creations.as_deref().map_err(Vec::as_slice)
    }

    /// Decides which clocks the job gets. If it gets the machine's, the snapshot's times are updated to them.
    ///
    /// # Errors
    /// [`Error::Refused`] if clocks would go back, or a required time namespace cannot be created.
    pub(super) fn decide_clocks(&mut self, policy: ClockPolicy, probed: &Probed) -> Result<Clocks> {
        clock::decide(policy, &mut self.snapshot.host, probed)
    }

    /// Edits the snapshot for a rehearsal, which does not change ids, sessions or groups.
    pub(super) fn edit<T>(&mut self, edit: impl FnOnce(&mut Snapshot) -> T) -> T {
        edit(&mut self.snapshot)
    }

    /// Clears the parent death signals of the root's threads that are not ignored. Returns whether there were any.
    pub(super) fn keep_from_parents_end(&mut self) -> bool {
        let root = &mut self.snapshot.processes[0];
        let actions = &root.actions;
        let threads = root.threads.iter_mut();
        let asked = threads.filter(|thread| {
            let signal = thread.parent_death_signal;
            signal != 0 && !signals::is_ignored(actions, signal)
        });
        asked.map(|thread| thread.parent_death_signal = 0).count() > 0
    }
}
