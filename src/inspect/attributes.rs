//! Other attributes of each process and thread: signals, timers, limits, directories, control groups, switches,
//! memory policies, credentials. Every record is destructured completely, so that a new field does not compile before
//! it is shown here or named as shown elsewhere.

use std::fmt::Debug;

use serde::Serialize;

use crate::objects::Snapshot;
use crate::objects::address_space::AddressSpace;
use crate::objects::cgroup::Cgroup;
use crate::objects::credentials::Credentials;
use crate::objects::limits;
use crate::objects::process::{Process, sigchld};
use crate::objects::scheduling::Scheduling;
use crate::objects::signals::Pending;
use crate::objects::switches::Switch;
use crate::objects::thread::Thread;
use crate::text::Shown;

/// An attribute as `ckpt inspect --attributes` shows it; the JSON keys are fixed, names and values are for display.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttributeView {
    /// Its process; null for the job as a whole.
    pub pid: Option<i32>,
    /// Its thread; null for a process.
    pub tid: Option<i32>,
    /// Its name in the manual pages, such as `RLIMIT_AS` or `PR_SET_TSC`.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// Collects the attributes of one process or thread.
struct Rows {
    whose: (Option<i32>, Option<i32>),
    views: Vec<AttributeView>,
}

impl Rows {
    fn add(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (pid, tid) = self.whose;
        let (name, value) = (name.into(), value.into());
        self.views.push(AttributeView {
            pid,
            tid,
            name,
            value,
        });
    }

    /// Adds one that differs from the default.
    fn unless<T: PartialEq + Debug>(&mut self, usual: &T, name: &str, value: &T) {
        if value != usual {
            self.add(name, format!("{value:?}"));
        }
    }

    /// Adds each of a list.
    fn each<T: Debug>(&mut self, name: &str, values: &[T]) {
        for value in values {
            self.add(name, format!("{value:?}"));
        }
    }

    fn switches(&mut self, switches: &[Switch]) {
        for switch in switches {
            self.add(&switch.name, switch.value.to_string());
        }
    }

    fn pending(&mut self, pending: &[Pending]) {
        for signal in pending {
            self.add("pending signal", signal.signal().to_string());
        }
    }
}

/// All attributes of a snapshot, those of the job first. Defaults of a new process are left out.
pub fn attributes(snapshot: &Snapshot) -> Vec<AttributeView> {
    let mut rows = Rows {
        whose: (None, None),
        views: Vec::new(),
    };
    job(snapshot, &mut rows);
    for of in &snapshot.processes {
        rows.whose = (Some(of.pid), None);
        process(of, snapshot, &mut rows);
        for thread in &of.threads {
            rows.whose = (Some(of.pid), Some(thread.tid));
            self::thread(thread, &mut rows);
        }
    }
    rows.views
}

fn job(snapshot: &Snapshot, rows: &mut Rows) {
    let Snapshot {
        cgroups,
        namespaces,
        removed,
        // In the summary.
        host: _,
        processes: _,
        zombies: _,
        bundle: _,
        // Shown with their users, or with the needs.
        descriptions: _,
        terminals: _,
        mapped_files: _,
        shared_memory: _,
        ipc: _,
    } = snapshot;
    for hierarchy in cgroups {
        for group in &hierarchy.groups {
            let settings = group.settings.iter();
            let settings = settings.map(|(name, value)| format!("{name}={}", value.trim()));
            let group = format!(
                "settings of {}{}",
                controllers(&hierarchy.controllers),
                group.path.shown()
            );
            rows.add(group, settings.collect::<Vec<_>>().join(", "));
        }
        for (tid, group) in &hierarchy.threads {
            rows.add(
                format!("control group of thread {tid}"),
                format!("{}{}", controllers(&hierarchy.controllers), group.shown()),
            );
        }
    }
    rows.unless(&Default::default(), "namespaces", namespaces);
    for directory in removed {
        rows.add("removed", directory.path.shown());
    }
}

/// The prefix of a group's path, as in `/proc/PID/cgroup`.
fn controllers(names: &str) -> String {
    match names {
        "" => String::new(),
        names => format!("{names}:"),
    }
}

