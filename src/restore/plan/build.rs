//! Builds one plan: the order of the work in a new process.

mod family;

use std::path::Path;

use ckpt_tracer::proc::maps::Vma;
use nix::unistd::AccessFlags;

use super::job::Job;
use crate::error::Obstacle;
use crate::objects::files::{self, Staging, procfs, removed};
use crate::objects::index::{FileId, RemovedId, TerminalId};
use crate::objects::ipc::{self, notice, sysv_shm};
use crate::objects::memory::{self, Forked, SharedAt, Uses};
use crate::objects::plan::{Builder, Inherited, Stage};
use crate::objects::process::{Process, RemovedPlaces};
use crate::objects::process_tree::Origin;
use crate::objects::thread::Thread;
use crate::objects::{access, rights};
use crate::objects::{
    aio, credentials, landlock, limits, seccomp, security, session, signals, timers,
};
use crate::restore::files::put;
use crate::restore::run::handover;
use crate::text::Shown;

/// The context of one plan.
#[derive(Clone, Copy)]
pub(super) struct Build<'a> {
    /// The common part of all plans of the job.
    pub(super) job: &'a Job<'a>,
    /// Index of the process.
    pub(super) index: usize,
    /// The process.
    pub(super) process: &'a Process,
    /// Its present mappings.
    pub(super) present: &'a [Vma],
    /// Addresses at which shared memory is staged.
    pub(super) shared_at: &'a SharedAt,
    /// A free range for the kernel's mappings while they are moved.
    pub(super) aside: u64,
    /// A free range for System V segments that are mapped in part.
    pub(super) segment_at: u64,
}

