//! A finished plan: its layout, and queries of the driver.

use std::collections::HashMap;
use std::fmt;

use ckpt_restorer::{LOAD, Op, OpKind, Plan as PlanHeader, THREAD_STACK, TRAPS};

use super::{Builder, Inherit, PidMethod, Stage, Task};

/// Operations of one thread, with the object each belongs to.
#[derive(Clone, Debug, Default)]
pub(super) struct List {
    pub(super) ops: Vec<Op>,
    pub(super) objects: Vec<u32>,
}

/// The part of a plan that one process executes: all of it, or the list of a process created in the memory of its
/// creator. Each part has a header, with the threads that it creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Address of its header, the argument of the restorer.
    pub header: u64,
    pub(super) list: usize,
}

/// A finished plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its address.
    pub base: u64,
    /// Bytes, from `base` on; the remainder up to `len` is zero.
    pub image: Vec<u8>,
    /// Bytes in all, page aligned.
    pub len: u64,
    /// First instruction.
    pub entry: u64,
    /// Initial stack pointer.
    pub stack: u64,
    /// The part of its own process.
    pub main: Part,
    /// Differences known while planning.
    pub warnings: Vec<String>,
    /// Warnings that apply if an operation fails: address of its result, text.
    pub conditional: Vec<(u64, String)>,
    /// Descriptors that the process needs from us.
    pub inherit: Vec<Inherit>,
    /// The parts of processes created in its memory, by their ids.
    pub(super) parts: HashMap<i32, Part>,
    /// Number of a list, index of an operation in it.
    pub(super) stages: Vec<(usize, usize, Stage)>,
    /// How its tasks get their ids.
    pub pid_method: PidMethod,
    /// Operations before which the tracer has to provide an id: list, index, id.
    pub(super) aims: Vec<(usize, usize, i32)>,
    pub(super) lists: Vec<(u64, List)>,
    pub(super) objects: Vec<Box<str>>,
}

impl Builder {
    /// Lays everything out.
    pub fn finish(mut self) -> Plan {
        let header = self.reserve(size_of::<PlanHeader>());
        let ops_base = (self.data_base + self.data.len() as u64).next_multiple_of(64);
        let mut next = ops_base;
        let mut lists = Vec::with_capacity(self.tasks.len() + 1);
        let mains = std::mem::take(&mut self.main);
        let mut tasks = std::mem::take(&mut self.tasks);
        let of_tasks = tasks.iter_mut().map(|t| std::mem::take(&mut t.list));
        for list in std::iter::once(mains).chain(of_tasks) {
            let len = (list.ops.len() * size_of::<Op>()) as u64;
            lists.push((next, list));
            next += len;
        }
        let stacks = next.next_multiple_of(64);
        let mut stack = stacks;
        let mut parts = HashMap::new();
        for (number, task) in tasks.iter().enumerate() {
            let (ops, list) = &lists[number + 1];
            let (ops, count) = (*ops, list.ops.len() as u64);
            let of_creator = match task.creator.checked_sub(1) {
                Some(creator) => tasks[creator].header.unwrap_or(header),
                None => header,
            };
            let words = [ops, count, task.header.unwrap_or(of_creator), task.end];
            self.put(task.plan, &words.map(u64::to_le_bytes).concat());
            if let Some(header) = task.header {
                self.put_header(header, number + 1, (ops, count), &tasks);
                let list = number + 1;
                if task.end == TRAPS {
                    parts.insert(task.tid, Part { header, list });
                }
            }
            match task.args {
                Some(args) => self.put(args + 5 * 8, &stack.to_le_bytes()),
                None => {
                    let op = &mut lists[task.creator].1.ops[task.created_at];
                    op.args[2] = stack + THREAD_STACK - 8;
                }
            }
            stack += THREAD_STACK;
        }
        let results: Vec<u64> = lists.iter().map(|(ops, _)| *ops).collect();
        let result_of = |list: usize, index: usize| {
            results[list]
                + (index * size_of::<Op>()) as u64
                + std::mem::offset_of!(Op, result) as u64
        };
        for (list, index, earlier) in std::mem::take(&mut self.answers) {
            lists[list].1.ops[index].args[0] = result_of(list, earlier);
        }
        let end = stack.next_multiple_of(4096);
        let ops = (lists[0].0, lists[0].1.ops.len() as u64);
        self.put_header(header, 0, ops, &tasks);

        let mut image = self.blob.placed_at(self.base);
        image.resize((self.data_base - self.base) as usize, 0);
        image.append(&mut self.data);
        image.resize((ops_base - self.base) as usize, 0);
        for (_, list) in &lists {
            for op in &list.ops {
                image.extend_from_slice(&op.to_bytes());
            }
        }
        if !tasks.is_empty() {
            image.resize((stacks - self.base) as usize, 0);
            for task in &tasks {
                image.resize(image.len() + THREAD_STACK as usize - 8, 0);
                image.extend_from_slice(&task.plan.to_le_bytes());
            }
        }
        let conditional = self
            .conditional
            .into_iter()
            .map(|(list, index, text)| (result_of(list, index), text))
            .collect();
        Plan {
            base: self.base,
            len: end - self.base,
            entry: self.base + self.blob.entry,
            stack: self.data_base,
            main: Part { header, list: 0 },
            image,
            parts,
            pid_method: self.host.pid_method,
            stages: self.stages,
            aims: self.aims,
            warnings: self.warnings,
            conditional,
            inherit: self.inherit,
            lists,
            objects: self.objects,
        }
    }

