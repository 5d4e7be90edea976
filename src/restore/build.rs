//! One plan in the making: the order of the work in a new process.

use ckpt_tracer::proc::maps::Vma;

use super::births::{Birth, Body, Origin, Phantom};
use super::plan::{Builder, Inherited, Plan, Stage};
use super::planner::Job;
use crate::error::Obstacle;
use crate::objects::files::terminal::Terminal;
use crate::objects::files::{self, Staging};
use crate::objects::ipc::{sysv_msg, sysv_sem, sysv_shm};
use crate::objects::memory::{self, Forked, SharedAt};
use crate::objects::process::Process;
use crate::objects::{Snapshot, limits, signals, timers};

/// One plan in the making.
#[derive(Clone, Copy)]
pub(super) struct Build<'a> {
    /// What all plans of the job have in common.
    pub(super) job: &'a Job<'a>,
    /// Which process it is for.
    pub(super) index: usize,
    /// The process.
    pub(super) process: &'a Process,
    /// What it has mapped already.
    pub(super) present: &'a [Vma],
    /// Where shared memory is staged.
    pub(super) shared_at: &'a SharedAt,
    /// A free place for the kernel's mappings while they are moved.
    pub(super) aside: u64,
    /// A free place for System V segments that are mapped in part.
    pub(super) segment_at: u64,
}

