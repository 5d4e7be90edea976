//! Features by name, and the levels of the x86-64 psABI.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A feature that programs can use and then require: elsewhere its instructions fault or do something else.
pub(super) struct Feature {
    /// As in `/proc/cpuinfo`.
    pub(super) name: &'static str,
    /// Leaf, subleaf and register of cpuid.
    pub(super) word: (u32, u32, u8),
    /// Bit of that register.
    pub(super) bit: u32,
}

const fn feature(name: &'static str, word: (u32, u32, u8), bit: u32) -> Feature {
    Feature { name, word, bit }
}

const ONE_C: (u32, u32, u8) = (1, 0, 2);
const ONE_D: (u32, u32, u8) = (1, 0, 3);
const SEVEN_B: (u32, u32, u8) = (7, 0, 1);
const SEVEN_C: (u32, u32, u8) = (7, 0, 2);
const SEVEN_D: (u32, u32, u8) = (7, 0, 3);
const SEVEN_ONE_A: (u32, u32, u8) = (7, 1, 0);
const SEVEN_ONE_D: (u32, u32, u8) = (7, 1, 3);
const XSAVE_A: (u32, u32, u8) = (0xd, 1, 0);
const EXTENDED_C: (u32, u32, u8) = (0x8000_0001, 0, 2);
const EXTENDED_D: (u32, u32, u8) = (0x8000_0001, 0, 3);
const EXTENDED_EIGHT_B: (u32, u32, u8) = (0x8000_0008, 0, 1);

