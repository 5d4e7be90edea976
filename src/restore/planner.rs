//! From the snapshot to the plan: the order of the work in the new process.

use ckpt_tracer::proc::maps::Vma;

use super::Request;
use super::plan::{Builder, HostState, Inherited, Plan, Stage};
use crate::error::Obstacle;
use crate::holes;
use crate::objects::files::{self, Kind, Staging};
use crate::objects::ipc::{sysv_msg, sysv_sem, sysv_shm};
use crate::objects::process::Process;
use crate::objects::{Snapshot, limits, memory, signals, timers};

/// Room for the kernel's mappings while they are moved.
const ASIDE: u64 = 256 * 1024;

/// Everything that the driver needs to know.
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// Where each shared memory object is mapped as a whole during [`Stage::Fill`].
    pub shared_at: Vec<u64>,
}

/// Makes the plan. `present` is what the new process has mapped; empty for a dry run.
pub fn plan(
    snapshot: &Snapshot,
    request: &Request<'_>,
    host: &HostState,
    present: &[Vma],
) -> Result<Planned, Vec<Obstacle>> {
    let process = &snapshot.processes[0];
    let taken = || {
        let job = process.memory.mappings.iter().map(|m| (m.start, m.end));
        let now = present.iter().map(|v| (v.start, v.end));
        job.chain(now).collect::<Vec<_>>()
    };
    let no_room = || {
        vec![Obstacle::without_remedy(
            format!("process {}", process.pid),
            "has no free room in its address space for the restorer",
        )]
    };
    // The size does not depend on the place, so the first plan is made for it alone.
    let mut taken = taken();
    let draft = build(
        snapshot,
        request,
        host,
        present,
        0,
        &vec![0; snapshot.shared_memory.len()],
        [0; 2],
    )?;
    let mut place = |len: u64| {
        let at = holes::find(taken.iter().copied(), len)?;
        taken.push((at, at + len.next_multiple_of(4096)));
        Some(at)
    };
    let base = place(draft.len).ok_or_else(no_room)?;
    let aside = place(ASIDE).ok_or_else(no_room)?;
    let mut shared_at = Vec::new();
    for object in &snapshot.shared_memory {
        let align = object.huge_page_size.max(4096);
        let at = place(object.mapped_len() + align).ok_or_else(no_room)?;
        shared_at.push(at.next_multiple_of(align));
    }
    let mut segment_at = 0;
    if let Some((len, align)) = sysv_shm::room(process, snapshot) {
        segment_at = place(len + align)
            .ok_or_else(no_room)?
            .next_multiple_of(align);
    }
    let free = [aside, segment_at];
    let plan = build(snapshot, request, host, present, base, &shared_at, free)?;
    Ok(Planned { plan, shared_at })
}

