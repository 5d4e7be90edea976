//! NUMA memory policies (set_mempolicy(2), mbind(2)): the nodes on which pages are allocated. A policy belongs to a
//! task or to a mapping. The home node of one (set_mempolicy_home_node(2)) cannot be read.

use ckpt_tracer::Result;
use ckpt_tracer::remote::{Call, RemoteCalls};
use serde::{Deserialize, Serialize};

use super::memory::{Backing, Mapping};
use crate::bounds;
use crate::plan::Builder;

/// A policy that is not the default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*` with `MPOL_F_STATIC_NODES`, `MPOL_F_RELATIVE_NODES`, `MPOL_F_NUMA_BALANCING`.
    pub mode: u32,
    /// Its nodes, as given if one of these flags is set, otherwise the effective ones.
    #[serde(deserialize_with = "bounds::node")]
    pub nodes: Vec<u32>,
}

/// `MPOL_DEFAULT`.
const DEFAULT: u32 = 0;
/// `MPOL_F_ADDR`.
const OF_ADDRESS: u64 = 2;
/// Most nodes in a set (`CONFIG_NODES_SHIFT`).
const NODES: usize = 1024;
/// `maxnode`, which the kernel decrements (`get_nodes`, mm/mempolicy.c).
const MAX_NODE: u64 = NODES as u64 + 1;
/// Bytes of a result: the mode, and at byte 8 the nodes.
pub const ROOM: u64 = SET + NODES as u64 / 8;
const SET: u64 = 8;

/// The call that reads a task's own policy; its result at that address takes [`ROOM`] bytes.
pub fn question(at: u64) -> Call {
    let args = [at, at + SET, MAX_NODE, 0, 0];
    Call::new("get_mempolicy", libc::SYS_get_mempolicy, &args)
}

/// The policy at that offset of the scratch memory; `None` if it is the default, or the kernel has no policies.
pub fn read(calls: &RemoteCalls<'_>, offset: u64, answer: i64) -> Result<Option<MemoryPolicy>> {
    if answer != 0 {
        return Ok(None);
    }
    let bytes: [u8; ROOM as usize] = calls.read_scratch(offset)?;
    Ok(MemoryPolicy::of(&bytes))
}

/// Reads the policies of the mappings.
pub fn capture(calls: &mut RemoteCalls<'_>, mappings: &mut [Mapping]) -> Result<()> {
    /// Mappings queried at a time, only their modes, since few have a policy.
    const AT_ONCE: usize = 64;
    let scratch = calls.scratch().raw();
    let ask = |at: u64, set: u64, address: u64| {
        let nodes = if set == 0 { 0 } else { MAX_NODE };
        let args = [at, set, nodes, address, OF_ADDRESS];
        Call::new("get_mempolicy", libc::SYS_get_mempolicy, &args)
    };
    let asked = mappings.iter_mut().filter(|m| m.may_have_policy());
    let mut asked: Vec<&mut Mapping> = asked.collect();
    for mappings in asked.chunks_mut(AT_ONCE) {
        let modes = mappings.iter().enumerate();
        let modes = modes.map(|(i, m)| ask(scratch + 4 * i as u64, 0, m.start));
        let modes: Vec<Call> = modes.collect();
        let answers = calls.batch(4 * AT_ONCE as u64, &modes)?;
        if answers.iter().all(|answer| *answer < 0) {
            // A kernel without NUMA.
            return Ok(());
        }
        let words: [u8; 4 * AT_ONCE] = calls.read_scratch(0)?;
        for (index, mapping) in mappings.iter_mut().enumerate() {
            if answers[index] != 0 || words[4 * index..][..4] == [0; 4] {
                continue;
            }
            let question = ask(scratch, scratch + SET, mapping.start);
            let answer = calls.batch(ROOM.next_multiple_of(64), &[question])?;
            mapping.policy = read(calls, 0, answer[0])?;
        }
    }
    Ok(())
}

/// Our own, which a new process inherits.
pub fn own() -> Option<MemoryPolicy> {
    let (mode, nodes) = ckpt_sys::memory::policy(NODES).ok()?;
    let mut bytes = [0u8; ROOM as usize];
    bytes[..4].copy_from_slice(&mode.to_ne_bytes());
    bytes[SET as usize..].copy_from_slice(&nodes);
    MemoryPolicy::of(&bytes)
}

