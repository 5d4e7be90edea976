//! From the snapshot to the plans: the job as a whole, and the placement of plans.

use std::collections::HashMap;

use ckpt_image::Reader;
use ckpt_tracer::features::KernelFeatures;
use ckpt_tracer::proc::maps::Vma;

use super::build::Build;
use crate::error::Obstacle;
use crate::objects::files::Staging;
use crate::objects::holes;
use crate::objects::index::SharedId;
use crate::objects::ipc::sysv_shm;
use crate::objects::memory::{self, SharedAt};
use crate::objects::plan::{HostState, Inherit, Plan};
use crate::objects::process::Process;
use crate::objects::process_tree::{Creations, Origin};
use crate::objects::processor::Refit;
use crate::objects::vdso::Replaced;
use crate::objects::{Snapshot, SpaceId};
use crate::restore::Request;
use crate::restore::adapted::Adapted;
use crate::restore::decide::late::Late;
use crate::restore::decide::terminals::Terminals;

/// Bytes for the kernel's mappings while they are moved.
const ASIDE: u64 = 256 * 1024;

/// The input of all plans of a job.
pub struct Job<'a> {
    /// The job.
    pub snapshot: &'a Snapshot,
    /// Which process creates which.
    pub creations: &'a [Creations],
    /// The request.
    pub request: &'a Request<'a>,
    /// The state that a new process inherits from us.
    pub host: HostState,
    /// The process group that replaces the one of the shell that started the job.
    pub group: i32,
    /// What its terminals become.
    pub terminals: Terminals,
    /// Numbers of descriptors until the processes have theirs.
    pub(super) staging: Staging,
    /// Bytes of memory that a plan may use.
    pub(super) room: u64,
    /// The replacement of its vDSO.
    pub vdso: &'a Replaced,
    /// Pages that each address space of a job with forks had at its checkpoint; ascending.
    pub(super) held: HashMap<SpaceId, Vec<(u64, u64)>>,
    /// Mappings that are made last.
    pub(in crate::restore) late: Late,
    /// The adaptation of processor state.
    pub(in crate::restore) refit: Refit,
}

/// The input of the driver.
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// Addresses at which shared memory objects are mapped as a whole during
    /// [`Fill`](crate::objects::plan::Stage::Fill).
    pub shared_at: SharedAt,
}

impl<'a> Job<'a> {
    /// Makes the decisions about the job as a whole.
    pub(in crate::restore) fn new(
        adapted: &'a Adapted,
        image: &Reader,
        request: &'a Request<'a>,
        host: HostState,
        (kernel, room): (&KernelFeatures, u64),
    ) -> Result<Self, Vec<Obstacle>> {
        let snapshot: &Snapshot = adapted;
        let creations = adapted.creations().map_err(<[_]>::to_vec)?;
        let terminals = Terminals::decide(snapshot, request)?;
        let late = Late::decide(snapshot, image, creations, kernel.max_map_count)?;
        let mut held = HashMap::new();
        if creations.iter().any(|b| b.origin == Origin::Forked) {
            held = pages_held(snapshot, image);
        }
        Ok(Self {
            snapshot,
            creations,
            request,
            host,
            group: match terminals.root_leads {
                true => snapshot.processes[0].pid,
                false => nix::unistd::getpgrp().as_raw(),
            },
            terminals,
            vdso: &adapted.vdso,
            staging: Staging::beside(snapshot),
            room,
            held,
            late,
            refit: Refit::to_here(&snapshot.host, &kernel.cpu),
        })
    }

