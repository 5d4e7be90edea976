//! A snapshot as a restore here has it, which is another type than the one that was read: its paths lead
//! to where they lead now, its descriptors and files are those that the user wants, and its vDSO is this kernel's.

use std::ops::Deref;
use std::path::PathBuf;

use super::Request;
use super::adapt::{bundle, paths};
use super::decide::clock::{self, ClockPolicy};
use super::decide::pids;
use super::files::put;
use super::probed::Probed;
use crate::error::{Error, Obstacle, Result};
use crate::objects::births::{self, Births};
use crate::objects::clock::Clocks;
use crate::objects::files::left;
use crate::objects::findings::Findings;
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Snapshot, signals};

/// The snapshot, and what follows from it alone.
#[derive(Debug)]
pub(super) struct Adapted {
    snapshot: Snapshot,
    /// What becomes of its vDSO.
    pub(super) vdso: Replaced,
    /// Who creates whom.
    births: Result<Vec<Births>, Vec<Obstacle>>,
    /// All ids that the job has, and those of processes that help for a while; ascending.
    pub(super) ids: Vec<i32>,
    /// Bundled files that are not as they were here.
    pub(super) given: Vec<PathBuf>,
}

impl Deref for Adapted {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl Adapted {
    /// Adapts a snapshot. What stands in the way of it is added to `findings`.
    ///
    /// # Errors
    /// Those of looking at this machine.
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
        let births = births::decide(&snapshot);
        let ids = pids::ids(&snapshot, births.as_deref().unwrap_or_default());
        Ok(Self {
            snapshot,
            vdso,
            births,
            ids,
            given,
        })
    }

    /// What each process creates.
    ///
    /// # Errors
    /// What the kernel has no way to make again.
    pub(super) fn births(&self) -> Result<&[Births], &[Obstacle]> {
        self.births.as_deref().map_err(Vec::as_slice)
    }

    /// Decides which clocks the job gets; where they are the machine's, the snapshot says so from then on.
    ///
    /// # Errors
    /// [`Error::Refused`] where they would go back, or cannot be made.
    pub(super) fn decide_clocks(&mut self, policy: ClockPolicy, probed: &Probed) -> Result<Clocks> {
        clock::decide(policy, &mut self.snapshot.host, probed)
    }

    /// What is not to be as it was in a rehearsal, which leaves ids, sessions and groups alone.
    pub(super) fn edit<T>(&mut self, edit: impl FnOnce(&mut Snapshot) -> T) -> T {
        edit(&mut self.snapshot)
    }

    /// No process of the first one's threads is told of its parent's end by a signal that it does not ignore; whether
    /// one would have been.
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
