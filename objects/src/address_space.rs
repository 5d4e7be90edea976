//! The address space as a whole: the fields of `struct mm_struct`, the executable, the auxiliary vector. Its mappings
//! are in [`memory`](super::memory).

use ckpt_tracer::Result;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::remote::RemoteCalls;
use serde::{Deserialize, Serialize};

use super::SpaceId;
use super::memory::Mapping;
use super::segments::{self, Segment};
use super::switches::{self, Scope, Switch};
use crate::bounds;
use crate::index::FileId;
use crate::plan::Builder;

/// An address space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressSpace {
    /// Its pages in the image.
    pub space: SpaceId,
    /// The program's address ranges (`/proc/PID/stat`, `PR_SET_MM_MAP`).
    pub layout: Layout,
    /// The auxiliary vector, as `/proc/PID/auxv` shows it.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// Index of the executable in the snapshot's mapped files.
    pub executable: FileId,
    /// Its mappings, in ascending order, without the vsyscall page.
    pub mappings: Vec<Mapping>,
    /// Pages equal to those of the parent's address space, and stored there; ascending.
    pub inherited: Vec<(u64, u64)>,
    /// `MCL_FUTURE`, possibly with `MCL_ONFAULT`, if future mappings are locked; otherwise 0.
    #[serde(deserialize_with = "bounds::choice")]
    pub lock_future: u32,
    /// `PR_GET_THP_DISABLE` in images without [`switches`](Self::switches).
    #[serde(default, skip_serializing)]
    pub thp_disabled: bool,
    /// Its switches.
    #[serde(default)]
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub switches: Vec<Switch>,
    /// The local descriptor table.
    #[serde(default)]
    #[serde(deserialize_with = "bounds::few::<_, _, 8192>")]
    pub segments: Vec<Segment>,
    /// `PR_GET_DUMPABLE`: 0, 1 or 2.
    #[serde(deserialize_with = "bounds::choice")]
    pub dumpable: u32,
    /// Bits of `MEMBARRIER_CMD_REGISTER_*` that the process has registered.
    pub membarrier: u32,
}

/// Addresses that the kernel records for a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    /// The current break; not page aligned in general.
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// `MEMBARRIER_CMD_GLOBAL_EXPEDITED`, `PRIVATE_EXPEDITED`, `PRIVATE_EXPEDITED_SYNC_CORE` and
/// `PRIVATE_EXPEDITED_RSEQ`; the next bit of each is the registration.
const MEMBARRIERS: [u64; 4] = [1 << 1, 1 << 3, 1 << 5, 1 << 7];
/// `MEMBARRIER_CMD_GET_REGISTRATIONS` (Linux 6.3).
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;

/// The fields that only a call made in the process can read.
#[derive(Clone, Debug)]
pub struct Asked {
    /// See [`Layout::brk`].
    pub brk: u64,
    /// See [`AddressSpace::dumpable`].
    pub dumpable: u32,
    /// See [`AddressSpace::switches`].
    pub switches: Vec<Switch>,
    /// See [`AddressSpace::membarrier`].
    pub membarrier: u32,
}

/// Reads what `/proc` does not show.
pub fn capture(calls: &mut RemoteCalls<'_>) -> Result<Asked> {
    let brk = calls.call("brk", libc::SYS_brk, [0; 6])?;
    let get_dumpable = [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0, 0];
    let dumpable = calls.call("prctl(PR_GET_DUMPABLE)", libc::SYS_prctl, get_dumpable)? as u32;
    let questions = switches::Questions::new(true, 0);
    let list = switches::Questions::ROOM.next_multiple_of(64);
    let answers = calls.batch(list, &questions.calls(calls.scratch()))?;
    let switches = questions.read(calls, &answers)?;
    let mut membarrier = |command: u64| {
        let args = [command, 0, 0, 0, 0, 0];
        calls.call("membarrier", libc::SYS_membarrier, args)
    };
    let membarrier = match membarrier(MEMBARRIER_GET_REGISTRATIONS) {
        Ok(registered) => registered as u32,
        // MEMBARRIER_CMD_GET_REGISTRATIONS is Linux 6.3; before, probe: an unregistered process gets EPERM from the
        // private commands. The global one has no such check, so it is registered: over-registering is harmless.
        Err(_) => MEMBARRIERS
            .into_iter()
            .filter(|command| membarrier(*command).is_ok())
            .fold(0, |all, command| all | (command << 1) as u32),
    };
    Ok(Asked {
        brk,
        dumpable,
        switches,
        membarrier,
    })
}