    /// The header of the process that executes that list.
    fn put_header(&mut self, at: u64, list: usize, (ops, count): (u64, u64), tasks: &[Task]) {
        let threads = |t: &&Task| t.header.is_none() && t.creator == list;
        let threads = tasks.iter().filter(threads).count() as u32;
        self.put(at, &[ops, count].map(u64::to_le_bytes).concat());
        self.put(at + 16, &threads.to_le_bytes());
    }
}

impl Plan {
    /// The operation at an address: its text, and the object that it belongs to.
    pub fn operation_at(&self, address: u64) -> Option<(String, &str)> {
        let (base, list) = self.list_at(address)?;
        let index = ((address - base) / size_of::<Op>() as u64) as usize;
        Some((
            describe(&list.ops[index]),
            &self.objects[list.objects[index] as usize],
        ))
    }

    /// The part of a process that this plan creates in its own memory.
    pub fn part_of(&self, pid: i32) -> Option<Part> {
        self.parts.get(&pid).copied()
    }

    /// The stage of an operation of the part's first thread.
    pub fn stage_at(&self, part: Part, index: u64) -> Option<Stage> {
        let is = |(list, at, _): &&(usize, usize, Stage)| *list == part.list && *at as u64 == index;
        self.stages.iter().find(is).map(|(_, _, stage)| *stage)
    }

    /// The id for the task that the next operation of the part creates, if the tracer has to provide it.
    pub fn aim_at(&self, part: Part, index: u64) -> Option<i32> {
        let is = |(list, at, _): &&(usize, usize, i32)| *list == part.list && *at as u64 == index;
        self.aims.iter().find(is).map(|(_, _, id)| *id)
    }

    /// The required id, if the operation at an address creates a task and got another id.
    pub fn missed_at(&self, address: u64, answer: i64) -> Option<i32> {
        let (base, list) = self.list_at(address)?;
        let op = &list.ops[((address - base) / size_of::<Op>() as u64) as usize];
        let creates = [OpKind::Thread as u32, OpKind::Process as u32].contains(&op.kind);
        (creates && answer > 0 && self.pid_method != PidMethod::SetTid).then_some(op.expect as i32)
    }

    fn list_at(&self, address: u64) -> Option<&(u64, List)> {
        self.lists.iter().find(|(base, list)| {
            (*base..*base + (list.ops.len() * size_of::<Op>()) as u64).contains(&address)
        })
    }

    #[cfg(test)]
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        self.tell(&mut |line| text += &format!("{line}\n"));
        text
    }

    /// The whole plan as text, one operation on each line, threads after the first one's list.
    pub fn tell(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        for (number, (_, list)) in self.lists.iter().enumerate() {
            if number > 0 {
                line(format_args!("thread list {number}:"));
            }
            for (op, object) in list.ops.iter().zip(&list.objects) {
                let object = &self.objects[*object as usize];
                line(format_args!("{:<70} # {object}", describe(op)));
            }
        }
    }
}

fn syscall_name(nr: u64) -> String {
    ckpt_tracer::syscall_names::name(nr).map_or_else(|| format!("syscall_{nr}"), str::to_owned)
}

fn describe(op: &Op) -> String {
    if op.kind == OpKind::Thread as u32 {
        return format!("{}(thread {})", syscall_name(op.nr), op.expect);
    }
    if op.kind == OpKind::Process as u32 {
        return format!("{}(process {})", syscall_name(op.nr), op.expect);
    }
    if op.kind == OpKind::Trap as u32 {
        return "hand over to the tracer".into();
    }
    if op.kind == OpKind::Unless as u32 {
        return format!("leave out {} if that was done", op.args[1]);
    }
    if op.kind == OpKind::LoadState as u32 {
        return format!("load processor state {:#x}", op.args[1]);
    }
    if op.kind == OpKind::Join as u32 {
        return "wait for the threads".into();
    }
    let used = op.args.iter().rposition(|a| *a != 0).map_or(0, |i| i + 1);
    let args: Vec<String> = op.args[..used]
        .iter()
        .enumerate()
        .map(|(n, a)| {
            if n == 0 && op.flags & LOAD != 0 {
                format!("*{a:#x}")
            } else if *a < 10_000 {
                a.to_string()
            } else {
                format!("{a:#x}")
            }
        })
        .collect();
    format!("{}({})", syscall_name(op.nr), args.join(", "))
}