impl Build<'_> {
    /// The plan, to be placed at `base`; or all obstacles.
    pub(super) fn build(&self, base: u64) -> Result<Builder, Vec<Obstacle>> {
        let mut plan = Builder::new(base, self.job.host.clone()).within(self.job.room);
        let mut obstacles = Vec::new();
        let parent = self.job.forked_from(self.index);
        let again = parent.is_some_and(|p| self.job.is_forked(p));
        let parent: &[memory::Mapping] = parent.map_or(&[], |p| &p.memory.mappings);
        let inherited = memory::inherited(parent, &self.process.memory.mappings);
        let forked = Forked {
            parent,
            inherited: &inherited,
            again,
        };
        if self.job.creations[self.index].origin == Origin::Executed {
            self.begin(&mut plan);
        }
        self.memory(forked, &mut plan, &mut obstacles);
        if self.index == 0 {
            self.descriptions(&mut plan, &mut obstacles);
        }
        let mappings = &self.job.late.others(self.process);
        let objects = &self.job.snapshot.shared_memory;
        memory::place_shared(mappings, objects, self.shared_at, forked, &mut plan);
        self.family(&mut plan, &mut obstacles);
        let threads = self.process.threads.iter();
        let affinities: Vec<&[u8]> = threads.map(|t| &*t.scheduling.affinity).collect();
        aio::rebuild(mappings, &affinities, &mut plan);
        memory::finish(
            mappings,
            self.job.snapshot,
            self.shared_at,
            forked,
            &mut plan,
        );
        self.process.memory.rebuild_fields(&mut plan);
        self.process_state(&mut plan, &mut obstacles);
        if plan.is_too_large() {
            obstacles.push(Obstacle::new(
                format!("the plan of process {}", self.process.pid),
                "takes more memory than is allowed for inspecting an image of this size",
                "restore has no such limit",
            ));
        }
        if obstacles.is_empty() {
            Ok(plan)
        } else {
            Err(obstacles)
        }
    }

    /// The beginning: the credentials of the process until it has its own.
    fn begin(&self, plan: &mut Builder) {
        let snapshot = self.job.snapshot;
        let host = plan.host().clone();
        let executable = &snapshot.mapped_files[self.process.memory.executable];
        if executable.contents.is_none() && credentials::gives_privileges(&executable.path) {
            credentials::as_before_exec(&host.credentials, plan);
        }
        if let Some(ids) = host.keyring.filter(|_| self.index == 0) {
            credentials::join_keyring(ids, plan);
        }
        if let Some(rights) = &host.rights {
            rights.begin(plan);
        }
    }

    /// All mappings, up to the point where pages are filled.
    fn memory(&self, forked: Forked<'_>, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let snapshot = self.job.snapshot;
        let mappings = &self.job.late.others(self.process);
        let staging = self.job.staging;
        if self.index == 0 {
            self.inherit_files(staging, plan);
            let (put, uses) = (put::covered(snapshot), Uses::of(snapshot));
            for (id, file) in FileId::each(&snapshot.mapped_files) {
                if file.contents.is_some() || put.contains(file.path.as_path()) {
                    continue;
                }
                let shared_only = !uses.as_it_was(id);
                let policy = self.job.request.objects.files;
                if let Err(o) = memory::check_file(file, shared_only, policy) {
                    obstacles.push(*o);
                }
            }
        }
        // READ_IMPLIES_EXEC would change the effect of mmap.
        plan.syscall(libc::SYS_personality, &[0], || "personality".into());
        let mut keep: Vec<(u64, u64)> = forked.inherited.iter().map(|i| (i.start, i.end)).collect();
        if !forked.parent.is_empty() {
            let shared = snapshot.shared_memory.iter().zip(self.shared_at);
            keep.extend(shared.filter_map(|(o, at)| at.map(|at| (at, at + o.staged_len()))));
        }
        let keep = memory::join(keep);
        if let Err(o) = memory::clear_and_move(mappings, self.present, &keep, self.aside, plan)
            && !self.present.is_empty()
        {
            obstacles.push(*o);
        }
        memory::free_keys(forked.parent, plan);
        memory::allocate_keys(mappings, plan);
        memory::map_all(mappings, snapshot, staging, self.shared_at, forked, plan);
        aio::reserve(mappings, plan);
        memory::drop_pages(&self.surplus(forked), plan);
        sysv_shm::attach(self.process, snapshot, self.segment_at, plan);
        plan.stage(Stage::Fill);
    }

    /// Inherited pages that the process does not have.
    fn surplus(&self, forked: Forked<'_>) -> Vec<(u64, u64)> {
        let Some(parent) = self.job.forked_from(self.index) else {
            return Vec::new();
        };
        let held = |process: &Process| self.job.held.get(&process.memory.space);
        let (Some(theirs), Some(mine)) = (held(parent), held(self.process)) else {
            return Vec::new();
        };
        let private = forked.inherited.iter().filter(|i| {
            let backing = &forked.parent[i.parent].backing;
            matches!(
                backing,
                memory::Backing::Anonymous
                    | memory::Backing::PrivateFile { .. }
                    | memory::Backing::Description { private: true, .. }
            )
        });
        let over: Vec<(u64, u64)> = private.map(|i| (i.start, i.end)).collect();
        memory::subtract(&memory::intersect(theirs, &over), mine)
    }

    /// Every open file description of the job, for all later processes.
    fn descriptions(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let (snapshot, request) = (self.job.snapshot, self.job.request);
        let staging = self.job.staging;
        if let Err(more) = files::open_descriptions(
            snapshot,
            &request.objects,
            &self.job.terminals,
            staging,
            plan,
        ) {
            obstacles.extend(more);
        }
        files::complete_descriptions(snapshot, staging, plan);
    }

    /// The process's own state other than memory.
    fn process_state(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let (process, snapshot) = (self.process, self.job.snapshot);
        let staging = self.job.staging;
        if self.index == 0 {
            files::seal(snapshot, staging, plan);
        }
        if !process.shares.fs {
            enter_removed(process, staging, plan);
        }
        if !process.shares.files {
            files::epoll::rebuild_bound(self.index, snapshot, staging, plan);
            files::number(process, snapshot, staging, plan);
        }
        let late = procfs::is_of_job(&process.cwd, snapshot);
        rebuild_places(process, late, plan);
        process.dynamic_state.rebuild(plan);
        if !process.shares.actions {
            signals::rebuild_actions(&process.actions, plan);
        }
        ipc::rebuild(process, snapshot, plan);
        security::ask_before_threads(&process.threads, plan);
        session::rebuild_login_uid(process, plan);
        let filters = threads(process, plan);
        if process.threads.len() > 1 {
            plan.join();
        }
        plan.stage(Stage::Threads);
        if late && !process.shares.fs {
            let inside = process.cwd.strip_prefix(&process.root);
            let inside = Path::new("/").join(inside.unwrap_or(&process.cwd));
            enter_working_directory(&inside, plan);
        }
        ipc::finish(process, snapshot, plan);
        if !process.shares.files {
            files::late::rebuild_late(self.index, snapshot, plan);
        }
        files::lock::rebuild_shared(process, snapshot, plan);
        files::lock::rebuild_leases(process, snapshot, plan);
        files::rebuild_owners(process, snapshot, plan);
        if let Err(o) = timers::create_posix(process, snapshot, plan) {
            obstacles.push(o);
        }
        let timers = &process.posix_timers;
        signals::rebuild_pending(&process.pending, timers, process.pid, None, plan);
        if !process.shares.memory {
            process.memory.rebuild_locks(plan);
        }
        limits::rebuild(&process.limits, handover::meets_traps(process), plan);
        notice::rebuild(process, snapshot, plan);
        process.threads[0].rebuild(process, filters, plan);
        process.memory.rebuild_dumpable(plan);
        timers::rebuild_interval(process, plan);
        timers::start_posix(process, plan);
    }

    /// Mapped and executed files are opened by the restoring process, or created by it with contents of the image.
    fn inherit_files(&self, staging: Staging, plan: &mut Builder) {
        let snapshot = self.job.snapshot;
        let mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
        let mut wanted: Vec<(FileId, bool)> = mappings
            .filter_map(|m| match m.backing {
                memory::Backing::PrivateFile { file, .. } => Some((file, false)),
                memory::Backing::SharedFile { file, writable, .. } => Some((file, writable)),
                _ => None,
            })
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        for (file, writable) in wanted {
            plan.inherit(
                staging.mapped_file(file, writable),
                Inherited::MappedFile(file, writable),
            );
        }
        let terminals = &self.job.terminals;
        for (terminal, _) in TerminalId::each(&snapshot.terminals) {
            if terminals.is_led(terminal, snapshot) {
                plan.inherit(staging.terminal(terminal), Inherited::Leading(terminal));
            }
        }
        for (id, _) in RemovedId::each(&snapshot.removed) {
            if removed::is_place(id, snapshot) {
                plan.inherit(staging.removed(id), Inherited::RemovedPlace(id));
            }
        }
        let others = snapshot.processes.iter().zip(self.job.creations).skip(1);
        let executed = others.filter(|(_, b)| b.origin == Origin::Executed);
        let mut programs: Vec<FileId> = executed.map(|(p, _)| p.memory.executable).collect();
        programs.sort_unstable();
        programs.dedup();
        for file in programs {
            plan.inherit(staging.executable(file), Inherited::Executable(file));
        }
    }
}

