//! Remains of killed tracers: caves, and signal frames that return into them.
//!
//! A task whose tracer has died takes the return path by itself. It is not single-stepped: a later tracer lets it run
//! until it has left the cave (`freeze::leave_stale_cave`), since a tracer that dies while it steps a task leaves the
//! trap flag set, and the resulting SIGTRAP ends the process.
//!
//! On its return path the task may get a signal, as soon as its mask is restored. The handler's frame then holds
//! registers of the cave. It returns there, and the rest of the return path is executed, as long as the cave is
//! intact. So before the bytes are used again, such frames get the registers that the return path would set: they
//! then return to where the task was. All writable memory is searched for them, since a handler may have changed its
//! stack. This costs something only after a tracer was killed.
//!
//! Each frame is changed in an order in which it is valid after every write: if we are killed in between, the cave is
//! still intact.

use std::ops::Range;

use super::cave::{CaveImage, OWNER_BYTES, candidates, cave_image, size};
use super::hold::BLOCK;
use crate::mem::{self, ProcessMemory};
use crate::proc::maps::{VmFlags, Vma, VmaName};
use crate::proc::pagemap::{PageCategories, PageQuery, PagemapScanner};
use crate::task::Stopped;
use crate::{Pid, RemoteAddr, Result};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// The code of a cave with the magic after it: the same in all caves of this program.
fn code(image: &CaveImage) -> &'static [u8] {
    &image.bytes[..image.magic as usize + 8]
}

/// Whether the task is in the code of a cave; one that is not ours is a killed tracer's.
pub(crate) fn holds(pid: Pid, task: &Stopped) -> Result<bool> {
    let image = cave_image();
    let code = code(&image);
    let rip = task.regs()?.rip;
    let page = rip & !0xfff;
    // The code may begin in the previous page, which need not be mapped.
    let from = [rip.saturating_sub(image.magic), page];
    Ok(from.into_iter().any(|from| {
        let mut bytes = vec![0; (rip - from) as usize + code.len()];
        let read = mem::read_vm(pid, RemoteAddr(from), &mut bytes).unwrap_or(0);
        let mut places = bytes[..read].windows(code.len());
        let at = places.position(|w| w == code).map(|at| from + at as u64);
        at.is_some_and(|at| (at..at + image.magic).contains(&rip))
    }))
}

/// Resets the syscall user dispatch that tasks got to enter a cave, when no task is in one: those that may make no
/// system calls, may make none again.
pub fn withdraw_dispatch(tasks: &[Stopped], mem: &ProcessMemory) -> Result<()> {
    let image = cave_image();
    for task in tasks {
        let Some(dispatch) = task.dispatch()? else {
            continue;
        };
        let mut bytes = vec![0; code(&image).len()];
        let at = RemoteAddr(dispatch.offset);
        if dispatch.len == size() as u64
            && mem.read(at, &mut bytes).is_ok()
            && bytes == code(&image)
        {
            task.set_dispatch(&dispatch.allowing_nothing())?;
        }
    }
    Ok(())
}

/// A slot of a stale cave.
struct Slot {
    at: u64,
    /// Its code and data.
    bytes: Vec<u8>,
}

/// Clears every stale cave after all frames that lead there are mended. All tasks that share the memory must be
/// stopped, none in a cave.
pub(super) fn clear(mem: &ProcessMemory, maps: &[Vma]) -> Result<()> {
    let slots = find(mem, maps)?;
    if slots.is_empty() {
        return Ok(());
    }
    mend_frames(mem, maps, &slots)?;
    for slot in &slots {
        // The bytes below were unused.
        let owner = slot.word(OWNER);
        if owner.wrapping_sub(slot.at) < size() as u64 {
            mem.write(RemoteAddr(owner), &[0; OWNER_BYTES])?;
        }
        mem.write(RemoteAddr(slot.at), &vec![0; slot.bytes.len()])?;
    }
    Ok(())
}