fn build(
    snapshot: &Snapshot,
    request: &Request<'_>,
    host: &HostState,
    present: &[Vma],
    base: u64,
    shared_at: &Vec<u64>,
    [aside, segment_at]: [u64; 2],
) -> Result<Plan, Vec<Obstacle>> {
    let process = &snapshot.processes[0];
    let mut plan = Builder::new(base, host.clone());
    let plan_ref = &mut plan;
    let mut obstacles = Vec::new();

    let memory = &process.memory;
    let staging = Staging::above(process, snapshot);
    inherit_mapped_files(snapshot, staging, plan_ref);
    for (index, file) in snapshot.mapped_files.iter().enumerate() {
        let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        let shared_only = index != memory.executable
            && !mappings.any(
                |m| matches!(m.backing, memory::Backing::PrivateFile { file, .. } if file == index),
            );
        if let Err(o) = memory::check_file(file, shared_only, request) {
            obstacles.push(*o);
        }
    }

    // READ_IMPLIES_EXEC would change what mmap does.
    plan_ref.syscall(libc::SYS_personality, &[0], || "personality".into());
    if let Err(o) = memory::clear_and_move(&memory.mappings, present, aside, plan_ref)
        && !present.is_empty()
    {
        obstacles.push(*o);
    }
    memory::allocate_keys(&memory.mappings, plan_ref);
    memory::map_all(&memory.mappings, snapshot, staging, shared_at, plan_ref);
    sysv_shm::attach(process, snapshot, segment_at, plan_ref);
    plan_ref.stage(Stage::Fill);
    memory::finish(&memory.mappings, snapshot, shared_at, plan_ref);
    memory.rebuild_fields(plan_ref);

    if let Err(more) = files::open_descriptions(snapshot, request, staging, plan_ref) {
        obstacles.extend(more);
    }
    files::finish(process, snapshot, staging, plan_ref);
    rebuild_places(process, plan_ref);
    signals::rebuild_actions(&process.actions, plan_ref);
    sysv_sem::rebuild(process, snapshot, plan_ref);
    sysv_msg::rebuild(process, snapshot, plan_ref);

    for thread in &process.threads[1..] {
        plan_ref.thread(thread.tid, |plan| thread.rebuild(process.pid, plan));
    }
    if process.threads.len() > 1 {
        plan_ref.join();
    }
    plan_ref.stage(Stage::Threads);
    files::rebuild_owners(process, snapshot, plan_ref);
    if let Err(o) = timers::create_posix(&process.posix_timers, plan_ref) {
        obstacles.push(o);
    }
    signals::rebuild_pending(&process.pending, process.pid, None, plan_ref);
    memory.rebuild_locks(plan_ref);
    limits::rebuild(&process.limits, plan_ref);
    process.threads[0].rebuild(process.pid, plan_ref);
    memory.rebuild_dumpable(plan_ref);
    timers::rebuild_interval(&process.interval_timers, plan_ref);
    timers::start_posix(&process.posix_timers, plan_ref);

    if obstacles.is_empty() {
        Ok(plan.finish())
    } else {
        Err(obstacles)
    }
}

/// Files whose contents come from the image are made by the restoring process.
fn inherit_mapped_files(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    let mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
    let mut wanted: Vec<(usize, bool)> = mappings
        .filter_map(|m| match m.backing {
            memory::Backing::PrivateFile { file, .. } => Some((file, false)),
            memory::Backing::SharedFile { file, writable, .. } => Some((file, writable)),
            _ => None,
        })
        .filter(|(file, _)| snapshot.mapped_files[*file].contents.is_some())
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    for (file, writable) in wanted {
        plan.inherit(
            staging.mapped_file(file, writable),
            Inherited::MappedFile(file, writable),
        );
    }
}

/// Directories, umask, personality, and the like.
fn rebuild_places(process: &Process, plan: &mut Builder) {
    let cwd = plan.path(&process.cwd);
    plan.syscall(libc::SYS_chdir, &[cwd], || {
        format!("the working directory {}", process.cwd.display())
    });
    if process.root != std::path::Path::new("/") {
        let root = plan.path(&process.root);
        plan.syscall(libc::SYS_chroot, &[root], || {
            format!("the root directory {}", process.root.display())
        });
    }
    plan.syscall(libc::SYS_umask, &[process.umask.into()], || "umask".into());
    if process.child_subreaper {
        let args = [libc::PR_SET_CHILD_SUBREAPER as u64, 1];
        plan.syscall(libc::SYS_prctl, &args, || "the child subreaper".into());
    }
    if process.personality != 0 {
        let args = [process.personality.into()];
        plan.syscall(libc::SYS_personality, &args, || "personality".into());
    }
}

/// Which descriptions of the snapshot are memfds, with their contents still to be filled in.
pub fn memfds(snapshot: &Snapshot) -> impl Iterator<Item = (usize, &files::memfd::MemFd)> {
    snapshot
        .descriptions
        .iter()
        .enumerate()
        .filter_map(|(i, d)| match &d.kind {
            Kind::MemFd(m) => Some((i, m)),
            _ => None,
        })
}
