//! Switches: attributes of a task, or of its memory, that one call reads and one call sets (prctl(2), arch_prctl(2)).
//! Each is a row of the table. docs/attributes.md lists the attributes that are not switches.

use ckpt_sys::prctl;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::stat::read_stat;
use ckpt_tracer::remote::{Call, RemoteCalls};
use ckpt_tracer::{Pid, RemoteAddr, Result};
use serde::{Deserialize, Serialize};

use crate::error::Obstacle;
use crate::plan::Builder;

/// A switch whose value differs from the system's default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// The constant that sets it, such as `PR_SET_TSC`.
    pub name: String,
    /// The value that its get operation returns.
    pub value: u64,
}

/// Marks all present and future mappings that may be mergeable with `MADV_MERGEABLE`.
pub const MEMORY_MERGE: &str = "PR_SET_MEMORY_MERGE";

/// The object of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A task.
    Task,
    /// An address space.
    Memory,
    /// An address space whose mappings have their protections; nothing is mapped afterwards.
    FinishedMemory,
}

/// How the present value is read.
#[derive(Clone, Copy, Debug)]
enum Ask {
    /// The result of the call.
    Answer(i64, [u64; 2]),
    /// An `int` that the call writes to the address in its second operand.
    Written(i64, u64),
    /// Bits of `flags` in `/proc/PID/stat`, all or none; 1 is all.
    Flags(u32),
}

/// A row of the table.
struct Row {
    name: &'static str,
    what: &'static str,
    scope: Scope,
    /// The value in the first process of a system.
    default: u64,
    ask: Ask,
    set: fn(u64) -> (i64, [u64; 3]),
    /// What setting it needs.
    takes: Option<Use>,
}

const PRCTL: i64 = libc::SYS_prctl;
/// `PR_SPEC_PRCTL`: the mitigation is configurable per task; `PR_SPEC_*`, linux/prctl.h.
const SPEC_PRCTL: u64 = 1;
/// `PR_SPEC_PRCTL | PR_SPEC_ENABLE`.
const SPEC_ENABLED: u64 = 3;
/// `PR_SPEC_PRCTL | PR_SPEC_DISABLE`.
const SPEC_DISABLED: u64 = 5;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_SET_SPECULATION_CTRL: u64 = 53;
const SPECULATION: &str = "PR_SET_SPECULATION_CTRL";
/// `PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE`, include/linux/sched.h: reading it by prctl(2) needs a capability.
const IO_FLUSHER: u32 = 0x0008_0000 | 0x0010_0000;

const TABLE: &[Row] = &[
    Row {
        name: "PR_SET_TSC",
        what: "the use of the time stamp counter",
        scope: Scope::Task,
        default: 1,
        ask: Ask::Written(PRCTL, 25),
        set: |value| (PRCTL, [26, value, 0]),
        takes: None,
    },
    Row {
        name: "ARCH_SET_CPUID",
        what: "the use of the CPUID instruction",
        scope: Scope::Task,
        default: 1,
        ask: Ask::Answer(libc::SYS_arch_prctl, [0x1011, 0]),
        set: |value| (libc::SYS_arch_prctl, [0x1012, value, 0]),
        takes: None,
    },
    Row {
        name: "PR_MCE_KILL",
        what: "the machine check policy",
        scope: Scope::Task,
        default: 2,
        ask: Ask::Answer(PRCTL, [34, 0]),
        set: |value| (PRCTL, [33, 1, value]),
        takes: None,
    },
    Row {
        name: "PR_SET_SPECULATION_CTRL/PR_SPEC_STORE_BYPASS",
        what: "speculative store bypass",
        scope: Scope::Task,
        default: SPEC_ENABLED,
        ask: Ask::Answer(PRCTL, [PR_GET_SPECULATION_CTRL, 0]),
        set: |value| (PRCTL, [PR_SET_SPECULATION_CTRL, 0, value & !SPEC_PRCTL]),
        takes: None,
    },
    Row {
        name: "PR_SET_SPECULATION_CTRL/PR_SPEC_INDIRECT_BRANCH",
        what: "indirect branch speculation",
        scope: Scope::Task,
        default: SPEC_ENABLED,
        ask: Ask::Answer(PRCTL, [PR_GET_SPECULATION_CTRL, 1]),
        set: |value| (PRCTL, [PR_SET_SPECULATION_CTRL, 1, value & !SPEC_PRCTL]),
        takes: None,
    },
    Row {
        name: "PR_SET_SPECULATION_CTRL/PR_SPEC_L1D_FLUSH",
        what: "the flush of the L1 data cache",
        scope: Scope::Task,
        default: SPEC_DISABLED,
        ask: Ask::Answer(PRCTL, [PR_GET_SPECULATION_CTRL, 2]),
        set: |value| (PRCTL, [PR_SET_SPECULATION_CTRL, 2, value & !SPEC_PRCTL]),
        takes: None,
    },
    Row {
        name: "PR_SET_IO_FLUSHER",
        what: "the I/O flusher state",
        scope: Scope::Task,
        default: 0,
        ask: Ask::Flags(IO_FLUSHER),
        set: |value| (PRCTL, [57, value, 0]),
        takes: Some(Use::IoFlusher),
    },
    Row {
        name: "PR_SET_THP_DISABLE",
        what: "the switch for transparent huge pages",
        scope: Scope::Memory,
        default: 0,
        ask: Ask::Answer(PRCTL, [42, 0]),
        // The other bits are flags (Linux 6.18).
        set: |value| (PRCTL, [41, value & 1, value & !1]),
        takes: None,
    },
    Row {
        name: MEMORY_MERGE,
        what: "the merging of equal pages",
        scope: Scope::Memory,
        default: 0,
        ask: Ask::Answer(PRCTL, [68, 0]),
        set: |value| (PRCTL, [67, value, 0]),
        takes: None,
    },
    Row {
        name: "PR_SET_MDWE",
        what: "the denial of memory that is writable and executable",
        scope: Scope::FinishedMemory,
        default: 0,
        ask: Ask::Answer(PRCTL, [66, 0]),
        set: |value| (PRCTL, [65, value, 0]),
        takes: None,
    },
];

