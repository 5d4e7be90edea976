//! The arguments of a system call as text.

use super::flags;
use super::table::CALLS;
use crate::objects::memory::image::TargetMemory;
use ckpt_tracer::syscall_names::name;

/// Longer text in memory is truncated.
const MAX_TEXT: usize = 256;
/// Further elements of an array are not shown.
const MAX_ELEMENTS: u64 = 8;

/// Context for decoding arguments.
pub struct Context<'a> {
    /// The process's memory.
    pub memory: &'a dyn TargetMemory,
    /// The file of a descriptor.
    pub fd: &'a dyn Fn(i32) -> Option<String>,
}

/// A system call with its arguments: `read(3</etc/passwd>, 0x7ffe1000, 4096)`.
pub fn describe(context: &Context<'_>, number: u64, arguments: [u64; 6]) -> String {
    let Some(name) = name(number) else {
        return format!("system call {number}({})", raw(&arguments));
    };
    let Some((_, kinds)) = CALLS.iter().find(|(known, _)| *known == name) else {
        return format!("{name}({})", raw(&arguments));
    };
    let mut shown = Vec::new();
    for (at, kind) in kinds.split_ascii_whitespace().enumerate().take(6) {
        // The operation decides whether a futex's fourth argument is a time.
        let kind = if name == "futex" && at == 3 && !futex_waits(arguments[1]) {
            "int"
        } else {
            kind
        };
        let next = arguments.get(at + 1).copied().unwrap_or(0);
        shown.push(context.argument(kind, arguments[at], next));
    }
    format!("{name}({})", shown.join(", "))
}

