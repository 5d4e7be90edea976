//! Segments: the local descriptor table of an address space (modify_ldt(2)), the thread-local entries of the global
//! one (set_thread_area(2)), and the I/O ports that a thread may use (ioperm(2)). The segment registers are stored
//! with the other registers.

use ckpt_tracer::Result;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::remote::RemoteCalls;
use ckpt_tracer::task::Stopped;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::plan::Builder;

/// An entry of a descriptor table, as `struct user_desc` (asm/ldt.h) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its index in the table.
    #[serde(deserialize_with = "bounds::segment")]
    pub entry: u32,
    /// `base_addr`.
    pub base: u32,
    /// `limit`, in bytes or pages.
    pub limit: u32,
    /// The bit fields from `seg_32bit` on.
    pub flags: u32,
}

/// `read_exec_only | seg_not_present`: with base and limit 0, an unused entry (`LDT_empty`).
const EMPTY: u32 = 1 << 3 | 1 << 5;
/// Bytes of a descriptor in the table.
const DESCRIPTOR: usize = 8;
/// Bytes of the largest local table, 8,192 entries.
pub const LARGEST: u64 = 8192 * DESCRIPTOR as u64;

/// Whether the address space has a local table.
pub fn has_local(calls: &mut RemoteCalls<'_>) -> Result<bool> {
    let answer = read_local(calls, DESCRIPTOR as u64)?;
    Ok(answer.is_some_and(|bytes| bytes > 0))
}

/// The local table; the scratch memory must have room for [`LARGEST`].
pub fn capture_local(calls: &mut RemoteCalls<'_>) -> Result<Vec<Segment>> {
    let bytes = read_local(calls, LARGEST)?.unwrap_or(0).min(LARGEST);
    let mut table = vec![0; bytes as usize];
    calls.memory().read(calls.scratch(), &mut table)?;
    Ok(decode(&table))
}

/// modify_ldt(2); `None` where the kernel lacks it.
fn read_local(calls: &mut RemoteCalls<'_>, bytes: u64) -> Result<Option<u64>> {
    let args = [0, calls.scratch().raw(), bytes, 0, 0, 0];
    match calls.call("modify_ldt", libc::SYS_modify_ldt, args) {
        // The result is an int, whose upper half is undefined.
        Ok(bytes) => Ok(Some(bytes & 0xffff_ffff)),
        Err(ckpt_tracer::Error::Remote { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

fn decode(table: &[u8]) -> Vec<Segment> {
    let entries = table.chunks_exact(DESCRIPTOR).enumerate();
    let segments = entries.map(|(entry, bytes)| {
        let word = u64::from_le_bytes(bytes.try_into().unwrap_or([0; DESCRIPTOR]));
        Segment::of_descriptor(entry as u32, word)
    });
    segments.filter(|segment| !segment.is_empty()).collect()
}

/// Fills the local table.
pub fn rebuild_local(segments: &[Segment], plan: &mut Builder) {
    /// The write mode in which an entry has the bits "present" and "useable".
    const WRITE: u64 = 0x11;
    for segment in segments {
        let at = plan.data(&segment.to_bytes());
        plan.syscall(libc::SYS_modify_ldt, &[WRITE, at, 16], || {
            format!("segment {} of the local descriptor table", segment.entry)
        });
    }
}

/// The thread-local entries of a task.
pub fn capture_thread_areas(task: &Stopped) -> Result<Vec<Segment>> {
    let areas = task.thread_areas()?.into_iter();
    let segments = areas.map(|[entry, base, limit, flags]| Segment {
        entry,
        base,
        limit,
        flags,
    });
    Ok(segments.filter(|segment| !segment.is_empty()).collect())
}

/// Sets the thread-local entries.
pub fn rebuild_thread_areas(segments: &[Segment], plan: &mut Builder) {
    for segment in segments {
        let at = plan.data(&segment.to_bytes());
        plan.syscall(libc::SYS_set_thread_area, &[at], || {
            format!("thread-local segment {}", segment.entry)
        });
    }
}

/// I/O ports that a task may use, as ranges of first port and number.
pub fn capture_ports(task: &Stopped) -> Result<Vec<(u16, u32)>> {
    // A set bit denies its port; ports past the bitmap are denied.
    let bitmap = task.io_bitmap()?;
    let allowed = |port: &usize| bitmap[port / 8] >> (port % 8) & 1 == 0;
    let mut ranges: Vec<(u16, u32)> = Vec::new();
    for port in (0..bitmap.len() * 8).filter(allowed) {
        match ranges.last_mut() {
            Some((first, count)) if usize::from(*first) + *count as usize == port => *count += 1,
            _ => ranges.push((port as u16, 1)),
        }
    }
    Ok(ranges)
}

/// Permits a task its I/O ports.
pub fn rebuild_ports(ranges: &[(u16, u32)], plan: &mut Builder) {
    for (first, count) in ranges {
        let last = u32::from(*first).saturating_add(*count).saturating_sub(1);
        let warning = format!(
            "a thread may not use the I/O ports {first:#x} to {last:#x} any more; it may need {}",
            Use::IoPorts
        );
        let args = [u64::from(*first), u64::from(*count), 1];
        plan.try_syscall(libc::SYS_ioperm, &args, &warning);
    }
}

impl Segment {
    /// From a descriptor of the processor (`struct desc_struct`, asm/desc_defs.h).
    fn of_descriptor(entry: u32, word: u64) -> Self {
        let bits = |from: u32, count: u32| ((word >> from) & ((1 << count) - 1)) as u32;
        let kind = bits(40, 4);
        let fields = [
            (bits(54, 1), 0),
            (kind >> 2, 1),
            (kind >> 1 & 1 ^ 1, 3),
            (bits(55, 1), 4),
            (bits(47, 1) ^ 1, 5),
            (bits(52, 1), 6),
            (bits(53, 1), 7),
        ];
        Self {
            entry,
            base: bits(16, 24) | bits(56, 8) << 24,
            limit: bits(0, 16) | bits(48, 4) << 16,
            flags: fields.iter().fold(0, |all, (value, at)| all | value << at),
        }
    }

    fn is_empty(&self) -> bool {
        (self.base, self.limit, self.flags) == (0, 0, EMPTY)
    }

    fn to_bytes(self) -> [u8; 16] {
        let words = [self.entry, self.base, self.limit, self.flags];
        let mut bytes = [0; 16];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_read() {
        // 32-bit data at 0x12345678, writable, 0xfffff pages, available to software.
        let word = 0x12df_f334_5678_ffff;
        let segment = Segment::of_descriptor(3, word);
        assert_eq!((segment.base, segment.limit), (0x1234_5678, 0xf_ffff));
        // seg_32bit, contents 0, limit_in_pages, useable.
        assert_eq!(segment.flags, 1 | 1 << 4 | 1 << 6);
        let code = Segment::of_descriptor(0, 0x0040_fa00_0000_0001);
        assert_eq!(code.flags, 1 | 2 << 1);
    }

    #[test]
    fn entries_that_are_not_used_are_left_out() {
        let mut table = [0; 4 * DESCRIPTOR];
        assert_eq!(decode(&table), []);
        table[2 * DESCRIPTOR..3 * DESCRIPTOR]
            .copy_from_slice(&0x12df_f334_5678_ffff_u64.to_le_bytes());
        assert_eq!(decode(&table).len(), 1);
        assert_eq!(decode(&table)[0].entry, 2);
    }
}
