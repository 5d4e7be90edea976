//! Operations for the relations of a new process: its session and group, and the processes that it creates.

use super::Build;
use crate::error::Obstacle;
use crate::objects::files::terminal::Terminal;
use crate::objects::index::TerminalId;
use crate::objects::plan::{Builder, Stage};
use crate::objects::process_tree::{Body, Creation, Group, Origin, Phantom};

impl Build<'_> {
    /// Children, session and group.
    pub(super) fn family(&self, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let creations = &self.job.creations[self.index];
        let process = self.process;
        let subreaper = |on: u64, plan: &mut Builder| {
            let args = [libc::PR_SET_CHILD_SUBREAPER as u64, on];
            plan.syscall(libc::SYS_prctl, &args, || "the child subreaper".into());
        };
        if creations.adopts {
            subreaper(1, plan);
        }
        for creation in &creations.early {
            self.creation(creation, plan, obstacles);
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
        for creation in &creations.late {
            self.creation(creation, plan, obstacles);
        }
        plan.stage(Stage::Born);
        let joins = if leads {
            None
        } else if creations.joins_ours {
            Some(self.job.group)
        } else {
            creations.joins
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
        // Ended helpers are reaped; zombies are not.
        let own = creations.all().filter(|creation| !creation.adopted);
        for pid in own.flat_map(Creation::helpers) {
            let args = [pid as u64, 0, 0, 0];
            plan.expect(libc::SYS_wait4, &args, pid as u64, || {
                "a helper process".into()
            });
        }
        let mut told: Vec<i32> = creations.all().filter_map(Creation::tells).collect();
        if creations.adopts {
            told.push(libc::SIGCHLD);
        }
        told.sort_unstable();
        told.dedup();
        for signal in told {
            forget(signal, plan);
        }
        if creations.adopts {
            subreaper(0, plan);
        }
    }

    /// The controlling terminal of a session that the process leads, if it is a new one.
    fn new_terminal(&self) -> Option<(TerminalId, &Terminal)> {
        let terminal = self.process.terminal?;
        let led = self.job.terminals.is_led(terminal, self.job.snapshot);
        led.then(|| (terminal, &self.job.snapshot.terminals[terminal]))
    }

    fn control_terminal(&self, plan: &mut Builder) {
        let Some((terminal, record)) = self.new_terminal() else {
            return;
        };
        let fd = self.job.staging.terminal(terminal) as u64;
        plan.syscall(libc::SYS_ioctl, &[fd, libc::TIOCSCTTY], || {
            format!("the controlling terminal {}", record.name)
        });
    }

    /// The foreground process group, after all groups have their members; SIGTTOU is blocked in the restorer.
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
        // A group that has gone belongs to no process.
        if there {
            let fd = self.job.staging.terminal(terminal) as u64;
            let data = plan.data(&group.to_le_bytes());
            plan.syscall(libc::SYS_ioctl, &[fd, libc::TIOCSPGRP, data], || {
                format!("the foreground process group {group} of {}", record.name)
            });
        }
    }

    fn creation(&self, creation: &Creation, plan: &mut Builder, obstacles: &mut Vec<Obstacle>) {
        let parent = if creation.adopted {
            libc::CLONE_PARENT
        } else {
            0
        };
        let index = match &creation.body {
            Body::Process(index) => *index,
            Body::Phantom(phantom) => {
                let flags = libc::CLONE_VM | parent;
                return plan.process(creation.pid, flags, phantom.exit_signal, |plan| {
                    self.phantom(creation.pid, phantom, plan, obstacles);
                });
            }
        };
        let process = self.job.process(index);
        let flags = parent | process.shares.flags();
        match self.job.creations[index].origin {
            Origin::Forked => plan.process(creation.pid, flags, process.exit_signal, |_| {}),
            Origin::Sharing => plan.process(creation.pid, flags, process.exit_signal, |plan| {
                let its = Build {
                    index,
                    process,
                    ..*self
                };
                its.family(plan, obstacles);
                its.process_state(plan, obstacles);
            }),
            Origin::Executed => {
                if process.exit_signal != libc::SIGCHLD {
                    // An exec sets it (`begin_new_exec`). Its parent has executed a program since it was created, so
                    // it would be sent SIGCHLD all the same (`do_notify_parent`).
                    plan.warn(format!(
                        "the exit signal of process {} was {} and is SIGCHLD now, since it is created by executing \
                         its program: its parent needs no __WCLONE to wait for it",
                        creation.pid, process.exit_signal
                    ));
                }
                let flags = flags | libc::CLONE_VM | libc::CLONE_VFORK;
                plan.process(creation.pid, flags, libc::SIGCHLD, |plan| {
                    self.execute(index, plan);
                });
            }
        }
    }

    /// Operations of a process that executes its own program.
    fn execute(&self, index: usize, plan: &mut Builder) {
        let process = self.job.process(index);
        let staging = self.job.staging;
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

    /// Operations of a process that ends before the job continues; it traps twice, when it leads its session or
    /// group, and when it has joined its group.
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
        for creation in &phantom.creations {
            self.creation(creation, plan, obstacles);
        }
        plan.pause();
        let joins = phantom.joins.map(|group| match group {
            Group::Of(group) => group,
            Group::Ours => self.job.group,
        });
        if let Some(group) = joins {
            let warning =
                format!("process {pid}, which has ended, is not in its process group, {group}");
            match group {
                // Outside our pid namespace; setpgid(2) treats 0 as the process itself.
                0 => plan.warn(warning),
                _ => plan.try_syscall(libc::SYS_setpgid, &[0, group as u64], &warning),
            }
        }
        plan.pause();
        let now = &plan.host().credentials;
        let (uid, gid) = (now.uid[0], now.gid[0]);
        if let Some((was_uid, was_gid)) = phantom.ids.filter(|ids| *ids != (uid, gid)) {
            // User and group of its signal and of its directory in /proc only.
            let warning = format!(
                "process {pid}, which has ended, had user id {was_uid} and group id {was_gid}, which it no \
                 longer has"
            );
            for (nr, id) in [
                (libc::SYS_setresgid, was_gid),
                (libc::SYS_setresuid, was_uid),
            ] {
                plan.try_syscall(nr, &[u64::from(id); 3], &warning);
            }
        }
        let status = phantom.zombie.unwrap_or(0);
        if status & 0x80 != 0 {
            plan.warn(format!(
                "process {pid}, which has ended, had dumped core, which its wait status no longer says"
            ));
        }
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
}

/// Pending instances of a signal are discarded when its action becomes "ignore" (sigaction(2)), which is the default
/// for SIGCHLD.
fn forget(signal: i32, plan: &mut Builder) {
    let ignore = (signal != libc::SIGCHLD).then_some(libc::SIG_IGN as u64);
    for action in ignore.into_iter().chain([libc::SIG_DFL as u64]) {
        let action = plan.data(&[action, 0, 0, 0].map(u64::to_le_bytes).concat());
        let args = [signal as u64, action, 0, 8];
        plan.syscall(libc::SYS_rt_sigaction, &args, || format!("signal {signal}"));
    }
}