/// Slots in the vDSO, and in private copies of pages of executable files. In memory without a file a cave is left
/// where it is.
fn find(mem: &ProcessMemory, maps: &[Vma]) -> Result<Vec<Slot>> {
    let scanner = PagemapScanner::open(mem.pid())?;
    let image = cave_image();
    let code = code(&image);
    let mut found = Vec::new();
    let has_file = |v: &&Vma| v.name == VmaName::Vdso || !v.is_private_anonymous();
    for vma in candidates(maps).into_iter().filter(has_file) {
        let mut parts = Vec::new();
        if vma.name == VmaName::Vdso {
            parts.push(vma.start..vma.end);
        } else if let Some(query) = PageQuery::stored_pages(vma) {
            scanner.scan(vma.start..vma.end, query, |run| {
                parts.push(run.start..run.end);
            })?;
        }
        for part in parts {
            in_pieces(mem, part, image.bytes.len() as u64, |at, bytes| {
                let places = (0..bytes.len()).step_by(16);
                let slots = places.filter(|i| bytes[*i..].starts_with(code));
                found.extend(slots.filter_map(|i| {
                    let bytes = bytes.get(i..i + image.bytes.len())?.to_vec();
                    Some(Slot {
                        at: at + i as u64,
                        bytes,
                    })
                }));
            });
        }
    }
    found.sort_by_key(|slot: &Slot| slot.at);
    found.dedup_by_key(|slot| slot.at);
    Ok(found)
}

/// Reads memory, as far as it is readable, in pieces that overlap by that many bytes.
fn in_pieces(
    mem: &ProcessMemory,
    range: Range<u64>,
    overlap: u64,
    mut each: impl FnMut(u64, &[u8]),
) {
    let mut bytes = vec![0; (range.end - range.start).min(PIECE) as usize];
    let mut at = range.start;
    loop {
        let piece = (range.end - at).min(PIECE);
        let bytes = &mut bytes[..piece as usize];
        if mem.read(RemoteAddr(at), bytes).is_ok() {
            each(at, bytes);
        }
        if at + piece == range.end {
            break;
        }
        at += piece - overlap.next_multiple_of(16);
    }
}

/// Words of a slot's data, as `write_way_home` puts them.
const FLAGS: usize = 4;
const OWNER: usize = 5;
const REGISTERS: usize = 9;

