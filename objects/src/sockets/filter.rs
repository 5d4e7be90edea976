//! Classic filters of sockets, `SO_ATTACH_FILTER` (socket(7)).
//!
//! The kernel keeps the original instructions and returns them, but not those of an eBPF program (`SO_ATTACH_BPF`;
//! `sk_get_filter`, net/core/filter.c). A filter applies to arriving messages, not to queued ones.

use std::os::fd::AsFd;

use ckpt_sys::sockets;
use nix::errno::Errno;

use crate::plan::Builder;

/// Bytes of an instruction, `struct sock_filter`.
const INSTRUCTION: usize = 8;

/// The filter of a socket, as it was attached; empty without one.
///
/// # Errors
/// `EACCES` for an eBPF program.
pub fn capture(socket: &impl AsFd) -> Result<Vec<u8>, Errno> {
    match sockets::filter_len(socket) {
        // Sockets without support for filters.
        Ok(0) | Err(Errno::ENOPROTOOPT | Errno::EINVAL) => Ok(Vec::new()),
        Ok(count) => {
            let mut program = vec![0; count * INSTRUCTION];
            sockets::read_filter(socket, &mut program, count)?;
            Ok(program)
        }
        Err(errno) => Err(errno),
    }
}

/// Attaches a filter, if there is one, to the socket with that descriptor number.
pub fn rebuild(program: &[u8], at: i32, label: &str, plan: &mut Builder) {
    if program.is_empty() {
        return;
    }
    // struct sock_fprog
    let count = (program.len() / INSTRUCTION) as u64;
    let program = plan.data(program);
    let header = plan.data(&[count, program].map(u64::to_le_bytes).concat());
    let option = libc::SO_ATTACH_FILTER as u64;
    let args = [at as u64, libc::SOL_SOCKET as u64, option, header, 16];
    plan.syscall(libc::SYS_setsockopt, &args, || {
        format!("the filter of the {label}")
    });
}