impl MemoryPolicy {
    fn of(bytes: &[u8; ROOM as usize]) -> Option<Self> {
        let (mode, nodes) = bytes.split_at(SET as usize);
        let mode = u32::from_le_bytes(*mode.first_chunk()?);
        let has = |node: &u32| nodes[(*node / 8) as usize] >> (node % 8) & 1 != 0;
        (mode != DEFAULT).then(|| Self {
            mode,
            nodes: (0..NODES as u32).filter(has).collect(),
        })
    }

    /// Operands of the calls that set it: mode, address of the nodes, `maxnode`.
    fn operands(policy: Option<&Self>, plan: &mut Builder) -> [u64; 3] {
        let Some(policy) = policy else {
            return [DEFAULT.into(), 0, 0];
        };
        if policy.nodes.is_empty() {
            return [policy.mode.into(), 0, 0];
        }
        let mut set = [0u8; NODES / 8];
        for node in policy.nodes.iter().filter(|node| **node < NODES as u32) {
            set[(node / 8) as usize] |= 1 << (node % 8);
        }
        [policy.mode.into(), plan.data(&set), MAX_NODE]
    }

    /// In the syntax of numactl(8).
    fn name(policy: Option<&Self>) -> String {
        const MODES: [&str; 7] = [
            "default",
            "preferred",
            "bind",
            "interleave",
            "local",
            "preferred many",
            "weighted interleave",
        ];
        let Some(policy) = policy else {
            return "default".into();
        };
        let mode = MODES.get((policy.mode & 0xff) as usize).unwrap_or(&"?");
        match policy.nodes.is_empty() {
            true => (*mode).into(),
            false => format!("{mode} on nodes {:?}", policy.nodes),
        }
    }
}

/// Sets the policy of a task, if it differs from ours.
pub fn rebuild(policy: Option<&MemoryPolicy>, plan: &mut Builder) {
    if policy == plan.host().memory_policy.as_ref() {
        return;
    }
    let warning = format!(
        "the memory policy of a thread ({}) is not kept: not all of its nodes may be used here",
        MemoryPolicy::name(policy)
    );
    let args = MemoryPolicy::operands(policy, plan);
    plan.try_syscall(libc::SYS_set_mempolicy, &args, &warning);
}

impl Mapping {
    /// The kernel's own mappings have none.
    fn may_have_policy(&self) -> bool {
        !matches!(self.backing, Backing::Kernel(_) | Backing::AioRing(_))
    }

    /// Sets or clears the policy of a mapping.
    pub(super) fn rebuild_policy(&self, plan: &mut Builder) {
        let policy = self.policy.as_ref();
        let warning = format!(
            "the memory policy of {:#x}-{:#x} ({}) is not kept: not all of its nodes may be used here",
            self.start,
            self.end,
            MemoryPolicy::name(policy)
        );
        let [mode, nodes, max] = MemoryPolicy::operands(policy, plan);
        let args = [self.start, self.end - self.start, mode, nodes, max, 0];
        plan.try_syscall(libc::SYS_mbind, &args, &warning);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_and_written_alike() {
        let policy = MemoryPolicy {
            mode: 3 | 1 << 15,
            nodes: vec![0, 9, 1023],
        };
        let mut plan = Builder::new(0, Default::default());
        let [mode, at, max] = MemoryPolicy::operands(Some(&policy), &mut plan);
        let plan = plan.finish();
        let set = &plan.image[(at - plan.base) as usize..][..NODES / 8];
        let mut bytes = [0; ROOM as usize];
        bytes[..4].copy_from_slice(&(mode as u32).to_le_bytes());
        bytes[SET as usize..].copy_from_slice(set);
        assert_eq!(MemoryPolicy::of(&bytes), Some(policy));
        assert_eq!(max, 1025);
    }

    #[test]
    fn the_default_is_none() {
        assert_eq!(MemoryPolicy::of(&[0; ROOM as usize]), None);
    }
}