fn process(process: &Process, snapshot: &Snapshot, rows: &mut Rows) {
    let Process {
        shares,
        exit_signal,
        group,
        session,
        terminal,
        stopped,
        untold_stops,
        untold_continues,
        memory,
        actions,
        pending,
        interval_timers,
        posix_timers,
        record_locks,
        notices,
        cwd,
        root,
        umask,
        limits,
        personality,
        child_subreaper,
        cgroups,
        dynamic_state,
        oom_score_adj,
        coredump_filter,
        autogroup_nice,
        login_uid,
        semaphore_adjustments,
        // In the summary, with the threads or with the descriptors.
        pid: _,
        parent: _,
        forked: _,
        command_line: _,
        threads: _,
        fds: _,
        // With the removed objects.
        removed: _,
    } = process;
    rows.unless(&Default::default(), "shared with the parent", shares);
    rows.unless(&sigchld(), "exit signal", exit_signal);
    rows.add("process group", group.to_string());
    rows.add("session", session.to_string());
    if let Some(terminal) = terminal.and_then(|t| t.find(&snapshot.terminals)) {
        rows.add("controlling terminal", &terminal.name);
    }
    if let Some(signal) = stopped {
        rows.add("stopped by signal", signal.to_string());
    }
    rows.each("stopped child not waited for", untold_stops);
    rows.each("continued child not waited for", untold_continues);
    for action in actions {
        let value = match action.handler {
            0 => "SIG_DFL".to_owned(),
            1 => "SIG_IGN".to_owned(),
            handler => format!("handler {handler:#x}"),
        };
        let flags = format!(", flags {:#x}, mask {:#x}", action.flags, action.mask);
        rows.add(format!("signal {}", action.signal), value + &flags);
    }
    rows.pending(pending);
    let names = ["ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF"];
    for (name, timer) in names.into_iter().zip(interval_timers.0) {
        let [every, every_us, left, left_us] = timer;
        if timer != [0; 4] {
            rows.add(
                name,
                format!("in {left}.{left_us:06} s, every {every}.{every_us:06} s"),
            );
        }
    }
    rows.each("POSIX timer", posix_timers);
    for (fd, lock) in record_locks {
        rows.add(format!("lock of fd {fd}"), format!("{lock:?}"));
    }
    rows.each("mq_notify", notices);
    rows.add("working directory", cwd.shown());
    rows.add("root directory", root.shown());
    rows.add("umask", format!("{umask:04o}"));
    for limit in limits {
        let shown = |limit: u64| match limit {
            u64::MAX => "unlimited".to_owned(),
            limit => limit.to_string(),
        };
        let value = format!("{} of {}", shown(limit.soft), shown(limit.hard));
        let name = format!("limit of {}", limits::name(limit.resource));
        rows.add(name, value);
    }
    rows.unless(&0, "personality", personality);
    rows.unless(&false, "PR_SET_CHILD_SUBREAPER", child_subreaper);
    for Cgroup {
        controllers: names,
        path,
    } in cgroups
    {
        let value = format!("{}{}", controllers(names), path.shown());
        rows.add("control group", value);
    }
    rows.unless(&Default::default(), "ARCH_REQ_XCOMP_PERM", dynamic_state);
    rows.unless(&0, "oom_score_adj", oom_score_adj);
    if let Some(filter) = coredump_filter {
        rows.add("coredump_filter", format!("{filter:#x}"));
    }
    if let Some(nice) = autogroup_nice {
        rows.add("autogroup", nice.to_string());
    }
    if let Some(uid) = login_uid.filter(|uid| *uid != u32::MAX) {
        rows.add("loginuid", uid.to_string());
    }
    rows.each("SEM_UNDO", semaphore_adjustments);
    self::memory(memory, rows);
}

fn memory(memory: &AddressSpace, rows: &mut Rows) {
    let AddressSpace {
        lock_future,
        switches,
        segments,
        dumpable,
        membarrier,
        mappings,
        auxv,
        layout,
        // With the mappings, or only in older images.
        space: _,
        executable: _,
        inherited: _,
        thp_disabled: _,
    } = memory;
    rows.unless(&0, "mlockall", lock_future);
    rows.switches(switches);
    rows.each("modify_ldt", segments);
    rows.unless(&1, "PR_SET_DUMPABLE", dumpable);
    rows.unless(&0, "membarrier", membarrier);
    rows.add("auxiliary vector", format!("{} bytes", auxv.len()));
    rows.add("break", format!("{:#x}", layout.brk));
    for mapping in mappings {
        let (start, end) = (mapping.start, mapping.end);
        if let Some(policy) = &mapping.policy {
            rows.add(format!("mbind {start:#x}-{end:#x}"), format!("{policy:?}"));
        }
        if !mapping.flags.is_empty() {
            let name = format!("flags of {start:#x}-{end:#x}");
            rows.add(name, format!("{:?}", mapping.flags));
        }
        if mapping.protection_key != 0 {
            let name = format!("protection key of {start:#x}-{end:#x}");
            rows.add(name, mapping.protection_key.to_string());
        }
        for (from, to) in &mapping.guards {
            rows.add("MADV_GUARD_INSTALL", format!("{from:#x}-{to:#x}"));
        }
    }
}