impl Build<'_> {
    /// The plan, to be placed at `base`; or everything that stands in its way.
    pub(super) fn build(&self, base: u64) -> Result<Plan, Vec<Obstacle>> {
        let mut plan = Builder::new(base, self.job.host.clone());
        let mut obstacles = Vec::new();
        let parent = self.job.forked_from(self.index);
        let parent: &[memory::Mapping] = parent.map_or(&[], |p| &p.memory.mappings);
        let inherited = memory::inherited(parent, &self.process.memory.mappings);
        let forked = Forked {
            parent,
            inherited: &inherited,
        };
        self.memory(forked, &mut plan, &mut obstacles);
        if self.index == 0 {
            self.descriptions(&mut plan, &mut obstacles);
        }
        let mappings = &self.process.memory.mappings;
        let objects = &self.job.snapshot.shared_memory;
        memory::place_shared(mappings, objects, self.shared_at, forked, &mut plan);
        self.family(&mut plan, &mut obstacles);
        memory::finish(
            mappings,
            self.job.snapshot,
            self.shared_at,
            forked,
            &mut plan,
        );
        self.process.memory.rebuild_fields(&mut plan);
        self.process_state(&mut plan, &mut obstacles);
        if obstacles.is_empty() {
            Ok(plan.finish())
        } else {
            Err(obstacles)
        }
    }

    /// Everything mapped, up to the point where pages are filled in.
    fn memory(&self, forked: Forked<'_>, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let snapshot = self.job.snapshot;
        let mappings = &self.process.memory.mappings;
        let staging = Staging::above(snapshot);
        if self.index == 0 {
            self.inherit_files(staging, plan);
            for (index, file) in snapshot.mapped_files.iter().enumerate() {
                if super::put::covers(snapshot, &file.path) {
                    continue;
                }
                let shared_only = !is_mapped_privately(snapshot, index);
                if let Err(o) = memory::check_file(file, shared_only, self.job.request) {
                    obstacles.push(*o);
                }
            }
        }
        // READ_IMPLIES_EXEC would change what mmap does.
        plan.syscall(libc::SYS_personality, &[0], || "personality".into());
        let mut keep: Vec<(u64, u64)> = forked.inherited.iter().map(|i| (i.start, i.end)).collect();
        if !forked.parent.is_empty() {
            let shared = snapshot.shared_memory.iter().zip(self.shared_at);
            keep.extend(shared.filter_map(|(o, at)| at.map(|at| (at, at + o.mapped_len()))));
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
        memory::drop_pages(&self.surplus(forked), plan);
        sysv_shm::attach(self.process, snapshot, self.segment_at, plan);
        plan.stage(Stage::Fill);
    }

    /// Pages that the fork brought along and that the process does not have.
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

    /// Every open file description of the job, for all processes to come.
    fn descriptions(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let (snapshot, request) = (self.job.snapshot, self.job.request);
        let staging = Staging::above(snapshot);
        if let Err(more) =
            files::open_descriptions(snapshot, request, &self.job.terminals, staging, plan)
        {
            obstacles.extend(more);
        }
        files::complete_descriptions(snapshot, staging, plan);
    }

    /// Children, session and group.
    fn family(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let births = &self.job.births[self.index];
        let process = self.process;
        let subreaper = |on: u64, plan: &mut Builder| {
            let args = [libc::PR_SET_CHILD_SUBREAPER as u64, on];
            plan.syscall(libc::SYS_prctl, &args, || "the child subreaper".into());
        };
        if births.adopts {
            subreaper(1, plan);
        }
        for birth in &births.early {
            self.birth(birth, plan, obstacles);
        }
        let leads = self.job.terminals.leads(self.index, self.job.snapshot);
        if leads {
            plan.expect(libc::SYS_setsid, &[], process.pid as u64, || {
                format!("the session of process {}", process.pid)
            });
        } else if process.group == process.pid {
            plan.syscall(libc::SYS_setpgid, &[0, 0], || {
                format!("the process group {}", process.pid)
            });
        }
        if leads {
            self.control_terminal(plan);
        }
        for birth in &births.late {
            self.birth(birth, plan, obstacles);
        }
        plan.stage(Stage::Born);
        let joins = if leads {
            None
        } else if births.joins_ours {
            Some(self.job.group)
        } else {
            births.joins
        };
        if let Some(group) = joins {
            plan.syscall(libc::SYS_setpgid, &[0, group as u64], || {
                format!("the process group {group}")
            });
        }
        plan.stage(Stage::Joined);
        if leads {
            self.foreground(plan);
        }
        // What has ended is waited for; zombies are not.
        for birth in births.all() {
            if matches!(&birth.body, Body::Phantom(p) if p.zombie.is_none()) && !birth.adopted {
                let args = [birth.pid as u64, 0, 0, 0];
                plan.expect(libc::SYS_wait4, &args, birth.pid as u64, || {
                    "a helper process".into()
                });
            }
        }
        let any_ended = births.all().any(|b| matches!(b.body, Body::Phantom(_)));
        if any_ended {
            // Setting the default action of SIGCHLD forgets one that is pending (sigaction(2)).
            let default = plan.data(&[0; 32]);
            let args = [libc::SIGCHLD as u64, default, 0, 8];
            plan.syscall(libc::SYS_rt_sigaction, &args, || "SIGCHLD".into());
        }
        if births.adopts {
            subreaper(0, plan);
        }
    }

    /// The controlling terminal of a session that the process leads, if it is made anew; with its
    /// name for messages.
    fn new_terminal(&self) -> Option<(usize, &Terminal)> {
        let terminal = self.process.terminal?;
        let led = self.job.terminals.is_led(terminal, self.job.snapshot);
        led.then(|| (terminal, &self.job.snapshot.terminals[terminal]))
    }

    fn control_terminal(&self, plan: &mut Builder) {
        let Some((terminal, record)) = self.new_terminal() else {
            return;
        };
        let fd = Staging::above(self.job.snapshot).terminal(terminal) as u64;
        plan.syscall(libc::SYS_ioctl, &[fd, libc::TIOCSCTTY], || {
            format!("the controlling terminal {}", record.name)
        });
    }

    /// The foreground group, once all groups have their members; SIGTTOU is blocked in the restorer.
    fn foreground(&self, plan: &mut Builder) {
        let snapshot = self.job.snapshot;
        let Some((terminal, record)) = self.new_terminal() else {
            return;
        };
        let Some(group) = record.foreground else {
            return;
        };
        let root = &snapshot.processes[0];
        let group = if self.job.terminals.root_leads && group == root.group {
            root.pid
        } else {
            group
        };
        let there = snapshot
            .processes
            .iter()
            .any(|p| p.group == group || p.pid == group);
        // That of a group that is gone is nobody's.
        if there {
            let fd = Staging::above(snapshot).terminal(terminal) as u64;
            let data = plan.data(&group.to_le_bytes());
            plan.syscall(libc::SYS_ioctl, &[fd, libc::TIOCSPGRP, data], || {
                format!("the foreground process group {group} of {}", record.name)
            });
        }
    }

    fn birth(&self, birth: &Birth, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let parent = if birth.adopted { libc::CLONE_PARENT } else { 0 };
        let index = match &birth.body {
            Body::Process(index) => *index,
            Body::Phantom(phantom) => {
                let flags = libc::CLONE_VM | parent;
                return plan.process(birth.pid, flags, libc::SIGCHLD, |plan| {
                    self.phantom(birth.pid, phantom, plan, obstacles);
                });
            }
        };
        let process = self.job.process(index);
        let flags = parent | process.shares.flags();
        match self.job.births[index].origin {
            Origin::Forked => plan.process(birth.pid, flags, process.exit_signal, |_| {}),
            Origin::Sharing => plan.process(birth.pid, flags, process.exit_signal, |plan| {
                let its = Build {
                    index,
                    process,
                    ..*self
                };
                its.family(plan, obstacles);
                its.process_state(plan, obstacles);
            }),
            Origin::Executed => {
                let flags = flags | libc::CLONE_VM | libc::CLONE_VFORK;
                plan.process(birth.pid, flags, libc::SIGCHLD, |plan| {
                    self.execute(index, plan);
                });
            }
        }
    }

    /// What a process does that comes to be by executing its program.
    fn execute(&self, index: usize, plan: &mut Builder) {
        let process = self.job.process(index);
        let staging = Staging::above(self.job.snapshot);
        let mut name = process.threads[0].name.clone();
        name.push(0);
        let name = plan.data(&name);
        let argv = plan.data(&[name, 0].map(u64::to_le_bytes).concat());
        let (empty, none) = (plan.data(&[0]), plan.data(&[0; 8]));
        let fd = staging.executable(process.memory.executable) as u64;
        let args = [fd, empty, argv, none, libc::AT_EMPTY_PATH as u64];
        plan.syscall(libc::SYS_execveat, &args, || {
            format!("the program of process {}", process.pid)
        });
    }

    /// What a process does that ends before the job goes on; it hands over twice, when it leads
    /// what it is to lead, and when it is in its group.
    fn phantom(
        &self,
        pid: i32,
        phantom: &Phantom,
        plan: &mut Builder,
        obstacles: &mut Vec<Obstacle>,
    ) {
        let object = || format!("helper process {pid}");
        if phantom.leads_session {
            plan.syscall(libc::SYS_setsid, &[], object);
        } else if phantom.leads_group {
            plan.syscall(libc::SYS_setpgid, &[0, 0], object);
        }
        let mut name = phantom.name.clone();
        name.push(0);
        let name = plan.data(&name);
        plan.syscall(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name], object);
        for birth in &phantom.births {
            self.birth(birth, plan, obstacles);
        }
        plan.pause();
        if let Some(group) = phantom.joins {
            // It is only shown; that of restore is as good as one that is gone.
            plan.attempt(libc::SYS_setpgid, &[0, group as u64], object);
        }
        plan.pause();
        let status = phantom.zombie.unwrap_or(0);
        let signal = status & 0x7f;
        if signal != 0 {
            let no_core = plan.data(&[0; 16]);
            let args = [libc::RLIMIT_CORE.into(), no_core];
            plan.syscall(libc::SYS_setrlimit, &args, object);
            let mask = plan.data(&[0; 8]);
            let args = [libc::SIG_SETMASK as u64, mask, 0, 8];
            plan.syscall(libc::SYS_rt_sigprocmask, &args, object);
            plan.syscall(libc::SYS_kill, &[pid as u64, signal as u64], object);
        }
        let code = (status >> 8) & 0xff;
        plan.syscall(libc::SYS_exit_group, &[code as u64], object);
    }

    /// All that is the process's own and not memory.
    fn process_state(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let (process, snapshot) = (self.process, self.job.snapshot);
        let staging = Staging::above(snapshot);
        if self.index == 0 {
            files::seal(snapshot, staging, plan);
        }
        if !process.shares.files {
            files::epoll::rebuild_bound(self.index, snapshot, staging, plan);
            files::number(process, staging, plan);
        }
        rebuild_places(process, plan);
        if !process.shares.actions {
            signals::rebuild_actions(&process.actions, plan);
        }
        sysv_sem::rebuild(process, snapshot, plan);
        sysv_msg::rebuild(process, snapshot, plan);
        for thread in &process.threads[1..] {
            plan.thread(thread.tid, |plan| thread.rebuild(process.pid, plan));
        }
        if process.threads.len() > 1 {
            plan.join();
        }
        plan.stage(Stage::Threads);
        if !process.shares.files {
            files::pidfd::rebuild_late(self.index, snapshot, plan);
            files::regular::rebuild_leases(self.index, snapshot, plan);
            files::rebuild_owners(self.index, snapshot, plan);
        }
        if let Err(o) = timers::create_posix(&process.posix_timers, plan) {
            obstacles.push(o);
        }
        signals::rebuild_pending(&process.pending, process.pid, None, plan);
        if !process.shares.memory {
            process.memory.rebuild_locks(plan);
        }
        limits::rebuild(&process.limits, plan);
        process.threads[0].rebuild(process.pid, plan);
        process.memory.rebuild_dumpable(plan);
        timers::rebuild_interval(&process.interval_timers, plan);
        timers::start_posix(&process.posix_timers, plan);
    }

    /// Files whose contents come from the image are made by the restoring process, and the
    /// programs that are executed are opened by it.
    fn inherit_files(&self, staging: Staging, plan: &mut Builder) {
        let snapshot = self.job.snapshot;
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
        let terminals = &self.job.terminals;
        for terminal in 0..snapshot.terminals.len() {
            if terminals.is_led(terminal, snapshot) {
                plan.inherit(staging.terminal(terminal), Inherited::Leading(terminal));
            }
        }
        let others = snapshot.processes.iter().zip(&self.job.births).skip(1);
        let executed = others.filter(|(_, b)| b.origin == Origin::Executed);
        let mut programs: Vec<usize> = executed.map(|(p, _)| p.memory.executable).collect();
        programs.sort_unstable();
        programs.dedup();
        for file in programs {
            plan.inherit(staging.executable(file), Inherited::Executable(file));
        }
    }
}

/// Whether pages of the file are needed as they were, and not only as they are.
fn is_mapped_privately(snapshot: &Snapshot, file: usize) -> bool {
    let is = |m: &memory::Mapping| matches!(m.backing, memory::Backing::PrivateFile { file: f, .. } if f == file);
    snapshot
        .processes
        .iter()
        .any(|p| p.memory.executable == file || p.memory.mappings.iter().any(is))
}

/// Directories, umask, personality, and the like.
fn rebuild_places(process: &Process, plan: &mut Builder) {
    if !process.shares.fs {
        rebuild_directories(process, plan);
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

fn rebuild_directories(process: &Process, plan: &mut Builder) {
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
}
