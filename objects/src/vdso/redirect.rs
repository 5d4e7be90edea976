//! Redirects functions of a vDSO: its symbols, and the code at their beginnings.
//!
//! The code written over the beginning of a function may be longer than its first instructions and even than the
//! function: the bytes between two beginnings are not executed any more.

use std::collections::HashMap;

use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Object, ObjectSymbol};

/// An exported function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Function {
    /// `__vdso_clock_gettime`, or its weak name without the prefix.
    pub(super) name: String,
    /// Offset in the vDSO.
    pub(super) offset: u64,
}

/// The functions that a vDSO exports (vdso(7)), by address.
///
/// # Errors
/// When it is not a 64-bit ELF file.
pub(super) fn functions(code: &[u8]) -> Result<Vec<Function>, String> {
    let broken = |e: object::Error| format!("is not understood ({e})");
    let file = ElfFile64::<object::Endianness>::parse(code).map_err(broken)?;
    // Kernels before 3.15 linked it to a high address.
    let endian = file.endian();
    let linked_at = file
        .elf_program_headers()
        .iter()
        .find(|h| h.p_type(endian) == object::elf::PT_LOAD)
        .map_or(0, |h| h.p_vaddr(endian));
    let symbols = file.dynamic_symbols();
    let exported = symbols.filter(|s| s.is_definition() && s.kind() == object::SymbolKind::Text);
    let mut found: Vec<Function> = exported
        .filter_map(|s| {
            Some(Function {
                name: s.name().ok()?.to_owned(),
                offset: s.address().checked_sub(linked_at)?,
            })
        })
        .collect();
    found.sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    Ok(found)
}

/// Addresses of the functions of this kernel's vDSO.
#[derive(Default)]
pub(super) struct Present {
    addresses: HashMap<String, u64>,
}

impl Present {
    /// Those of a vDSO at `base`.
    pub(super) fn of(code: &[u8], base: u64) -> Result<Self, String> {
        let functions = functions(code)?.into_iter();
        Ok(Self {
            addresses: functions.map(|f| (f.name, base + f.offset)).collect(),
        })
    }
}

/// The code with functions that jump to those of the same name, or to system calls.
///
/// # Errors
/// Why it cannot be done, as the end of a sentence about the vDSO.
pub(super) fn lead_on(old: &[u8], present: &Present) -> Result<Vec<u8>, String> {
    let functions = functions(old)?;
    let mut code = old.to_vec();
    for same in functions.chunk_by(|a, b| a.offset == b.offset) {
        let start = same[0].offset as usize;
        let mut names = same.iter().map(|f| f.name.as_str());
        let there = names.clone().find_map(|name| present.addresses.get(name));
        let new = match there {
            Some(address) => jump(*address),
            None => names.find_map(instead).ok_or_else(|| {
                format!(
                    "has a function {}, which has no replacement here",
                    same[0].name
                )
            })?,
        };
        let next = functions.iter().find(|f| f.offset > same[0].offset);
        let room = next.map_or(code.len(), |f| f.offset as usize);
        let place = code
            .get_mut(start..room.min(start + new.len()))
            .filter(|place| place.len() == new.len());
        let cramped = || format!("has no room for a jump in its function {}", same[0].name);
        place.ok_or_else(cramped)?.copy_from_slice(&new);
    }
    Ok(code)
}

/// `jmp [rip]`, followed by the address: changes no register and reaches any distance.
fn jump(to: u64) -> Vec<u8> {
    let mut code = vec![0xff, 0x25, 0, 0, 0, 0];
    code.extend(to.to_le_bytes());
    code
}

/// An equivalent for a function that the present vDSO lacks. Functions take their operands and return results as the
/// system calls do, and may clobber `rcx` and `r11` too.
fn instead(name: &str) -> Option<Vec<u8>> {
    let name = name.strip_prefix("__vdso_").unwrap_or(name);
    Some(match name {
        "clock_gettime" => system_call(libc::SYS_clock_gettime),
        "clock_getres" => system_call(libc::SYS_clock_getres),
        "gettimeofday" => system_call(libc::SYS_gettimeofday),
        "time" => system_call(libc::SYS_time),
        "getcpu" => system_call(libc::SYS_getcpu),
        // Asked for the size of its state (an opaque length of -1, in r8), it returns ENOSYS; otherwise it may ignore
        // the state (`__cvdso_getrandom_data`, lib/vdso/getrandom.c).
        "getrandom" => {
            let call = system_call(libc::SYS_getrandom);
            let mut code = vec![0x49, 0x83, 0xf8, 0xff]; // cmp r8, -1
            code.extend([0x74, call.len() as u8]); // je, over the call
            code.extend(call);
            code.extend(answer_enosys());
            code
        }
        // Without an SGX device there is no enclave to enter.
        "sgx_enter_enclave" => answer_enosys(),
        _ => return None,
    })
}

/// `mov eax, NUMBER; syscall; ret`
fn system_call(number: i64) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((number as u32).to_le_bytes());
    code.extend([0x0f, 0x05, 0xc3]);
    code
}

/// `mov rax, -ENOSYS; ret`
fn answer_enosys() -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc0];
    code.extend((-libc::ENOSYS).to_le_bytes());
    code.push(0xc3);
    code
}
