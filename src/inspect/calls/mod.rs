//! System calls as text: the name, and the decoded arguments.

mod arguments;
mod flags;
mod table;

pub use arguments::{Context, describe, open_flags};

use crate::objects::thread::GeneralRegisters;

/// State of a thread with respect to system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Outside a system call.
    Running,
    /// Interrupted in this system call, which will be restarted or return `EINTR`.
    Waiting(u64),
    /// At the end of this system call, with this result.
    Returning(u64, i64),
}

/// `ERESTARTSYS` to `ERESTART_RESTARTBLOCK` of include/linux/errno.h: results that mark an interrupted call, and that
/// no program sees. 515 is not among them.
const RESTARTS: [i64; 4] = [-512, -513, -514, -516];

/// Determines it from the registers. Outside a system call `orig_rax` is -1.
pub fn state(regs: &GeneralRegisters) -> State {
    let result = regs.rax as i64;
    match regs.orig_rax {
        number if (number as i64) < 0 => State::Running,
        number if RESTARTS.contains(&result) => State::Waiting(number),
        number => State::Returning(number, result),
    }
}

/// The six arguments in order.
pub fn arguments(regs: &GeneralRegisters) -> [u64; 6] {
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9]
}

/// An errno's name and number as the kernel returns it, or the result.
pub fn result(value: i64) -> String {
    match value {
        -4095..=-1 => match nix::errno::Errno::from_raw(-value as i32) {
            nix::errno::Errno::UnknownErrno => value.to_string(),
            errno => format!("-1 {errno:?}"),
        },
        _ if (0..1 << 32).contains(&value) => value.to_string(),
        _ => format!("{value:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told_from_registers() {
        let regs = |orig_rax: i64, rax: i64| GeneralRegisters {
            orig_rax: orig_rax as u64,
            rax: rax as u64,
            ..Default::default()
        };
        assert_eq!(state(&regs(-1, -512)), State::Running);
        assert_eq!(state(&regs(0, -512)), State::Waiting(0));
        assert_eq!(state(&regs(230, -516)), State::Waiting(230));
        assert_eq!(state(&regs(1, 5)), State::Returning(1, 5));
        assert_eq!(state(&regs(1, -4)), State::Returning(1, -4));
    }

    #[test]
    fn results_read_well() {
        assert_eq!(result(7), "7");
        assert_eq!(result(-4), "-1 EINTR");
        assert_eq!(result(0x7f00_0000_0000), "0x7f0000000000");
    }
}
