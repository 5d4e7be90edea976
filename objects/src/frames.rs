//! Running signal handlers and their return addresses, from the frames on the stacks (`struct rt_sigframe`,
//! arch/x86/include/asm/sigframe.h).

use std::ops::Range;

use ckpt_tracer::{Pid, RemoteAddr, mem};

use crate::memory::Mapping;

/// Bytes of stack that are searched; a frame farther up is not found.
const DEPTH: u64 = 64 << 20;
/// Bytes read at once.
const PIECE: usize = 1 << 20;
/// Most stacks of a thread, for nested handlers.
const STACKS: usize = 64;

/// `cs`, `gs`, `fs` and `ss` in a frame of 64-bit code: `__USER_CS`, 0, 0, `__USER_DS`.
const SEGMENTS: u64 = 0x002b_0000_0000_0033;
/// Defined flags; bit 1 is always set (Intel SDM volume 1, 3.4.3).
const FLAGS: u64 = 0x003f_7fd7;

/// Whether a handler of a thread with the stack pointer `rsp` will return into `range`. A stale frame in a part of
/// the stack that is in use again looks the same.
pub fn lead_into(range: &Range<u64>, rsp: u64, mappings: &[Mapping], pid: Pid) -> bool {
    find(rsp, mappings, pid, &|rip| range.contains(&rip))
}

/// Whether any handler of that thread is running; with the same uncertainty.
pub fn any(rsp: u64, mappings: &[Mapping], pid: Pid) -> bool {
    find(rsp, mappings, pid, &|_| true)
}

fn find(rsp: u64, mappings: &[Mapping], pid: Pid, wanted: &dyn Fn(u64) -> bool) -> bool {
    let mut stacks = vec![rsp];
    let mut seen: Vec<Range<u64>> = Vec::new();
    while let Some(stack) = stacks.pop() {
        if seen.len() == STACKS || seen.iter().any(|s| s.contains(&stack)) {
            continue;
        }
        let Some(mapping) = mappings.iter().find(|m| (m.start..m.end).contains(&stack)) else {
            continue;
        };
        let whole = stack & !7..mapping.end.min(stack.saturating_add(DEPTH));
        for (rip, rsp) in returns(whole.clone(), pid) {
            if wanted(rip) {
                return true;
            }
            stacks.push(rsp);
        }
        seen.push(whole);
    }
    false
}

/// Return addresses of frames in a part of memory: instruction and stack pointers.
fn returns(stack: Range<u64>, pid: Pid) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut bytes = vec![0; PIECE.min((stack.end - stack.start) as usize)];
    let mut at = stack.start;
    while at < stack.end {
        let len = bytes.len().min((stack.end - at) as usize);
        let read = mem::read_vm(pid, RemoteAddr(at), &mut bytes[..len]).unwrap_or(0);
        found.extend(in_words(&bytes[..read]));
        if read < len || at + len as u64 == stack.end {
            break;
        }
        // The pieces overlap, so that no frame is split.
        at += len as u64 - 32;
    }
    found
}

/// Frames have `rsp`, `rip`, flags and segments in that order.
fn in_words(bytes: &[u8]) -> Vec<(u64, u64)> {
    let word = |i: usize| u64::from_le_bytes(bytes[i..i + 8].try_into().unwrap_or([0; 8]));
    let places = (0..bytes.len().saturating_sub(31)).step_by(8);
    let frames = places.filter(|&i| {
        let flags = word(i + 16);
        word(i + 24) == SEGMENTS && flags & !FLAGS == 0 && flags & 2 != 0
    });
    frames.map(|i| (word(i + 8), word(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_four_words() {
        let words: [u64; 6] = [7, 0x7ffc_0000, 0x1234, 0x246, SEGMENTS, 9];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(in_words(&bytes), [(0x1234, 0x7ffc_0000)]);
        assert_eq!(in_words(&bytes[8..]), [(0x1234, 0x7ffc_0000)]);
        assert_eq!(in_words(&bytes[..bytes.len() - 16]), []);
        let flags = [7, 0x7ffc_0000, 0x1234, 0x8000_0246, SEGMENTS];
        let bytes: Vec<u8> = flags.iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
        assert_eq!(in_words(&bytes), []);
    }
}