/// From Intel SDM volume 2 (CPUID) and AMD APM volume 3 (appendix E); names as in arch/x86/include/asm/cpufeatures.h.
/// Left out: hints that are no-operations where unknown, and bits that only describe speed.
pub(super) const ALL: &[Feature] = &[
    feature("fpu", ONE_D, 0),
    feature("tsc", ONE_D, 4),
    feature("cx8", ONE_D, 8),
    feature("cmov", ONE_D, 15),
    feature("clflush", ONE_D, 19),
    feature("mmx", ONE_D, 23),
    feature("fxsr", ONE_D, 24),
    feature("sse", ONE_D, 25),
    feature("sse2", ONE_D, 26),
    feature("pni", ONE_C, 0),
    feature("pclmulqdq", ONE_C, 1),
    feature("ssse3", ONE_C, 9),
    feature("fma", ONE_C, 12),
    feature("cx16", ONE_C, 13),
    feature("sse4_1", ONE_C, 19),
    feature("sse4_2", ONE_C, 20),
    feature("movbe", ONE_C, 22),
    feature("popcnt", ONE_C, 23),
    feature("aes", ONE_C, 25),
    feature("xsave", ONE_C, 26),
    feature("osxsave", ONE_C, 27),
    feature("avx", ONE_C, 28),
    feature("f16c", ONE_C, 29),
    feature("rdrand", ONE_C, 30),
    feature("fsgsbase", SEVEN_B, 0),
    feature("bmi1", SEVEN_B, 3),
    feature("avx2", SEVEN_B, 5),
    feature("bmi2", SEVEN_B, 8),
    feature("rtm", SEVEN_B, 11),
    feature("mpx", SEVEN_B, 14),
    feature("avx512f", SEVEN_B, 16),
    feature("avx512dq", SEVEN_B, 17),
    feature("rdseed", SEVEN_B, 18),
    feature("adx", SEVEN_B, 19),
    feature("avx512ifma", SEVEN_B, 21),
    feature("clflushopt", SEVEN_B, 23),
    feature("clwb", SEVEN_B, 24),
    feature("avx512pf", SEVEN_B, 26),
    feature("avx512er", SEVEN_B, 27),
    feature("avx512cd", SEVEN_B, 28),
    feature("sha_ni", SEVEN_B, 29),
    feature("avx512bw", SEVEN_B, 30),
    feature("avx512vl", SEVEN_B, 31),
    feature("avx512vbmi", SEVEN_C, 1),
    feature("ospke", SEVEN_C, 4),
    feature("waitpkg", SEVEN_C, 5),
    feature("avx512_vbmi2", SEVEN_C, 6),
    feature("gfni", SEVEN_C, 8),
    feature("vaes", SEVEN_C, 9),
    feature("vpclmulqdq", SEVEN_C, 10),
    feature("avx512_vnni", SEVEN_C, 11),
    feature("avx512_bitalg", SEVEN_C, 12),
    feature("avx512_vpopcntdq", SEVEN_C, 14),
    feature("rdpid", SEVEN_C, 22),
    feature("movdiri", SEVEN_C, 27),
    feature("movdir64b", SEVEN_C, 28),
    feature("enqcmd", SEVEN_C, 29),
    feature("avx512_4vnniw", SEVEN_D, 2),
    feature("avx512_4fmaps", SEVEN_D, 3),
    feature("avx512_vp2intersect", SEVEN_D, 8),
    feature("serialize", SEVEN_D, 14),
    feature("tsxldtrk", SEVEN_D, 16),
    feature("amx_bf16", SEVEN_D, 22),
    feature("avx512_fp16", SEVEN_D, 23),
    feature("amx_tile", SEVEN_D, 24),
    feature("amx_int8", SEVEN_D, 25),
    feature("sha512", SEVEN_ONE_A, 0),
    feature("sm3", SEVEN_ONE_A, 1),
    feature("sm4", SEVEN_ONE_A, 2),
    feature("avx_vnni", SEVEN_ONE_A, 4),
    feature("avx512_bf16", SEVEN_ONE_A, 5),
    feature("cmpccxadd", SEVEN_ONE_A, 7),
    feature("amx_fp16", SEVEN_ONE_A, 21),
    feature("avx_ifma", SEVEN_ONE_A, 23),
    feature("avx_vnni_int8", SEVEN_ONE_D, 4),
    feature("avx_ne_convert", SEVEN_ONE_D, 5),
    feature("amx_complex", SEVEN_ONE_D, 8),
    feature("avx_vnni_int16", SEVEN_ONE_D, 10),
    feature("user_msr", SEVEN_ONE_D, 15),
    feature("avx10", SEVEN_ONE_D, 19),
    feature("apx", SEVEN_ONE_D, 21),
    feature("xsaveopt", XSAVE_A, 0),
    feature("xsavec", XSAVE_A, 1),
    feature("xgetbv1", XSAVE_A, 2),
    feature("lahf_lm", EXTENDED_C, 0),
    feature("abm", EXTENDED_C, 5),
    feature("sse4a", EXTENDED_C, 6),
    feature("misalignsse", EXTENDED_C, 7),
    feature("xop", EXTENDED_C, 11),
    feature("fma4", EXTENDED_C, 16),
    feature("tbm", EXTENDED_C, 21),
    feature("mwaitx", EXTENDED_C, 29),
    feature("mmxext", EXTENDED_D, 22),
    feature("rdtscp", EXTENDED_D, 27),
    feature("3dnowext", EXTENDED_D, 30),
    feature("3dnow", EXTENDED_D, 31),
    feature("clzero", EXTENDED_EIGHT_B, 0),
    feature("rdpru", EXTENDED_EIGHT_B, 4),
];

/// A level of the x86-64 psABI, to which a program is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Baseline {
    /// x86-64-v2: SSE4.2, POPCNT … (about 2009).
    V2,
    /// x86-64-v3: AVX2, FMA, BMI … (about 2015).
    V3,
}

/// Every x86-64 processor has these.
const V1: &[&str] = &[
    "fpu", "tsc", "cx8", "cmov", "clflush", "mmx", "fxsr", "sse", "sse2",
];
const V2: &[&str] = &[
    "pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm",
];
/// The dynamic linker saves registers with the last two, when XSAVEC is disabled.
const V3: &[&str] = &[
    "fma", "movbe", "avx", "f16c", "bmi1", "avx2", "bmi2", "abm", "xsave", "osxsave",
];
/// Names of the features above each level that glibc can be told to ignore, as in its tunable `glibc.cpu.hwcaps`
/// (sysdeps/x86/cpu-tunables.c).
const ABOVE_V3: &[&str] = &[
    "AVX512F", "AVX512VL", "AVX512BW", "AVX512DQ", "AVX512CD", "AVX512ER", "AVX512PF", "RTM",
    "FMA4", "XOP", "XSAVEC",
];
const ABOVE_V2: &[&str] = &[
    "AVX2",
    "AVX",
    "FMA",
    "BMI1",
    "BMI2",
    "F16C",
    "LZCNT",
    "MOVBE",
    "XSAVE",
    "AVX_Fast_Unaligned_Load",
];