fn raw(arguments: &[u64]) -> String {
    arguments
        .iter()
        .map(|value| format!("{value:#x}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn futex_waits(operation: u64) -> bool {
    let waiting = [
        libc::FUTEX_WAIT,
        libc::FUTEX_LOCK_PI,
        libc::FUTEX_WAIT_BITSET,
        libc::FUTEX_WAIT_REQUEUE_PI,
    ];
    waiting.contains(&(operation as i32 & libc::FUTEX_CMD_MASK))
}

impl Context<'_> {
    fn argument(&self, kind: &str, value: u64, next: u64) -> String {
        match kind {
            "fd" => self.descriptor(value as i32),
            "at" if value as i32 == libc::AT_FDCWD => "AT_FDCWD".into(),
            "at" => self.descriptor(value as i32),
            "path" | "str" => self.text(value),
            "int" | "pid" | "ms" => (value as i32).to_string(),
            "len" => value.to_string(),
            "off" => (value as i64).to_string(),
            "mode" => format!("{value:#o}"),
            "sig" => flags::signal(value),
            "set" => self.or_pointer(value, |memory| {
                Some(set(u64::from_le_bytes(bytes(memory, value)?)))
            }),
            "ts" => self.or_pointer(value, |memory| time(memory, value, 9)),
            "tv" => self.or_pointer(value, |memory| time(memory, value, 6)),
            "pollfds" => self.array(value, next, 8, |element| self.pollfd(element)),
            "iov" => self.array(value, next, 16, iovec),
            "open" => open_flags(value),
            "futex" => {
                let command = value & libc::FUTEX_CMD_MASK as u32 as u64;
                let mut text = flags::one(command, flags::FUTEX);
                if value & libc::FUTEX_PRIVATE_FLAG as u64 != 0 {
                    text += "|FUTEX_PRIVATE_FLAG";
                }
                if value & libc::FUTEX_CLOCK_REALTIME as u64 != 0 {
                    text += "|FUTEX_CLOCK_REALTIME";
                }
                text
            }
            "prot" => flags::bits(value, flags::PROT, "PROT_NONE"),
            "map" => flags::bits(value, flags::MAP, "0"),
            "msg" => flags::bits(value, flags::MSG, "0"),
            "wait" => flags::bits(value, flags::WAIT, "0"),
            "flock" => flags::bits(value, flags::FLOCK, "0"),
            "clock" => flags::one(value as i32 as u64, flags::CLOCK),
            "timer" => flags::bits(value, flags::TIMER, "0"),
            "seek" => flags::one(value, flags::SEEK),
            "fcntl" => flags::one(value, flags::FCNTL),
            "how" => flags::one(value, flags::HOW),
            "id" => flags::one(value, flags::ID),
            "family" => flags::one(value, flags::FAMILY),
            "epollctl" => flags::one(value, flags::EPOLL_CTL),
            "madv" => flags::one(value, flags::MADV),
            "hex" if value == 0 => "0".into(),
            _ => pointer(value),
        }
    }

    fn descriptor(&self, fd: i32) -> String {
        match (self.fd)(fd) {
            Some(what) => format!("{fd}<{what}>"),
            None => fd.to_string(),
        }
    }

    fn or_pointer(
        &self,
        value: u64,
        decode: impl FnOnce(&dyn TargetMemory) -> Option<String>,
    ) -> String {
        if value == 0 {
            return "NULL".into();
        }
        decode(self.memory).unwrap_or_else(|| pointer(value))
    }

    fn text(&self, address: u64) -> String {
        let mut bytes = [0; MAX_TEXT];
        let got = self.memory.read(address, &mut bytes);
        match bytes[..got].iter().position(|byte| *byte == 0) {
            Some(end) => format!("\"{}\"", bytes[..end].escape_ascii()),
            None if got == MAX_TEXT => format!("\"{}\"…", bytes.escape_ascii()),
            None => pointer(address),
        }
    }

    fn array(
        &self,
        address: u64,
        count: u64,
        size: u64,
        element: impl Fn(&[u8; 16]) -> String,
    ) -> String {
        let mut shown = Vec::new();
        for at in 0..count.min(MAX_ELEMENTS) {
            let mut bytes = [0; 16];
            let place = address.wrapping_add(at * size);
            if self.memory.read(place, &mut bytes[..size as usize]) != size as usize {
                return pointer(address);
            }
            shown.push(element(&bytes));
        }
        if count > MAX_ELEMENTS {
            shown.push("…".into());
        }
        format!("[{}]", shown.join(", "))
    }

    /// `struct pollfd`: a descriptor and its events.
    fn pollfd(&self, bytes: &[u8; 16]) -> String {
        let fd = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let events = u16::from_le_bytes([bytes[4], bytes[5]]);
        format!(
            "{{{}, {}}}",
            self.descriptor(fd),
            flags::bits(events.into(), flags::POLL, "0")
        )
    }
}

/// Set by the kernel for every file that a 64-bit program opens; the `libc` crate says 0.
const O_LARGEFILE: u64 = 0x8000;

/// Access mode and flags of open(2).
pub fn open_flags(value: u64) -> String {
    let mode = ["O_RDONLY", "O_WRONLY", "O_RDWR", "0x3"][(value & 3) as usize];
    match flags::bits(value & !(3 | O_LARGEFILE), flags::OPEN, "") {
        rest if rest.is_empty() => mode.into(),
        rest => format!("{mode}|{rest}"),
    }
}

fn pointer(value: u64) -> String {
    if value == 0 {
        "NULL".into()
    } else {
        format!("{value:#x}")
    }
}

fn bytes<const N: usize>(memory: &dyn TargetMemory, address: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (memory.read(address, &mut bytes) == N).then_some(bytes)
}

/// `struct timespec` (nine digits) or `struct timeval` (six).
fn time(memory: &dyn TargetMemory, address: u64, digits: usize) -> Option<String> {
    let seconds = i64::from_le_bytes(bytes(memory, address)?);
    let fraction = i64::from_le_bytes(bytes(memory, address.checked_add(8)?)?);
    Some(format!("{{{seconds}.{fraction:0digits$} s}}"))
}

/// `struct iovec`.
fn iovec(bytes: &[u8; 16]) -> String {
    let (base, len) = bytes.split_at(8);
    let number = |bytes: &[u8]| {
        bytes
            .first_chunk()
            .map_or(0, |chunk| u64::from_le_bytes(*chunk))
    };
    format!("{{{}, {}}}", pointer(number(base)), number(len))
}

fn set(mask: u64) -> String {
    let member = |signal: &u64| mask >> (signal - 1) & 1 == 1;
    let (prefix, shown) = match mask.count_ones() {
        0..=32 => (
            "",
            (1..=64)
                .filter(member)
                .map(flags::signal)
                .collect::<Vec<_>>(),
        ),
        _ => (
            "~",
            (1..=64)
                .filter(|signal| !member(signal))
                .map(flags::signal)
                .collect(),
        ),
    };
    format!("{prefix}[{}]", shown.join(" "))
}

#[cfg(test)]
mod tests;