impl Slot {
    fn word(&self, number: usize) -> u64 {
        let at = cave_image().data as usize + 8 * number;
        word(&self.bytes, at)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|w| w.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

/// General registers in a signal frame (`struct sigcontext_64`, arch/x86/include/uapi/asm/sigcontext.h), in words
/// from its beginning.
mod reg {
    pub(super) const R8: usize = 0;
    pub(super) const R9: usize = 1;
    pub(super) const R10: usize = 2;
    pub(super) const R11: usize = 3;
    pub(super) const RDI: usize = 8;
    pub(super) const RSI: usize = 9;
    pub(super) const RBP: usize = 10;
    pub(super) const RBX: usize = 11;
    pub(super) const RDX: usize = 12;
    pub(super) const RAX: usize = 13;
    pub(super) const RCX: usize = 14;
    pub(super) const RSP: usize = 15;
    pub(super) const RIP: usize = 16;
    pub(super) const FLAGS: usize = 17;
    pub(super) const SEGMENTS: usize = 18;
}

/// From the start of a block to what remains when its first registers are popped, in bytes.
const LEFT: u64 = 11 * 8;
/// `cs`, `gs`, `fs` and `ss` in a frame of 64-bit code: `__USER_CS`, 0, 0, `__USER_DS`.
const SEGMENTS: u64 = 0x002b_0000_0000_0033;
/// Bytes of a frame's registers that are changed.
const FRAME: usize = 8 * (reg::FLAGS + 1);

/// Gives frames that lead into a stale cave the registers with which they would leave it.
fn mend_frames(mem: &ProcessMemory, maps: &[Vma], slots: &[Slot]) -> Result<()> {
    let scanner = PagemapScanner::open(mem.pid())?;
    let there = PageQuery {
        required: PageCategories::GUARD,
        inverted: PageCategories::GUARD,
        anyof: PageCategories::PRESENT | PageCategories::SWAPPED,
        ..PageQuery::default()
    };
    let odd = VmFlags::IO | VmFlags::PFN_MAP;
    let mut frames = Vec::new();
    for vma in maps.iter().filter(|v| v.write && !v.flags.intersects(odd)) {
        let mut runs = Vec::new();
        scanner.scan(vma.start..vma.end, there, |run| {
            runs.push(run.start..run.end)
        })?;
        for run in runs {
            in_pieces(mem, run, 4096, |at, bytes| {
                for i in (0..bytes.len().saturating_sub(31)).step_by(8) {
                    if word(bytes, i + 24) == SEGMENTS {
                        let rip = word(bytes, i + 8);
                        let begin = at + i as u64 - 8 * reg::RSP as u64;
                        frames.push((begin, rip));
                    }
                }
            });
        }
    }
    for (at, rip) in frames {
        let inside = |slot: &&Slot| (slot.at..slot.at + cave_image().magic).contains(&rip);
        if let Some(slot) = slots.iter().find(inside) {
            mend(mem, RemoteAddr(at), slot, rip - slot.at)?;
        }
    }
    Ok(())
}

/// Mends one frame of a task that was at that offset of the slot's code.
fn mend(mem: &ProcessMemory, at: RemoteAddr, slot: &Slot, offset: u64) -> Result<()> {
    let image = cave_image();
    let frame = mem.read_array::<FRAME>(at)?;
    let mut regs: [u64; reg::SEGMENTS] = std::array::from_fn(|i| word(&frame, 8 * i));
    let rip_at = at + 8 * reg::RIP as u64;
    let held = offset >= image.park;
    if held {
        // It returns with the registers in its block of memory (hold.rs), whose address is in a register as long as
        // possible.
        let block = match offset == image.left {
            true => regs[reg::RSP].wrapping_sub(LEFT),
            false => regs[reg::RBX],
        };
        let block = mem.read_array::<BLOCK>(RemoteAddr(block))?;
        for (word_of, reg) in (3..).zip(HELD) {
            regs[reg] = word(&block, 8 * word_of);
        }
    } else {
        // From there no part of the frame is used that is about to change.
        mem.write(rip_at, &(slot.at + image.last).to_le_bytes())?;
        for (word_of, reg) in (REGISTERS..).zip(WAY_HOME) {
            regs[reg] = slot.word(word_of);
        }
        let flags = slot.word(FLAGS);
        let overflow = if flags & 0x7f == 0x7f { OVERFLOW } else { 0 };
        regs[reg::FLAGS] = regs[reg::FLAGS] & !(OVERFLOW | 0xff) | overflow | flags >> 8 & 0xff;
    }
    let bytes: Vec<u8> = regs.iter().flat_map(|r| r.to_le_bytes()).collect();
    if !held {
        let (before, behind) = (8 * reg::RIP, 8 * reg::FLAGS);
        mem.write(at, &bytes[..before])?;
        mem.write(at + behind as u64, &bytes[behind..])?;
        return mem.write(rip_at, &bytes[before..behind]);
    }
    mem.write(at, &bytes)
}

/// The overflow flag, which the return path stores apart from the others.
const OVERFLOW: u64 = 0x800;
/// The registers of a slot's data.
const WAY_HOME: [usize; 12] = [
    reg::RDI,
    reg::RSI,
    reg::RDX,
    reg::R10,
    reg::R8,
    reg::R9,
    reg::RCX,
    reg::R11,
    reg::RAX,
    reg::RIP,
    reg::RBX,
    reg::RBP,
];
/// Those of a block, from its fourth word on; `cs` and `ss`, which are left out, never change.
const HELD: [usize; 12] = [
    reg::RDI,
    reg::RSI,
    reg::RDX,
    reg::R10,
    reg::RCX,
    reg::R11,
    reg::RAX,
    reg::RBX,
    reg::RIP,
    // This word is `cs`; the next entry overwrites it.
    reg::FLAGS,
    reg::FLAGS,
    reg::RSP,
];