impl Baseline {
    /// All levels, the lowest first.
    pub const ALL: [Self; 2] = [Self::V2, Self::V3];

    /// As the psABI names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }

    /// Whether a program of that level may use the feature.
    pub fn allows(self, feature: &str) -> bool {
        let levels: &[&[&str]] = match self {
            Self::V2 => &[V1, V2],
            Self::V3 => &[V1, V2, V3],
        };
        levels.iter().any(|level| level.contains(&feature))
    }

    /// The value of `GLIBC_TUNABLES` for a program, given its previous value: glibc then selects neither functions
    /// nor libraries of its `glibc-hwcaps` directories above the level.
    pub fn glibc_tunables(self, before: Option<&str>) -> String {
        const HWCAPS: &str = "glibc.cpu.hwcaps=";
        let above: &[&[&str]] = match self {
            Self::V2 => &[ABOVE_V3, ABOVE_V2],
            Self::V3 => &[ABOVE_V3],
        };
        let off = above.iter().copied().flatten();
        let off: Vec<String> = off.map(|name| format!("-{name}")).collect();
        let before = before.unwrap_or_default().split(':');
        let (caps, mut others): (Vec<&str>, Vec<&str>) = before
            .filter(|tunable| !tunable.is_empty())
            .partition(|tunable| tunable.starts_with(HWCAPS));
        // glibc uses only one of several occurrences.
        let caps = caps.iter().filter_map(|t| t.strip_prefix(HWCAPS));
        let all: Vec<&str> = caps.chain(off.iter().map(String::as_str)).collect();
        let all = format!("{HWCAPS}{}", all.join(","));
        others.push(&all);
        others.join(":")
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Baseline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|level| level.name() == text);
        found.ok_or_else(|| "x86-64-v2 or x86-64-v3 is expected".into())
    }
}

/// Names for a message, limited in number.
pub(super) fn list(names: &[&str]) -> String {
    const SHOWN: usize = 16;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - more].join(", ");
    match more {
        0 => shown,
        _ => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bits_are_unique() {
        for (index, one) in ALL.iter().enumerate() {
            for other in &ALL[..index] {
                assert_ne!(one.name, other.name);
                assert_ne!((one.word, one.bit), (other.word, other.bit), "{}", one.name);
            }
        }
        for name in [V1, V2, V3].concat() {
            assert!(ALL.iter().any(|f| f.name == name), "{name}");
        }
    }

    /// `/proc/cpuinfo` omits disabled features and those without a name.
    #[test]
    fn what_the_kernel_names_is_found() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = info.lines().find(|l| l.starts_with("flags")).unwrap();
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let found = super::super::Processor::here().features();
        for feature in ALL.iter().filter(|f| flags.contains(&f.name)) {
            assert!(found.contains(&feature.name), "{}", feature.name);
        }
        let unknown = ["osxsave", "avx10", "apx", "user_msr"];
        let kernels = found.iter().filter(|name| !unknown.contains(name));
        let missing: Vec<_> = kernels.filter(|name| !flags.contains(name)).collect();
        assert!(missing.len() <= 3, "{missing:?}");
    }

    #[test]
    fn levels_are_parsed_and_contain_each_other() {
        for level in Baseline::ALL {
            assert_eq!(level.name().parse(), Ok(level));
            assert!(level.allows("sse2") && level.allows("popcnt"));
            assert!(!level.allows("avx512f"));
        }
        assert!(Baseline::V3.allows("avx2") && !Baseline::V2.allows("avx2"));
        assert!("x86-64-v9".parse::<Baseline>().is_err());
    }

    #[test]
    fn glibc_is_told_what_is_above() {
        let text = Baseline::V3.glibc_tunables(None);
        assert!(text.starts_with("glibc.cpu.hwcaps=-AVX512F,"), "{text}");
        assert!(!text.contains("-AVX2"), "{text}");
        let before = "glibc.malloc.check=1:glibc.cpu.hwcaps=-ERMS:";
        let text = Baseline::V2.glibc_tunables(Some(before));
        let begin = "glibc.malloc.check=1:glibc.cpu.hwcaps=-ERMS,-AVX512F,";
        assert!(
            text.starts_with(begin) && text.contains(",-AVX2,-AVX,"),
            "{text}"
        );
    }
}