    /// A process of the snapshot.
    pub(in crate::restore) fn process(&self, index: usize) -> &'a Process {
        &self.snapshot.processes[index]
    }

    /// The parent of a process that is created by fork.
    pub(super) fn forked_from(&self, index: usize) -> Option<&'a Process> {
        let parent = self.process(index).parent;
        let processes = &self.snapshot.processes;
        let found = processes.iter().find(|p| p.pid == parent);
        found.filter(|_| self.creations[index].origin == Origin::Forked)
    }

    /// Whether a process is created by a fork of its parent.
    pub(super) fn is_forked(&self, process: &Process) -> bool {
        let mut all = self.snapshot.processes.iter().zip(self.creations);
        all.any(|(p, creations)| p.pid == process.pid && creations.origin == Origin::Forked)
    }

    /// The processes with an address space of their own, each with a plan of its own.
    pub fn owners(&self) -> impl Iterator<Item = usize> {
        let creations = self.creations.iter().enumerate();
        let own = creations.filter(|(_, b)| b.origin != Origin::Sharing);
        own.map(|(index, _)| index)
    }

    /// The process, its forks and those that share its memory, recursively: they inherit shared memory from one
    /// another.
    fn forks(&self, index: usize) -> Vec<usize> {
        let mut forks = vec![index];
        let mut next = 0;
        while let Some(&at) = forks.get(next) {
            next += 1;
            let of_one = self.creations[at].processes().into_iter();
            forks.extend(of_one.filter(|i| self.creations[*i].origin != Origin::Executed));
        }
        forks
    }

    /// The descriptors for a process's plan, or its obstacles.
    pub fn draft(&self, index: usize) -> Result<Vec<Inherit>, Vec<Obstacle>> {
        let shared_at = vec![Some(0); self.snapshot.shared_memory.len()];
        let draft = Build {
            job: self,
            index,
            process: self.process(index),
            present: &[],
            shared_at: &shared_at,
            aside: 0,
            segment_at: 0,
        };
        Ok(draft.build(0)?.inherited())
    }

    /// Makes the plan of a process. `present` are its mappings (empty for a dry run); `shared_at` are its parent's
    /// addresses of shared memory, if it was forked.
    pub fn plan(
        &self,
        index: usize,
        present: &[Vma],
        shared_at: Option<&SharedAt>,
    ) -> Result<Planned, Vec<Obstacle>> {
        let process = self.process(index);
        let forks = self.forks(index);
        let of_forks = |i: &usize| &self.process(*i).memory.mappings;
        let job = forks.iter().flat_map(of_forks).map(|m| (m.start, m.end));
        let now = present.iter().map(|v| (v.start, v.end));
        // The parent's; huge pages have been moved away, and the range is unmapped later.
        let objects = self.snapshot.shared_memory.iter();
        let staged = objects.zip(shared_at.into_iter().flatten());
        let staged = staged.filter_map(|(object, at)| Some((at.as_ref()?, object.staged_len())));
        let staged = staged.map(|(at, len)| (*at, at.saturating_add(len)));
        let mut taken: Vec<(u64, u64)> = job.chain(now).chain(staged).collect();
        let no_room = || {
            vec![Obstacle::without_remedy(
                format!("process {}", process.pid),
                "has no free room in its address space for the restorer",
            )]
        };
        let uses = |object: SharedId| {
            let mut mappings = forks.iter().flat_map(of_forks);
            mappings.any(|m| matches!(m.backing, memory::Backing::SharedMemory { object: o, .. } if o == object))
        };
        let mut place = |len: u64| {
            let at = holes::find(taken.iter().copied(), len)?;
            taken.push((at, at + len.next_multiple_of(4096)));
            Some(at)
        };
        let shared_at = match shared_at {
            Some(places) => places.clone(),
            None => {
                let mut places = Vec::new();
                for (id, object) in SharedId::each(&self.snapshot.shared_memory) {
                    let align = object.huge_page_size.max(4096);
                    let at = match uses(id) {
                        true => Some(
                            place(object.staged_len().saturating_add(align)).ok_or_else(no_room)?,
                        ),
                        false => None,
                    };
                    places.push(at.map(|at| at.next_multiple_of(align)));
                }
                places
            }
        };
        let aside = place(ASIDE).ok_or_else(no_room)?;
        let mut segment_at = 0;
        if let Some((len, align)) = sysv_shm::room(process, self.snapshot) {
            let at = place(len + align).ok_or_else(no_room)?;
            segment_at = at.next_multiple_of(align);
        }
        // The length of a plan is known only when it is made, and its addresses depend on its place: so it starts in
        // the largest hole.
        let (base, end) = holes::largest(taken).ok_or_else(no_room)?;
        let plan = Build {
            job: self,
            index,
            process,
            present,
            shared_at: &shared_at,
            aside,
            segment_at,
        };
        let plan = plan.build(base)?.finish();
        if plan.len > end - base {
            return Err(no_room());
        }
        Ok(Planned { plan, shared_at })
    }
}

/// For each address space, its pages in the image or shared with its parent.
fn pages_held(snapshot: &Snapshot, image: &Reader) -> HashMap<SpaceId, Vec<(u64, u64)>> {
    let page_size = image.header().page_size;
    let mut held: HashMap<SpaceId, Vec<(u64, u64)>> = HashMap::new();
    for process in &snapshot.processes {
        held.insert(process.memory.space, process.memory.inherited.clone());
    }
    for run in (0..image.chunks().len()).flat_map(|chunk| image.runs(chunk)) {
        if let Some(runs) = held.get_mut(&SpaceId(run.space)) {
            runs.push((run.start, run.end(page_size)));
        }
    }
    for runs in held.values_mut() {
        *runs = memory::join(std::mem::take(runs));
    }
    held
}
