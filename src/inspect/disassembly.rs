//! One instruction as text.

use capstone::Capstone;
use capstone::arch::BuildsCapstone;

/// The longest instruction of x86-64.
pub const LONGEST: usize = 15;

/// Decodes instructions of x86-64.
pub struct Disassembler(Option<Capstone>);

impl Disassembler {
    /// A decoder with Intel syntax.
    pub fn new() -> Self {
        let mode = capstone::arch::x86::ArchMode::Mode64;
        Disassembler(Capstone::new().x86().mode(mode).build().ok())
    }

    /// The first instruction in `code`, which is at `address`; `None` if it is invalid.
    pub fn first(&self, code: &[u8], address: u64) -> Option<String> {
        let decoded = self.0.as_ref()?.disasm_count(code, address, 1).ok()?;
        let instruction = decoded.first()?;
        let (mnemonic, operands) = (instruction.mnemonic()?, instruction.op_str().unwrap_or(""));
        Some(format!("{mnemonic} {operands}").trim_end().to_owned())
    }
}

impl Default for Disassembler {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_decoded() {
        let disassembler = Disassembler::new();
        assert_eq!(
            disassembler.first(&[0x0f, 0x05, 0xc3], 0).unwrap(),
            "syscall"
        );
        assert_eq!(
            disassembler.first(&[0x48, 0x89, 0xe7], 0).unwrap(),
            "mov rdi, rsp"
        );
        assert_eq!(
            disassembler.first(&[0xeb, 0xfe], 0x1000).unwrap(),
            "jmp 0x1000"
        );
        assert_eq!(disassembler.first(&[], 0), None);
    }
}
