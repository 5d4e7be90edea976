//! A finished plan: what the driver asks of it.

use std::collections::HashMap;

use ckpt_restorer::{LOAD, Op, OpKind};

use super::{Inherit, Means, Stage};

/// Operations of one thread, with the object each belongs to.
#[derive(Clone, Debug, Default)]
pub(super) struct List {
    pub(super) ops: Vec<Op>,
    pub(super) objects: Vec<u32>,
}

/// What one process executes of a plan: all of it, or the list of one that its process creates in
/// its own memory. Each has a header of its own, with the threads that it creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Address of its header, the argument of the restorer.
    pub header: u64,
    pub(super) list: usize,
}

/// A finished plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it goes.
    pub base: u64,
    /// Bytes, from `base` on; the remainder up to `len` is zero.
    pub image: Vec<u8>,
    /// Bytes in all, page aligned.
    pub len: u64,
    /// First instruction.
    pub entry: u64,
    /// Initial stack pointer.
    pub stack: u64,
    /// What its own process executes.
    pub main: Part,
    /// What is not kept, decided while planning.
    pub warnings: Vec<String>,
    /// Warnings that hold if an operation fails: address of its result, text.
    pub conditional: Vec<(u64, String)>,
    /// Descriptors that the process needs from us.
    pub inherit: Vec<Inherit>,
    /// The parts of processes that it creates in its memory, by their ids.
    pub(super) parts: HashMap<i32, Part>,
    /// Number of a list, index of an operation in it.
    pub(super) stages: Vec<(usize, usize, Stage)>,
    /// How its tasks come by their ids.
    pub means: Means,
    /// Likewise of operations before which the tracer sees to an id, and that id.
    pub(super) aims: Vec<(usize, usize, i32)>,
    pub(super) lists: Vec<(u64, List)>,
    pub(super) objects: Vec<String>,
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

    /// What a process executes that this plan creates in its own memory.
    pub fn part_of(&self, pid: i32) -> Option<Part> {
        self.parts.get(&pid).copied()
    }

    /// The stage of an operation of that part's first thread.
    pub fn stage_at(&self, part: Part, index: u64) -> Option<Stage> {
        let is = |(list, at, _): &&(usize, usize, Stage)| *list == part.list && *at as u64 == index;
        self.stages.iter().find(is).map(|(_, _, stage)| *stage)
    }

    /// The id that the next operation of that part is to give to whom it creates, where the tracer
    /// has to see to it.
    pub fn aim_at(&self, part: Part, index: u64) -> Option<i32> {
        let is = |(list, at, _): &&(usize, usize, i32)| *list == part.list && *at as u64 == index;
        self.aims.iter().find(is).map(|(_, _, id)| *id)
    }

    /// Whether the operation at an address was to create a task and has created one with another id.
    pub fn missed_at(&self, address: u64, answer: i64) -> Option<i32> {
        let (base, list) = self.list_at(address)?;
        let op = &list.ops[((address - base) / size_of::<Op>() as u64) as usize];
        let creates = [OpKind::Thread as u32, OpKind::Process as u32].contains(&op.kind);
        (creates && answer > 0 && self.means != Means::SetTid).then_some(op.expect as i32)
    }

    fn list_at(&self, address: u64) -> Option<&(u64, List)> {
        self.lists.iter().find(|(base, list)| {
            (*base..*base + (list.ops.len() * size_of::<Op>()) as u64).contains(&address)
        })
    }

    /// The whole plan as text, one operation a line, threads after the first one's list.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for (number, (_, list)) in self.lists.iter().enumerate() {
            if number > 0 {
                text.push_str(&format!("thread list {number}:\n"));
            }
            for (op, object) in list.ops.iter().zip(&list.objects) {
                let object = &self.objects[*object as usize];
                text.push_str(&format!("{:<70} # {object}\n", describe(op)));
            }
        }
        text
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