fn thread(thread: &Thread, rows: &mut Rows) {
    let Thread {
        signal_mask,
        pending,
        alternate_stack,
        rseq,
        robust_list,
        clear_child_tid,
        scheduling,
        credentials,
        parent_death_signal,
        seccomp,
        switches,
        memory_policy,
        thread_areas,
        io_ports,
        core_cookie,
        landlocked,
        dispatch,
        xstate,
        // With the threads and in the summary.
        tid: _,
        name: _,
        regs: _,
        security: _,
    } = thread;
    if *signal_mask != 0 {
        rows.add("blocked signals", format!("{signal_mask:#x}"));
    }
    rows.pending(pending);
    let (stack, flags, size) = alternate_stack;
    if *stack != 0 {
        let value = format!("{size} bytes at {stack:#x}, flags {flags:#x}");
        rows.add("sigaltstack", value);
    }
    if let Some(rseq) = rseq {
        let value = format!("{} bytes at {:#x}", rseq.length, rseq.address);
        rows.add("rseq", value);
    }
    if robust_list.0 != 0 {
        rows.add("robust futex list", format!("{:#x}", robust_list.0));
    }
    if *clear_child_tid != 0 {
        rows.add("set_tid_address", format!("{clear_child_tid:#x}"));
    }
    self::scheduling(scheduling, rows);
    self::credentials(credentials, rows);
    rows.unless(&0, "PR_SET_PDEATHSIG", parent_death_signal);
    match seccomp.mode {
        0 => {}
        1 => rows.add("seccomp", "strict"),
        _ => {
            let (own, around) = (seccomp.filters.len(), seccomp.around);
            let value = format!("{own} filters, {around} of the environment");
            rows.add("seccomp", value);
        }
    }
    rows.switches(switches);
    if let Some(policy) = memory_policy {
        rows.add("set_mempolicy", format!("{policy:?}"));
    }
    rows.each("set_thread_area", thread_areas);
    for (first, count) in io_ports {
        rows.add("ioperm", format!("{count} ports from {first:#x}"));
    }
    if *core_cookie != 0 {
        rows.add("PR_SCHED_CORE", format!("cookie {core_cookie:#x}"));
    }
    if *landlocked {
        rows.add(
            "Landlock",
            "restricted, by rules that the kernel does not show",
        );
    }
    if let Some(dispatch) = dispatch {
        rows.add("PR_SET_SYSCALL_USER_DISPATCH", format!("{dispatch:x?}"));
    }
    rows.add("extended state", format!("{} bytes", xstate.len()));
}

fn scheduling(scheduling: &Scheduling, rows: &mut Rows) {
    let Scheduling {
        attr,
        nice,
        affinity,
        io_priority,
        timer_slack,
    } = scheduling;
    // `struct sched_attr`: the policy follows the size.
    let policy = attr.get(4..8).and_then(|bytes| bytes.first_chunk());
    let policy = policy.map_or(0, |bytes| u32::from_le_bytes(*bytes));
    rows.unless(&0, "scheduling policy", &policy);
    rows.unless(&0, "nice", nice);
    let cpus = affinity.iter().map(|byte| byte.count_ones()).sum::<u32>();
    rows.add("affinity", format!("{cpus} processors"));
    rows.unless(&0, "ioprio_set", io_priority);
    rows.add("timer slack", format!("{timer_slack} ns"));
}

fn credentials(credentials: &Credentials, rows: &mut Rows) {
    let Credentials {
        uid,
        gid,
        groups,
        inheritable,
        permitted,
        effective,
        bounding,
        ambient,
        securebits,
        no_new_privs,
    } = credentials;
    rows.add("uids", format!("{uid:?}"));
    rows.add("gids", format!("{gid:?}"));
    rows.unless(&Vec::new(), "groups", groups);
    for (name, set) in [
        ("CapInh", inheritable),
        ("CapPrm", permitted),
        ("CapEff", effective),
        ("CapBnd", bounding),
        ("CapAmb", ambient),
    ] {
        if *set != 0 {
            rows.add(name, format!("{set:016x}"));
        }
    }
    rows.unless(&0, "securebits", securebits);
    rows.unless(&false, "PR_SET_NO_NEW_PRIVS", no_new_privs);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::dispatch::Dispatch;
    use crate::objects::fixture::snapshot;
    use crate::objects::memory_policy::MemoryPolicy;

    #[test]
    fn what_a_job_has_is_shown() {
        let mut snapshot = snapshot();
        let pid = snapshot.processes[0].pid;
        let process = &mut snapshot.processes[0];
        process.memory.switches.push(Switch {
            name: "PR_SET_MDWE".into(),
            value: 1,
        });
        process.cgroups = vec![Cgroup {
            controllers: "cpu".into(),
            path: "/job".into(),
        }];
        process.threads[0].landlocked = true;
        process.threads[0].dispatch = Some(Dispatch {
            selector: 0x10,
            offset: 0,
            len: 0,
        });
        process.memory.mappings[0].policy = Some(MemoryPolicy {
            mode: 2,
            nodes: vec![0],
        });
        let tid = process.threads[0].tid;
        let views = attributes(&snapshot);
        let value = |tid: Option<i32>, name: &str| {
            let found = views
                .iter()
                .find(|v| (v.pid, v.tid) == (Some(pid), tid) && v.name.starts_with(name));
            found.unwrap_or_else(|| panic!("{name}")).value.clone()
        };
        assert_eq!(value(None, "PR_SET_MDWE"), "1");
        assert_eq!(value(None, "control group"), "cpu:/job");
        assert!(value(None, "mbind 0x").contains("nodes: [0]"));
        assert!(value(Some(tid), "Landlock").contains("restricted"));
        assert!(value(Some(tid), "PR_SET_SYSCALL_USER_DISPATCH").contains("selector: 10"));
    }
}