impl Row {
    /// The value for a result; `None` if the kernel lacks the switch, or has it fixed.
    fn value(&self, answer: i64) -> Option<u64> {
        let value = u64::try_from(answer).ok()?;
        let fixed = self.name.starts_with(SPECULATION) && value & SPEC_PRCTL == 0;
        (!fixed).then_some(value)
    }
}

/// The names of all; for several in one constant, with a leading `/`.
pub fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|row| row.name)
}

/// Queries of a task, as part of a batch.
pub struct Questions {
    rows: Vec<&'static Row>,
    /// Offset of the results in the scratch memory, four bytes for each row.
    offset: u64,
}

impl Questions {
    /// Bytes of scratch memory for the results.
    pub const ROOM: u64 = 4 * TABLE.len() as u64;

    /// For the task, or with `memory` for its memory.
    pub fn new(memory: bool, offset: u64) -> Self {
        let of_it = |row: &&Row| (row.scope != Scope::Task) == memory;
        Self {
            rows: TABLE.iter().filter(of_it).collect(),
            offset,
        }
    }

    /// The calls.
    pub fn calls(&self, scratch: RemoteAddr) -> Vec<Call> {
        let rows = self.rows.iter().enumerate();
        let call = |(index, row): (usize, &&Row)| match row.ask {
            Ask::Answer(nr, args) => Some(Call::new(row.name, nr, &args)),
            Ask::Written(nr, option) => {
                let place = scratch + (self.offset + 4 * index as u64);
                Some(Call::new(row.name, nr, &[option, place.raw()]))
            }
            Ask::Flags(_) => None,
        };
        rows.filter_map(call).collect()
    }

    /// The switches that differ from the default, by the results.
    pub fn read(&self, calls: &RemoteCalls<'_>, answers: &[i64]) -> Result<Vec<Switch>> {
        let mut answers = answers.iter();
        let mut switches = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            let answer = match row.ask {
                Ask::Answer(..) => answers.next().copied().unwrap_or(-1),
                Ask::Written(..) => match answers.next() {
                    Some(0) => {
                        let at = self.offset + 4 * index as u64;
                        i32::from_le_bytes(calls.read_scratch(at)?).into()
                    }
                    _ => -1,
                },
                Ask::Flags(bits) => {
                    let stat = read_stat((calls.pid(), calls.tid()))?;
                    i64::from(stat.flags & bits == bits)
                }
            };
            let value = row.value(answer).filter(|value| *value != row.default);
            switches.extend(value.map(|value| Switch {
                name: row.name.into(),
                value,
            }));
        }
        Ok(switches)
    }
}

/// The values that a new process inherits from us, where the kernel has the switch.
#[derive(Clone, Debug)]
pub struct Ours(Vec<Option<u64>>);

impl Default for Ours {
    /// All defaults.
    fn default() -> Self {
        Self(TABLE.iter().map(|row| Some(row.default)).collect())
    }
}

