//! The system call of a task: `/proc/PID/task/TID/syscall`, see proc_pid_syscall(5).

use super::ProcDir;
use super::parse::{dec, fields, hex};
use crate::Result;

/// The contents of `/proc/PID/task/TID/syscall`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InSyscall {
    /// It is running; nothing is known.
    Running,
    /// It is blocked or stopped, outside a system call.
    Outside {
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
    /// It is blocked or stopped in a system call.
    Inside {
        /// Number of the call.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer, behind the `syscall` instruction.
        pc: u64,
    },
}

/// Reads the system call of a task.
///
/// # Errors
/// See [`ProcDir::read`]; `EPERM` without the right to ptrace it.
pub fn read_syscall(task: impl Into<ProcDir>) -> Result<InSyscall> {
    let dir = task.into();
    let text = dir.read("syscall")?;
    parse_syscall(&text).ok_or_else(|| dir.syntax("syscall", &text))
}

fn parse_syscall(text: &[u8]) -> Option<InSyscall> {
    let all: Vec<&[u8]> = fields(text).collect();
    match *all.as_slice() {
        [b"running"] => Some(InSyscall::Running),
        [b"-1", sp, pc] => Some(InSyscall::Outside {
            sp: hex(sp)?,
            pc: hex(pc)?,
        }),
        [nr, ref args @ .., sp, pc] if args.len() == 6 => {
            let mut values = [0; 6];
            for (value, text) in values.iter_mut().zip(args) {
                *value = hex(text)?;
            }
            Some(InSyscall::Inside {
                nr: dec(nr)?,
                args: values,
                sp: hex(sp)?,
                pc: hex(pc)?,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls() {
        assert_eq!(parse_syscall(b"running\n"), Some(InSyscall::Running));
        let outside = InSyscall::Outside {
            sp: 0x7ffc_0000_0000,
            pc: 0x40_1000,
        };
        assert_eq!(
            parse_syscall(b"-1 0x7ffc00000000 0x401000\n"),
            Some(outside)
        );
        let inside = InSyscall::Inside {
            nr: 35,
            args: [1, 2, 3, 4, 5, 6],
            sp: 0x7f,
            pc: 0x40,
        };
        assert_eq!(
            parse_syscall(b"35 0x1 0x2 0x3 0x4 0x5 0x6 0x7f 0x40\n"),
            Some(inside)
        );
        assert_eq!(parse_syscall(b"35 0x1 0x2\n"), None);
        assert_eq!(parse_syscall(b"0\n"), None);
    }
}
