//! Ids that are in use. Tasks, process groups and sessions share one space of ids: the id of a leader that has ended
//! stays in use as long as its group or session has members (`struct pid`, kernel/pid.c).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ckpt_tracer::proc::stat::{Stat, read_stat};
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Pid, Tid};

use crate::error::Obstacle;
use crate::objects::outsiders::process_name;

/// Ids that are taken. `leaving` are processes whose ids will be free.
///
/// The ids of processes that have just been killed are free after they have ended and been reaped; waits for that for
/// a limited time.
pub(super) fn taken(ids: &[i32], leaving: &[Pid]) -> Vec<Obstacle> {
    /// For the end of a killed process: the kernel takes seconds to free much memory.
    const ENDING: Duration = Duration::from_secs(30);
    /// For a parent to reap a zombie.
    const ENDED: Duration = Duration::from_secs(2);
    let mut give_up = Instant::now() + ENDED;
    let never = Instant::now() + ENDING;
    loop {
        let holders = holders(ids, leaving);
        let all = |is: fn(&Stage) -> bool| holders.iter().all(|h| is(&h.stage()));
        if !all(|stage| *stage == Stage::Ended) {
            give_up = Instant::now() + ENDED;
        }
        let in_vain = Instant::now() > give_up.min(never);
        if holders.is_empty() || !all(|stage| *stage != Stage::Lives) || in_vain {
            return holders.iter().map(Holder::obstacle).collect();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The obstacle of a taken id, after the kernel has refused it.
pub(in crate::restore) fn pid_taken(id: i32) -> Obstacle {
    match holders(&[id], &[]).first() {
        Some(holder) => holder.obstacle(),
        None => Obstacle::new(
            format!("the pid {id}"),
            "is in use, by a process, group or session that you may not see or that has just ended",
            "try again, or restore with --pids namespace",
        ),
    }
}

/// The owner of an id.
#[derive(Debug)]
struct Holder {
    id: i32,
    used_as: UsedAs,
}

#[derive(Clone, Copy, Debug)]
enum UsedAs {
    /// A process or thread.
    Task,
    /// A process group of which this is a member.
    Group(Pid),
    /// A session of which this is a member.
    Session(Pid),
}

/// State of an ending process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Lives,
    /// It was killed, and has not ended yet.
    Ending,
    /// It has gone, or is a zombie.
    Ended,
}

fn holders(ids: &[i32], leaving: &[Pid]) -> Vec<Holder> {
    let pids = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let all: Vec<Stat> = pids.into_iter().filter_map(|p| read_stat(p).ok()).collect();
    let leaves = |stat: &&Stat| {
        leaving.contains(&Pid(stat.pid)) || (stat.state.has_ended() && leaving.contains(&stat.ppid))
    };
    let mut by_id: HashMap<i32, &Stat> = HashMap::new();
    let (mut sessions, mut groups) = (HashMap::new(), HashMap::new());
    for stat in &all {
        by_id.insert(stat.pid, stat);
        if !leaves(&stat) {
            sessions.entry(stat.session).or_insert(Pid(stat.pid));
            groups.entry(stat.pgrp).or_insert(Pid(stat.pid));
        }
    }
    let holder = |&id: &i32| {
        let is_task = match by_id.get(&id) {
            Some(stat) => !leaves(stat),
            None => read_status(Tid(id)).is_ok_and(|status| !leaving.contains(&status.tgid)),
        };
        let used_as = is_task
            .then_some(UsedAs::Task)
            .or_else(|| sessions.get(&id).copied().map(UsedAs::Session))
            .or_else(|| groups.get(&id).copied().map(UsedAs::Group))?;
        Some(Holder { id, used_as })
    };
    ids.iter().filter_map(holder).collect()
}

impl Holder {
    fn stage(&self) -> Stage {
        /// `linux/sched.h`.
        const PF_EXITING: u32 = 0x4;
        const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
        let task = match self.used_as {
            UsedAs::Task => Tid(self.id),
            UsedAs::Group(pid) | UsedAs::Session(pid) => pid.leader(),
        };
        let (Ok(stat), Ok(status)) = (read_stat(task), read_status(task)) else {
            return Stage::Ended;
        };
        let killed = (status.signals.pending | status.signals.shared_pending) & SIGKILL != 0;
        match () {
            () if stat.state.has_ended() => Stage::Ended,
            () if stat.flags & PF_EXITING != 0 || killed => Stage::Ending,
            () => Stage::Lives,
        }
    }

    fn obstacle(&self) -> Obstacle {
        let pid = self.id;
        let object = format!("the pid {pid}");
        const END_IT: &str = "end that one first, or restore with --pids namespace";
        let (what, member) = match self.used_as {
            UsedAs::Task => return task(pid, object, END_IT),
            UsedAs::Group(member) => ("process group", member),
            UsedAs::Session(member) => ("session", member),
        };
        let reason = format!(
            "is still the id of a {what}, that of {}",
            process_name(member)
        );
        Obstacle::new(object, reason, END_IT)
    }
}

fn task(pid: i32, object: String, end_it: &str) -> Obstacle {
    let leader = read_status(Tid(pid)).map_or(pid, |s| s.tgid.raw());
    let who = match leader == pid {
        true => process_name(Pid(pid)),
        false => format!("a thread of {}", process_name(Pid(leader))),
    };
    // A zombie cannot be killed; its parent has to reap it.
    if let Ok(status) = read_status(Tid(pid))
        && status.state.has_ended()
    {
        let parent = status.ppid;
        return Obstacle::new(
            object,
            format!(
                "is taken by {who}, which has ended but which its parent {parent} has not waited for"
            ),
            "let the parent wait for it or end the parent, or restore with --pids namespace",
        );
    }
    Obstacle::new(object, format!("is taken by {who}"), end_it)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    /// A process that is killed at the end of the test, also of one that fails.
    struct Member(i32);

    impl Drop for Member {
        fn drop(&mut self) {
            let _ = ckpt_sys::process::kill(self.0, libc::SIGKILL);
        }
    }

    /// A shell that has ended and left a child behind: its id, and the child.
    fn ended_leader(command: &mut Command) -> (i32, Member) {
        let command = command.args(["sh", "-c", "sleep 1000 & echo $!"]);
        let mut leader = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut text = String::new();
        let mut stdout = std::io::BufReader::new(leader.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut stdout, &mut text).unwrap();
        leader.wait().unwrap();
        (leader.id() as i32, Member(text.trim().parse().unwrap()))
    }

    fn told(ids: &[i32], leaving: &[Pid]) -> Vec<String> {
        taken(ids, leaving)
            .iter()
            .map(Obstacle::to_string)
            .collect()
    }

    #[test]
    fn an_id_is_taken_by_a_task_a_group_or_a_session_unless_it_is_leaving() {
        for (mut command, what) in [
            (Command::new("env"), "process group"),
            (Command::new("setsid"), "session"),
        ] {
            if what == "process group" {
                command.process_group(0);
            }
            let (leader, child) = ended_leader(&mut command);
            let member = child.0;
            let of_leader = told(&[leader], &[]);
            let text = format!("still the id of a {what}, that of");
            assert!(of_leader[0].contains(&text), "{of_leader:?}");
            assert!(told(&[member], &[])[0].contains("is taken by process"));
            let free = told(&[leader, member], &[Pid(member)]);
            assert_eq!(free, Vec::<String>::new());
        }
    }
}
