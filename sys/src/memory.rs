//! Memory policy: set_mempolicy(2).
#![allow(unsafe_code)]

use crate::{Errno, Result};

/// get_mempolicy(2) of this thread: the mode and the node mask. `nodes` is the room of the mask in bits, a multiple
/// of 64.
///
/// # Errors
/// `EINVAL` when the kernel has more nodes, `ENOSYS` without NUMA support.
pub fn policy(nodes: usize) -> Result<(i32, Vec<u8>)> {
    let (mut mode, mut set) = (0i32, vec![0u64; nodes.div_ceil(64)]);
    // The kernel takes the number of bits plus one.
    let room = set.len() * 64 + 1;
    let (at, to) = (&raw mut mode, set.as_mut_ptr());
    // SAFETY: the kernel writes an int, and as many bits as there is room for.
    let answer = unsafe { libc::syscall(libc::SYS_get_mempolicy, at, to, room, 0, 0) };
    Errno::result(answer)?;
    Ok((
        mode,
        set.iter().flat_map(|word| word.to_ne_bytes()).collect(),
    ))
}
