//! NUMA memory policies (set_mempolicy(2), mbind(2)): the nodes on which pages are allocated. A policy belongs to a
//! task or to a mapping. The home node of one (set_mempolicy_home_node(2)) cannot be read.

use ckpt_tracer::Result;
use ckpt_tracer::remote::{Call, RemoteCalls};
use serde::{Deserialize, Serialize};

use std::collections::BTreeMap;

use super::files::Description;
use super::files::memfd::MemFd;
use super::files::saved::is_shared_memory;
use super::memory::{Backing, MappedFile, Mapping};
use crate::Snapshot;
use crate::bounds;
use crate::index::FileId;
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

/// Of a mapping of shared memory, with a name or none: which object that is, as a number of its kind, and where the mapping begins in
/// it. A policy there is the object's (`shmem_set_policy`, mm/shmem.c), also where it is mapped privately; that of other
/// mappings is their own.
pub(crate) fn object(
    backing: &Backing,
    descriptions: &[Description],
    files: &[MappedFile],
) -> Option<((u8, usize), u64)> {
    let named = |file: FileId| file.find(files).is_some_and(|f| is_shared_memory(&f.path));
    match *backing {
        Backing::SharedFile { file, offset, .. } | Backing::PrivateFile { file, offset }
            if named(file) =>
        {
            Some(((0, file.0), offset))
        }
        Backing::SharedMemory { object, offset } => Some(((1, object.0), offset)),
        Backing::SysV {
            segment, offset, ..
        } => Some(((2, segment.0), offset)),
        Backing::Description {
            description,
            offset,
            ..
        } => {
            let memfd = description.find(descriptions)?.kind.get::<MemFd>();
            memfd
                .filter(|memfd| memfd.huge_page_size == 0)
                .map(|_| ((3, description.0), offset))
        }
        _ => None,
    }
}

/// A mapping of a shared object, in bytes of that, with the policy at its start.
struct View {
    start: u64,
    end: u64,
    policy: Option<MemoryPolicy>,
    /// Where in it another one begins that has another policy.
    until: Option<u64>,
}

/// Decides which mapping of a shared object has its policy. It belongs to ranges of the object (`shmem_get_policy`, mm/shmem.c), and of a
/// mapping only that at its start is told; where it changes, mappings of the process that set it begin. One in which others begin
/// has it no further than up to there, and not at all where others have it up to there.
pub fn attribute(snapshot: &mut Snapshot) {
    let (descriptions, files) = (&snapshot.descriptions, &snapshot.mapped_files);
    let object = |m: &Mapping| object(&m.backing, descriptions, files);
    let processes = &mut snapshot.processes;
    let mut objects: BTreeMap<_, Vec<View>> = BTreeMap::new();
    for mapping in processes.iter().flat_map(|p| &p.memory.mappings) {
        if let Some((object, start)) = object(mapping) {
            objects.entry(object).or_default().push(View {
                start,
                end: start + (mapping.end - mapping.start),
                policy: mapping.policy.clone(),
                until: None,
            });
        }
    }
    for views in objects.values_mut() {
        let begins: Vec<_> = views.iter().map(|v| (v.start, v.policy.clone())).collect();
        for view in views {
            let inside = |at: u64| view.start < at && at < view.end;
            let others = begins.iter().filter(|(_, policy)| *policy != view.policy);
            view.until = others.map(|(at, _)| *at).filter(|at| inside(*at)).min();
        }
    }
    for process in processes {
        let mappings = std::mem::take(&mut process.memory.mappings);
        let divided = mappings.into_iter().flat_map(|mapping| {
            let of = object(&mapping).filter(|_| mapping.policy.is_some());
            let views = of.and_then(|(object, start)| Some((start, objects.get(&object)?)));
            match views {
                Some((start, views)) => divide(mapping, start, views),
                None => vec![mapping],
            }
        });
        process.memory.mappings = divided.collect();
    }
}

/// The parts of a mapping that begins there in an object, each with the policy that it has at a restore.
fn divide(mut mapping: Mapping, start: u64, views: &[View]) -> Vec<Mapping> {
    let end = start + (mapping.end - mapping.start);
    let alike = |v: &&View| v.policy == mapping.policy;
    let own = views
        .iter()
        .filter(alike)
        .find(|v| (v.start, v.end) == (start, end));
    let Some(until) = own.and_then(|v| v.until) else {
        return vec![mapping];
    };
    let mut at = start;
    let whole = |at: u64| {
        let mut whole = views.iter().filter(alike).filter(|v| v.until.is_none());
        whole.find(|v| v.start <= at && at < v.end)
    };
    while let Some(view) = whole(at).filter(|_| at < until) {
        at = view.end;
    }
    if at >= until {
        mapping.policy = None;
        return vec![mapping];
    }
    let middle = mapping.start + (until - start);
    let mut rest = mapping.piece(middle, mapping.end);
    rest.policy = None;
    vec![mapping.piece(mapping.start, middle), rest]
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

    /// A process has set the policy of the first of three pages; its child has all in one mapping, another one the last two
    /// of a larger part.
    #[test]
    fn mappings_have_the_policy_as_far_as_it_is_known() {
        let mut snapshot = crate::fixture::snapshot();
        let policy = Some(MemoryPolicy {
            mode: 2,
            nodes: vec![0],
        });
        let mapping = |start: u64, pages: u64, page: u64, policy: &Option<MemoryPolicy>| Mapping {
            start,
            end: start + pages * 4096,
            prot: 3,
            backing: Backing::SharedMemory {
                object: crate::index::SharedId(0),
                offset: page * 4096,
            },
            flags: crate::memory::MappingFlags::empty(),
            name: None,
            protection_key: 0,
            guards: vec![(start, start + 4096)],
            policy: policy.clone(),
        };
        let of = |snapshot: &mut Snapshot, mappings: &[&[Mapping]]| {
            let process = snapshot.processes[0].clone();
            let with = |mappings: &&[Mapping]| {
                let mut process = process.clone();
                process.memory.mappings = mappings.to_vec();
                process
            };
            snapshot.processes = mappings.iter().map(with).collect();
            attribute(snapshot);
            let all = snapshot.processes.iter();
            all.map(|p| p.memory.mappings.clone()).collect::<Vec<_>>()
        };
        let parts = [
            mapping(0x10000, 1, 1, &policy),
            mapping(0x11000, 2, 2, &None),
        ];
        let child = [mapping(0x50000, 3, 1, &policy)];
        let expected = vec![parts.to_vec(), vec![mapping(0x50000, 3, 1, &None)]];
        assert_eq!(of(&mut snapshot, &[&parts, &child]), expected);
        // No other policy starts at its first page.
        let child = [mapping(0x50000, 4, 0, &policy)];
        let mut rest = mapping(0x52000, 2, 2, &None);
        rest.guards.clear();
        let expected = vec![parts.to_vec(), vec![mapping(0x50000, 2, 0, &policy), rest]];
        assert_eq!(of(&mut snapshot, &[&parts, &child]), expected);
    }

    #[test]
    fn the_default_is_none() {
        assert_eq!(MemoryPolicy::of(&[0; ROOM as usize]), None);
    }
}
