//! Resource limits.

use ckpt_tracer::Pid;
use ckpt_tracer::capabilities::{Capability, Use, is_in_first_user_namespace};
use ckpt_tracer::proc::maps::{VmFlags, Vma, VmaName};
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::plan::Builder;
use crate::source::Source;

/// One limit (getrlimit(2)); `u64::MAX` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// `RLIMIT_*`.
    #[serde(deserialize_with = "bounds::resource")]
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// The limits of a process.
pub fn capture(pid: Pid) -> ckpt_tracer::Result<Vec<Limit>> {
    let limits = ckpt_tracer::proc::limits::read_limits(pid)?;
    Ok(limits
        .into_iter()
        .map(|l| Limit {
            resource: l.resource as u32,
            soft: l.soft,
            hard: l.hard,
        })
        .collect())
}

/// A limit of memory that permits less than `len` more bytes of private memory in a process with these mappings, if
/// any: its name, and the value needed (`may_expand_vm`, mm/vma.c).
pub fn without_room(limits: &[Limit], vmas: &[Vma], len: u64) -> Option<(&'static str, u64)> {
    let used = |counts: &dyn Fn(&Vma) -> bool| {
        let vmas = vmas.iter().filter(|v| v.name != VmaName::Vsyscall);
        let sizes = vmas.filter(|v| counts(v)).map(|v| v.end - v.start);
        sizes.sum::<u64>()
    };
    let is_data = |v: &Vma| {
        let grows = v.name == VmaName::Stack || v.flags.contains(VmFlags::GROWS_DOWN);
        v.write && !v.shared && !grows
    };
    let all = (libc::RLIMIT_AS, "--as", used(&|_| true));
    let data = (libc::RLIMIT_DATA, "--data", used(&is_data));
    [all, data]
        .into_iter()
        .find_map(|(resource, option, used)| {
            let limit = limits.iter().find(|l| l.resource == resource)?;
            // may_expand_vm ignores a soft RLIMIT_DATA of 0 and uses the hard limit.
            let most = match limit.soft == 0 && resource == libc::RLIMIT_DATA {
                true => limit.hard,
                false => limit.soft,
            };
            let wanted = used + len.next_multiple_of(4096);
            (wanted > most).then_some((option, wanted))
        })
}

/// The same for locked memory (`mlock_future_ok`, mm/mmap.c). Whether future mappings will be locked (`MCL_FUTURE`)
/// is not visible; it is assumed if everything lockable is locked.
pub fn locked_without_room(
    limits: &[Limit],
    source: &Source,
    vmas: &[Vma],
    len: u64,
) -> Option<(&'static str, u64)> {
    let never = VmFlags::DONT_EXPAND | VmFlags::PFN_MAP | VmFlags::HUGETLB | VmFlags::DROPPABLE;
    let can_be = |v: &&Vma| v.name != VmaName::Vsyscall && !v.flags.intersects(never);
    let lockable: Vec<&Vma> = vmas.iter().filter(can_be).collect();
    if !lockable.iter().all(|v| v.flags.contains(VmFlags::LOCKED)) {
        return None;
    }
    let limit = limits.iter().find(|l| l.resource == libc::RLIMIT_MEMLOCK)?;
    let locked: u64 = lockable.iter().map(|v| v.end - v.start).sum();
    let wanted = locked + len.next_multiple_of(4096);
    let may = || {
        let effective = source.status.capabilities.effective;
        effective & Capability::IpcLock.bit() != 0
            && is_in_first_user_namespace(&source.dir.join(""))
    };
    (wanted > limit.soft && !may()).then_some(("--memlock", wanted))
}

const SIGPENDING: u32 = libc::RLIMIT_SIGPENDING;

/// Sets the limits. If a hard limit cannot be raised to its old value, only the soft limit is set as far as possible;
/// the result is checked afterwards and reported as a warning. The limit of pending signals stays at its maximum if
/// signals are queued only after the restorer has gone, see [`last`]: above the limit the kernel queues them without
/// their siginfo.
pub fn rebuild(limits: &[Limit], signals_come: bool, plan: &mut Builder) {
    let may_raise = plan.host().held.allows(Use::HardLimits);
    for limit in limits {
        let now = current(limit.resource);
        let hard = if limit.hard > now.1 && !may_raise {
            now.1
        } else {
            limit.hard
        };
        let soft = limit.soft.min(hard);
        if hard < limit.hard {
            plan.warn(format!(
                "the hard limit of {} is {} instead of {}: raising it needs {}",
                name(limit.resource),
                hard,
                limit.hard,
                Use::HardLimits
            ));
        }
        let both = match signals_come && limit.resource == SIGPENDING {
            true => [hard.max(now.1); 2],
            false => [soft, hard],
        };
        let at = plan.data(&both.map(u64::to_le_bytes).concat());
        plan.syscall(
            libc::SYS_prlimit64,
            &[0, u64::from(limit.resource), at, 0],
            || format!("the limit of {}", name(limit.resource)),
        );
    }
}

/// The final limit of pending signals, soft and hard, to be set after they are queued.
pub fn last(limits: &[Limit], pid: Pid) -> ckpt_tracer::Result<Option<[u64; 2]>> {
    let now = ckpt_tracer::proc::limits::read_limits(pid)?;
    let now = now.iter().find(|l| l.resource as u32 == SIGPENDING);
    let limit = limits.iter().find(|l| l.resource == SIGPENDING);
    Ok(now.zip(limit).map(|(now, limit)| {
        let hard = limit.hard.min(now.hard);
        [limit.soft.min(hard), hard]
    }))
}

/// Our own limit, which restored processes inherit.
pub fn current(resource: u32) -> (u64, u64) {
    read(resource).unwrap_or((u64::MAX, u64::MAX))
}

fn read(resource: u32) -> Option<(u64, u64)> {
    if let Ok(limit) = ckpt_sys::tasks::limit(0, resource as i32) {
        return Some(limit);
    }
    // Where a filter of ours withholds the call, the file has it.
    let limits = ckpt_tracer::proc::limits::read_limits_file(Pid::own()).ok()?;
    limits
        .iter()
        .find(|l| l.resource as u32 == resource)
        .map(|l| (l.soft, l.hard))
}

/// `RLIMIT_NOFILE` and so on, for messages.
pub fn name(resource: u32) -> &'static str {
    const NAMES: [&str; 16] = [
        "CPU time",
        "file size",
        "data size",
        "stack size",
        "core file size",
        "resident set",
        "processes",
        "open files",
        "locked memory",
        "address space",
        "file locks",
        "pending signals",
        "message queue bytes",
        "nice",
        "real-time priority",
        "real-time time",
    ];
    NAMES
        .get(resource as usize)
        .copied()
        .unwrap_or("an unknown resource")
}

/// Raises our limit of descriptors to the hard one, and if permitted to the kernel's maximum (`fs.nr_open`): a job
/// may have many, and we hold a duplicate of each.
pub fn raise_descriptor_limit() {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").unwrap_or_default();
    let most: u64 = most.trim().parse().unwrap_or(0);
    let Ok((_, own)) = ckpt_sys::tasks::limit(0, libc::RLIMIT_NOFILE as i32) else {
        return;
    };
    for hard in [most.max(own), own] {
        if ckpt_sys::files::set_descriptor_limit(hard, hard).is_ok() {
            return;
        }
    }
}