impl Ours {
    /// Reads our own.
    pub fn ask() -> Self {
        let ask = |row: &Row| {
            let answer =
                match row.ask {
                    Ask::Answer(call, [option, which]) => prctl::get_number(call, option, which),
                    // The only switch of this kind.
                    Ask::Written(..) => prctl::tsc().map(i64::from),
                    Ask::Flags(bits) => Ok(read_stat(Pid::own())
                        .map_or(-1, |stat| i64::from(stat.flags & bits == bits))),
                };
            let answer = answer.unwrap_or(-1);
            row.value(answer)
        };
        Self(TABLE.iter().map(ask).collect())
    }

    /// A switch of ours that prevents a restore: `PR_SET_MDWE` is irrevocable, and the restorer must be made
    /// executable.
    pub fn obstacle(&self) -> Option<Obstacle> {
        let rows = TABLE.iter().zip(&self.0);
        let mut set = rows.filter(|(row, value)| {
            row.scope == Scope::FinishedMemory && value.is_some_and(|value| value != row.default)
        });
        set.next().map(|(row, _)| {
            Obstacle::new(
                "restore",
                format!(
                    "runs under {}, {}, which its processes inherit and which cannot be revoked",
                    row.name, row.what
                ),
                "start it without that (MemoryDenyWriteExecute=no in a unit of systemd)",
            )
        })
    }
}

/// Sets the switches that differ from those inherited from us.
pub fn rebuild(switches: &[Switch], scope: Scope, plan: &mut Builder) {
    let ours = plan.host().switches.clone();
    for (row, ours) in TABLE.iter().zip(ours.0) {
        let given = switches.iter().find(|switch| switch.name == row.name);
        let wanted = given.map_or(row.default, |switch| switch.value);
        if row.scope != scope || ours.unwrap_or(row.default) == wanted {
            continue;
        }
        let (nr, args) = (row.set)(wanted);
        let warning = match row.takes {
            Some(takes) => format!("{} is not kept; it may need {takes}", row.what),
            None => format!("{} is not kept", row.what),
        };
        plan.try_syscall(nr, &args, &warning);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::HostState;

    /// The operations, as text, for one switch of a job and ours.
    fn planned(name: &str, value: u64, scope: Scope, ours: &[(&str, Option<u64>)]) -> String {
        let mut host = HostState::default();
        for (name, value) in ours {
            let at = TABLE.iter().position(|row| row.name == *name);
            host.switches.0[at.expect("a row")] = *value;
        }
        let mut plan = Builder::new(0, host);
        let switch = Switch {
            name: name.into(),
            value,
        };
        rebuild(&[switch], scope, &mut plan);
        plan.finish().to_text()
    }

    #[test]
    fn what_differs_from_ours_is_set() {
        let tsc = planned("PR_SET_TSC", 2, Scope::Task, &[]);
        assert!(tsc.contains("0x1a") || tsc.contains("26"), "{tsc}");
        assert_eq!(planned("PR_SET_TSC", 2, Scope::Memory, &[]).trim(), "");
        let ours = [("PR_SET_TSC", Some(2))];
        assert_eq!(planned("PR_SET_TSC", 2, Scope::Task, &ours).trim(), "");
        // A job with the default must not get ours.
        assert_ne!(planned("other", 0, Scope::Task, &ours).trim(), "");
    }

    /// A filter that kills on one of them must kill a child of ours and not the job.
    #[test]
    fn each_question_is_tried_first() {
        let tried = ckpt_tracer::trial::remote_calls();
        for row in TABLE {
            let (nr, [option, which]) = match row.ask {
                Ask::Answer(nr, args) => (nr, args),
                Ask::Written(nr, option) => (nr, [option, 1]),
                Ask::Flags(_) => continue,
            };
            let it = |c: &&ckpt_tracer::remote::Call| {
                (c.nr, c.args[0], c.args[1]) == (nr, option, which)
            };
            assert!(tried.iter().any(|c| it(&c)), "{}", row.name);
        }
    }

    #[test]
    fn speculation_that_is_set_for_all_is_no_switch() {
        let row = |name: &str| TABLE.iter().find(|r| r.name.ends_with(name));
        let row = row("STORE_BYPASS").expect("a row");
        assert_eq!(row.value(2), None);
        assert_eq!(row.value(-19), None);
        assert_eq!(row.value(5), Some(5));
    }

    #[test]
    fn mdwe_of_ours_is_in_the_way() {
        assert!(Ours::default().obstacle().is_none());
        let mut ours = Ours::default();
        let at = TABLE.iter().position(|row| row.name == "PR_SET_MDWE");
        ours.0[at.expect("a row")] = Some(1);
        let obstacle = ours.obstacle().expect("refused");
        assert!(obstacle.reason.contains("PR_SET_MDWE"));
    }
}
