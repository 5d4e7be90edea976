//! The position of each thread.

use std::collections::HashMap;

use ckpt_image::Reader;
use serde::Serialize;

use super::calls::{self, Context, State};
use super::disassembly::{Disassembler, LONGEST};
use super::symbols::Symbols;
use crate::objects::Snapshot;
use crate::objects::index::DescriptionId;
use crate::objects::memory::image::{ImageMemory, TargetMemory};
use crate::objects::memory::mapped::MappedFiles;
use crate::objects::process::Process;
use crate::objects::thread::Thread;

/// A thread as `ckpt inspect --threads` shows it; the JSON keys are fixed.
#[derive(Clone, Debug, Serialize)]
pub struct ThreadView {
    /// Its process.
    pub pid: i32,
    /// Its id.
    pub tid: i32,
    /// Its name.
    pub name: String,
    /// `stopped` (by a signal), `waiting` in a system call, or `running`.
    pub state: &'static str,
    /// The system call in which it was interrupted, or that it was leaving, with arguments; null outside a call.
    pub call: Option<String>,
    /// The result of the call that it was leaving.
    pub result: Option<String>,
    /// The instruction pointer.
    pub address: u64,
    /// The symbol at that address: function, offset, file.
    pub symbol: Option<String>,
    /// The instruction there, disassembled.
    pub instruction: Option<String>,
}

/// All threads of a snapshot.
pub fn threads(reader: &Reader, snapshot: &Snapshot) -> Vec<ThreadView> {
    let files = MappedFiles::new(snapshot);
    let symbols = Symbols::new(&files);
    let disassembler = Disassembler::new();
    let mut views = Vec::new();
    for process in &snapshot.processes {
        let memory = ImageMemory::new(reader, snapshot, process, &files);
        let names: HashMap<i32, DescriptionId> = process
            .fds
            .iter()
            .map(|entry| (entry.fd, entry.description))
            .collect();
        let fd = |fd: i32| {
            let description = names.get(&fd)?.find(&snapshot.descriptions)?;
            Some(description.kind.file().shown())
        };
        let context = Context {
            memory: &memory,
            fd: &fd,
        };
        for thread in &process.threads {
            let address = thread.regs.rip;
            let mut code = [0; LONGEST];
            let got = memory.read(address, &mut code);
            let symbol = symbols.name(&process.memory.mappings, address);
            let instruction = disassembler.first(&code[..got], address);
            views.push(view(process, thread, &context, symbol, instruction));
        }
    }
    views
}

fn view(
    process: &Process,
    thread: &Thread,
    context: &Context<'_>,
    symbol: Option<String>,
    instruction: Option<String>,
) -> ThreadView {
    let describe = |number| calls::describe(context, number, calls::arguments(&thread.regs));
    let (state, call, result) = match calls::state(&thread.regs) {
        State::Running => ("running", None, None),
        State::Waiting(number) => ("waiting", Some(describe(number)), None),
        State::Returning(number, value) => (
            "running",
            Some(describe(number)),
            Some(calls::result(value)),
        ),
    };
    ThreadView {
        pid: process.pid,
        tid: thread.tid,
        name: crate::text::of(&thread.name),
        state: if process.stopped.is_some() {
            "stopped"
        } else {
            state
        },
        call,
        result,
        address: thread.regs.rip,
        symbol,
        instruction,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture::{good_image, snapshot};

    #[test]
    fn threads_show_their_call_and_instruction() {
        let mut snapshot = snapshot();
        let regs = &mut snapshot.processes[0].threads[1].regs;
        (regs.orig_rax, regs.rax, regs.rdi, regs.rdx) = (0, -512i64 as u64, 1, 8);
        let views = threads(&good_image(), &snapshot);
        assert_eq!((views[0].state, &views[0].call), ("running", &None));
        assert_eq!(views[0].instruction.as_deref(), Some("nop"));
        assert_eq!(views[1].state, "waiting");
        assert_eq!(
            views[1].call.as_deref(),
            Some("read(1<eventfd:3>, NULL, 8)")
        );
    }
}