/// Creates the threads, each when the first thread has the seccomp filters that both have; returns how many filters
/// that one has then.
fn threads(process: &Process, plan: &mut Builder) -> usize {
    let first = &process.threads[0].seccomp;
    let in_common = |thread: &&Thread| first.in_common(&thread.seccomp);
    let mut others: Vec<&Thread> = process.threads[1..].iter().collect();
    others.sort_by_key(in_common);
    let mut installed = 0;
    for thread in others {
        let filters = in_common(&thread);
        first.install(installed..filters, plan);
        installed = filters;
        plan.thread(thread.tid, |plan| {
            thread.rebuild(process, filters, plan);
        });
    }
    let told = [seccomp::separated(process), landlock::warning(process)];
    told.into_iter().flatten().for_each(|w| plan.warn(w));
    installed
}

/// Directories, umask, personality, and the like. `late` says that the working directory does not exist yet.
fn rebuild_places(process: &Process, late: bool, plan: &mut Builder) {
    if !process.shares.fs {
        rebuild_directories(process, late, plan);
    }
    if process.child_subreaper {
        let args = [libc::PR_SET_CHILD_SUBREAPER as u64, 1];
        plan.syscall(libc::SYS_prctl, &args, || "the child subreaper".into());
    }
    if process.personality != 0 {
        let args = [process.personality.into()];
        plan.syscall(libc::SYS_personality, &args, || "personality".into());
    }
}

/// Resolves the path now: entering a directory opens nothing and waits for nothing.
fn enter(path: &Path, nr: i64, object: String, plan: &mut Builder) {
    let at = plan.path(path);
    let call = |plan: &mut Builder| plan.syscall(nr, &[at], || object);
    match plan.host().rights.clone() {
        Some(rights) => {
            let may = rights.during(|| access::may(path, AccessFlags::X_OK).is_ok());
            match may && nr == libc::SYS_chdir {
                true => rights::led(plan, call),
                false => rights.as_ourselves(may, plan, call),
            }
        }
        None => call(plan),
    }
}

/// Enters removed directories, through their descriptors.
fn enter_removed(process: &Process, staging: Staging, plan: &mut Builder) {
    if let Some(index) = process.removed.root {
        let object = || format!("the root directory {} (deleted)", process.root.shown());
        let path = format!("/proc/self/fd/{}", staging.removed(index));
        let path = plan.path(Path::new(&path));
        if process.removed.cwd.is_none() {
            // Relative to the old root.
            enter_working_directory(&process.cwd, plan);
        }
        plan.syscall(libc::SYS_chroot, &[path], object);
    }
    if let Some(index) = process.removed.cwd {
        let object = || format!("the working directory {} (deleted)", process.cwd.shown());
        plan.syscall(libc::SYS_fchdir, &[staging.removed(index) as u64], object);
    }
}

fn enter_working_directory(path: &Path, plan: &mut Builder) {
    let object = format!("the working directory {}", path.shown());
    enter(path, libc::SYS_chdir, object, plan);
}

fn rebuild_directories(process: &Process, late: bool, plan: &mut Builder) {
    if !late && process.removed == RemovedPlaces::default() {
        enter_working_directory(&process.cwd, plan);
    }
    if process.root != Path::new("/") && process.removed.root.is_none() {
        let object = format!("the root directory {}", process.root.shown());
        enter(&process.root, libc::SYS_chroot, object, plan);
    }
    plan.syscall(libc::SYS_umask, &[process.umask.into()], || "umask".into());
}