/// Break, executable and argument ranges from `/proc/PID/stat`.
pub fn layout(stat: &ckpt_tracer::proc::stat::Stat, brk: u64) -> Layout {
    Layout {
        start_code: stat.start_code,
        end_code: stat.end_code,
        start_data: stat.start_data,
        end_data: stat.end_data,
        start_brk: stat.start_brk,
        brk,
        start_stack: stat.start_stack,
        arg_start: stat.arg_start,
        arg_end: stat.arg_end,
        env_start: stat.env_start,
        env_end: stat.env_end,
    }
}

impl AddressSpace {
    /// Sets the fields of the address space after everything is mapped (`PR_SET_MM_MAP`, which needs no privilege as
    /// long as the executable is unchanged; the exec has set that).
    pub fn rebuild_fields(&self, plan: &mut Builder) {
        const PR_SET_MM_MAP: u64 = 14;
        let l = &self.layout;
        let auxv = plan.data(&self.auxv);
        let words = [
            l.start_code,
            l.end_code,
            l.start_data,
            l.end_data,
            l.start_brk,
            l.brk,
            l.start_stack,
            l.arg_start,
            l.arg_end,
            l.env_start,
            l.env_end,
            auxv,
        ];
        let mut map = words.map(u64::to_le_bytes).concat();
        map.extend_from_slice(&(self.auxv.len() as u32).to_le_bytes());
        map.extend_from_slice(&u32::MAX.to_le_bytes());
        let at = plan.data(&map);
        let args = [libc::PR_SET_MM as u64, PR_SET_MM_MAP, at, map.len() as u64];
        plan.syscall(libc::SYS_prctl, &args, || {
            "the fields of the address space".into()
        });
        for bit in (0..32).filter(|bit| self.membarrier & 1 << bit != 0) {
            let args = [1u64 << bit, 0, 0];
            plan.syscall(libc::SYS_membarrier, &args, || {
                "a membarrier registration".into()
            });
        }
        segments::rebuild_local(&self.segments, plan);
        let mut switches = self.switches.clone();
        if self.thp_disabled {
            switches.push(Switch {
                name: "PR_SET_THP_DISABLE".into(),
                value: 1,
            });
        }
        switches::rebuild(&switches, Scope::Memory, plan);
        let merges = |s: &Switch| s.name == switches::MEMORY_MERGE && s.value != 0;
        if switches.iter().any(merges) {
            // The switch marks all existing mappings. Those that it did not cover, such as the stack of a program
            // executed with it, are unmarked.
            self.mappings.iter().for_each(|m| m.unmerge(plan));
        }
    }

    /// Operations that need the complete mappings: `mlockall`, seals, `PR_SET_MDWE`.
    pub fn rebuild_locks(&self, plan: &mut Builder) {
        if self.lock_future != 0 {
            plan.try_syscall(
                libc::SYS_mlockall,
                &[self.lock_future.into()],
                &format!(
                    "mlockall(MCL_FUTURE) is not in force; it may need {}",
                    Use::LockMemory
                ),
            );
        }
        for mapping in &self.mappings {
            mapping.seal(plan);
        }
        switches::rebuild(&self.switches, Scope::FinishedMemory, plan);
    }

    /// Sets dumpability, which a change of credentials resets.
    pub fn rebuild_dumpable(&self, plan: &mut Builder) {
        // 2 is set by the kernel only, for privileged programs; 0 is the nearest.
        if self.dumpable > 1 {
            plan.warn(
                "the process was dumpable for root alone (fs.suid_dumpable) and is not dumpable \
                 at all now"
                    .to_owned(),
            );
        }
        let dumpable = u64::from(self.dumpable == 1);
        plan.syscall(
            libc::SYS_prctl,
            &[libc::PR_SET_DUMPABLE as u64, dumpable],
            || "dumpability".into(),
        );
    }
}

#[cfg(test)]
mod tests {

    use crate::fixture;
    use crate::plan::{Builder, HostState};

    #[test]
    fn a_dumpability_that_cannot_be_set_is_reported() {
        let warnings = |dumpable| {
            let host = HostState::default();
            let mut plan = Builder::new(0, host);
            let mut memory = fixture::snapshot().processes.remove(0).memory;
            memory.dumpable = dumpable;
            memory.rebuild_dumpable(&mut plan);
            plan.finish().warnings
        };
        assert_eq!(warnings(0), [""; 0]);
        assert_eq!(warnings(1), [""; 0]);
        assert_eq!(warnings(2).len(), 1);
        assert!(warnings(2)[0].contains("suid_dumpable"));
    }
}
