//! The processor: what cpuid and xgetbv report to a program (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix
//! E).

#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid_count, _xgetbv, CpuidResult};
use std::ffi::CStr;

/// The properties of the processor on which registers and code depend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Vendor, `GenuineIntel` …
    pub vendor: String,
    /// Brand string.
    pub model: String,
    /// Family, model and stepping, as in leaf 1 of cpuid.
    pub signature: u32,
    /// All words of cpuid with feature bits; 0 for leaves that the processor lacks.
    pub words: Vec<FeatureWord>,
    /// State components that the system has enabled (`XCR0`); 0 without XSAVE.
    pub xcr0: u64,
    /// Bytes of an XSAVE area, standard format, for `xcr0`.
    pub xsave_size: u32,
    /// The components of `xcr0` behind x87 and SSE, in ascending order.
    pub components: Vec<StateComponent>,
}

/// One register of one leaf of cpuid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureWord {
    /// Input in `eax`.
    pub leaf: u32,
    /// Input in `ecx`.
    pub subleaf: u32,
    /// Which register of the result.
    pub register: Register,
    /// The result.
    pub bits: u32,
}

/// An output register of cpuid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// Where a state component is in an XSAVE area of the standard format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateComponent {
    /// Its bit in `XCR0`.
    pub number: u32,
    /// Bytes from the beginning of the area.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// Leaves, subleaves and registers with feature bits.
const WORDS: &[(u32, u32, Register)] = &[
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Ebx),
    (7, 1, Register::Ecx),
    (7, 1, Register::Edx),
    (0xd, 1, Register::Eax),
    (0x19, 0, Register::Ebx),
    (0x24, 0, Register::Ebx),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
];

impl Cpu {
    /// Queries the processor on which we run.
    pub fn probe() -> Self {
        let base = cpuid(0, 0);
        let one = cpuid(1, 0);
        let vendor = [base.ebx, base.edx, base.ecx].map(u32::to_le_bytes);
        let mut cpu = Self {
            vendor: text(vendor.as_flattened()),
            model: model(),
            signature: one.eax,
            words: WORDS.iter().copied().map(word).collect(),
            ..Self::default()
        };
        const OSXSAVE: u32 = 1 << 27;
        if base.eax >= 0xd && one.ecx & OSXSAVE != 0 {
            // SAFETY: OSXSAVE says that the instruction exists and that the system has enabled it.
            cpu.xcr0 = unsafe { xcr0() };
            cpu.xsave_size = cpuid(0xd, 0).ebx;
            let numbers = (2..63).filter(|number| cpu.xcr0 >> number & 1 == 1);
            cpu.components = numbers.map(component).collect();
        }
        cpu
    }
}

fn word((leaf, subleaf, register): (u32, u32, Register)) -> FeatureWord {
    let there = cpuid(leaf & 0x8000_0000, 0).eax >= leaf;
    // Leaf 7 returns its number of subleaves in eax.
    let there = there && (leaf != 7 || cpuid(7, 0).eax >= subleaf);
    let answer = cpuid(leaf, subleaf);
    let bits = match register {
        _ if !there => 0,
        Register::Eax => answer.eax,
        Register::Ebx => answer.ebx,
        Register::Ecx => answer.ecx,
        Register::Edx => answer.edx,
    };
    FeatureWord {
        leaf,
        subleaf,
        register,
        bits,
    }
}

fn component(number: u32) -> StateComponent {
    let answer = cpuid(0xd, number);
    StateComponent {
        number,
        offset: answer.ebx,
        size: answer.eax,
    }
}

fn model() -> String {
    if cpuid(0x8000_0000, 0).eax < 0x8000_0004 {
        return String::new();
    }
    let brand = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(|leaf| {
        let part = cpuid(leaf, 0);
        [part.eax, part.ebx, part.ecx, part.edx].map(u32::to_le_bytes)
    });
    text(brand.as_flattened().as_flattened())
}

fn text(bytes: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes);
    String::from_utf8_lossy(text).trim().to_owned()
}

#[allow(unused_unsafe)]
fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has cpuid; for a leaf that it does not have it answers
    // something.
    unsafe { __cpuid_count(leaf, subleaf) }
}

/// # Safety
/// The processor has XSAVE and the system has enabled it.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the target feature says that the instruction exists, and the caller that it is enabled;
    // register 0 always exists then.
    #[allow(unused_unsafe)]
    unsafe {
        _xgetbv(0)
    }
}
