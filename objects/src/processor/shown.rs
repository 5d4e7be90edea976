//! The results of CPUID for a program started with a baseline.
//!
//! Features above the level are cleared in the real result. In words that are still growing, leaf 7 above all, only
//! bits known to be harmless stay: hints, and features that only the kernel uses. Sizes and offsets of state
//! components stay: XGETBV cannot be emulated, and XSAVE uses them.

use super::features::{self, Baseline};

/// The output registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Answer {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Answer {
    fn register(&mut self, number: u8) -> &mut u32 {
        match number {
            0 => &mut self.eax,
            1 => &mut self.ebx,
            2 => &mut self.ecx,
            _ => &mut self.edx,
        }
    }
}

/// Bits of a growing word that stay at every level.
struct Harmless {
    word: (u32, u32, u8),
    bits: u32,
}

const fn bits(numbers: &[u32]) -> u32 {
    let (mut all, mut at) = (0, 0);
    while at < numbers.len() {
        all |= 1 << numbers[at];
        at += 1;
    }
    all
}

/// Names of arch/x86/include/asm/cpufeatures.h.
const GROWING: &[Harmless] = &[
    // tsc_adjust, fdp_excptn_only, smep, erms, invpcid, cqm, zero_fcs_fds, rdt_a, smap, intel_pt
    Harmless {
        word: (7, 0, 1),
        bits: bits(&[1, 6, 7, 9, 10, 12, 13, 15, 20, 25]),
    },
    // umip, tme, la57, mawau, bus_lock_detect, cldemote
    Harmless {
        word: (7, 0, 2),
        bits: bits(&[2, 13, 16, 17, 18, 19, 20, 21, 24, 25]),
    },
    // fsrm, srbds_ctrl, md_clear, rtm_always_abort, tsx_force_abort, hybrid_cpu, arch_lbr, and speculation controls
    Harmless {
        word: (7, 0, 3),
        bits: bits(&[4, 9, 10, 11, 13, 15, 19, 26, 27, 28, 29, 30, 31]),
    },
    // fzrm, fsrs, fsrc
    Harmless {
        word: (7, 1, 0),
        bits: bits(&[10, 11, 12]),
    },
    Harmless {
        word: (7, 1, 1),
        bits: 0,
    },
    Harmless {
        word: (7, 1, 2),
        bits: 0,
    },
    // prefetchiti
    Harmless {
        word: (7, 1, 3),
        bits: bits(&[14]),
    },
    Harmless {
        word: (0xd, 1, 0),
        bits: 0,
    },
];

/// Further cleared bits: pku, since ospke is cleared; AMD's lwp; all of Centaur's.
const OUT: &[((u32, u32, u8), u32)] = &[
    ((0x8000_0001, 0, 2), bits(&[15])),
    ((0x8000_0008, 0, 1), bits(&[8])),
    ((0xc000_0001, 0, 3), u32::MAX),
];

/// Leaves of features above every level: SGX, key locker, AMX (twice), AVX10, APX.
const EMPTY: &[u32] = &[0x12, 0x19, 0x1d, 0x1e, 0x24, 0x29];
/// State components.
const STATE: u32 = 0xd;

/// The result shown to a program of that level when the processor returns `raw`.
pub fn shown(level: Baseline, leaf: u32, subleaf: u32, raw: Answer) -> Answer {
    if EMPTY.contains(&leaf) || leaf == STATE && !level.allows("xsave") {
        return Answer::default();
    }
    let mut answer = raw;
    // A leaf without subleaves returns the same for all.
    let asked = match leaf {
        7 | STATE => subleaf,
        _ => 0,
    };
    for register in 0..4 {
        let word = (leaf, asked, register);
        let value = answer.register(register);
        let known = features::ALL.iter().filter(|f| f.word == word);
        if let Some(growing) = GROWING.iter().find(|g| g.word == word) {
            let allowed = known.filter(|f| level.allows(f.name));
            *value &= allowed.fold(growing.bits, |all, f| all | 1 << f.bit);
        } else {
            let above = known.filter(|f| !level.allows(f.name));
            *value &= !above.fold(0, |all, f| all | 1 << f.bit);
        }
        let out = OUT.iter().filter(|(of, _)| *of == word);
        *value &= !out.fold(0, |all, (_, bits)| all | bits);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor with all features.
    fn all(level: Baseline, leaf: u32, subleaf: u32) -> Answer {
        let ones = u32::MAX;
        let raw = Answer {
            eax: ones,
            ebx: ones,
            ecx: ones,
            edx: ones,
        };
        shown(level, leaf, subleaf, raw)
    }

    fn bit(word: u32, number: u32) -> bool {
        word >> number & 1 == 1
    }

    /// The features that a program would detect, out of the whole table.
    fn seen(level: Baseline) -> Vec<&'static str> {
        let features = features::ALL.iter().filter(|f| {
            let (leaf, subleaf, register) = f.word;
            let mut answer = all(level, leaf, subleaf);
            bit(*answer.register(register), f.bit)
        });
        features.map(|f| f.name).collect()
    }

    #[test]
    fn of_the_table_exactly_what_the_level_has_is_seen() {
        for level in Baseline::ALL {
            let allowed = features::ALL.iter().filter(|f| level.allows(f.name));
            assert_eq!(seen(level), allowed.map(|f| f.name).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nothing_is_shown_that_is_not_there() {
        for leaf in (0..0x40)
            .chain(0x8000_0000..0x8000_0030)
            .chain([0xc000_0001])
        {
            for level in Baseline::ALL {
                let none = Answer::default();
                assert_eq!(shown(level, leaf, 0, none), none, "{leaf:x}");
            }
        }
    }

    /// Detection of AVX as in the SDM (volume 1, 14.3), glibc, Go's internal/cpu and OpenSSL: OSXSAVE first, then
    /// XGETBV, which shows that everything is enabled, then the feature.
    #[test]
    fn avx_is_shown_in_v3_alone() {
        let avx = |level| {
            let one = all(level, 1, 0).ecx;
            bit(one, 27) && bit(one, 28)
        };
        // Without checking OSXSAVE, as some programs do.
        let avx2 = |level| bit(all(level, 7, 0).ebx, 5);
        let xsave = |level| bit(all(level, 1, 0).ecx, 26);
        for (level, there) in [(Baseline::V2, false), (Baseline::V3, true)] {
            assert_eq!(
                (avx(level), avx2(level), xsave(level)),
                (there, there, there)
            );
        }
    }

    #[test]
    fn avx512_amx_avx10_and_apx_are_hidden() {
        for level in Baseline::ALL {
            let seven = all(level, 7, 0);
            assert!(
                ![16, 17, 21, 26, 27, 28, 30, 31]
                    .map(|n| bit(seven.ebx, n))
                    .contains(&true)
            );
            assert!(
                ![1, 6, 11, 12, 14]
                    .map(|n| bit(seven.ecx, n))
                    .contains(&true)
            );
            assert!(
                ![2, 3, 8, 22, 23, 24, 25]
                    .map(|n| bit(seven.edx, n))
                    .contains(&true)
            );
            assert!(
                ![19, 21]
                    .map(|n| bit(all(level, 7, 1).edx, n))
                    .contains(&true)
            );
            for leaf in [0x1d, 0x1e, 0x24, 0x29] {
                assert_eq!(all(level, leaf, 0), Answer::default());
            }
        }
    }

    /// Unknown bits of the growing words.
    #[test]
    fn bits_without_a_name_are_not_shown() {
        let seven = all(Baseline::V3, 7, 1);
        assert_eq!(
            (seven.eax, seven.ebx, seven.ecx, seven.edx),
            (7 << 10, 0, 0, 1 << 14)
        );
        assert!(!bit(all(Baseline::V3, 7, 0).edx, 0));
    }

    /// glibc's lazy binding reserves the size in leaf 0xd and saves with XSAVE, which writes all components in XCR0:
    /// a smaller size would overflow.
    #[test]
    fn sizes_of_state_are_true_where_there_is_xsave() {
        assert_eq!(all(Baseline::V3, 0xd, 0).ebx, u32::MAX);
        assert_eq!(all(Baseline::V3, 0xd, 1).eax, 0, "plain XSAVE alone");
        assert_eq!(all(Baseline::V3, 0xd, 5).eax, u32::MAX);
        for subleaf in 0..3 {
            assert_eq!(all(Baseline::V2, 0xd, subleaf), Answer::default());
        }
    }

    #[test]
    fn vendor_and_topology_are_unchanged() {
        for level in Baseline::ALL {
            for leaf in [
                0,
                2,
                4,
                0xb,
                0x16,
                0x1f,
                0x8000_0000,
                0x8000_0002,
                0x8000_001e,
            ] {
                assert_eq!(all(level, leaf, 0).eax, u32::MAX, "{leaf:x}");
                assert_eq!(all(level, leaf, 3).ebx, u32::MAX, "{leaf:x}");
            }
            assert_eq!(all(level, 1, 0).ebx, u32::MAX, "the APIC's id");
            assert_eq!(all(level, 7, 0).eax, u32::MAX, "how many subleaves");
        }
    }

    /// A leaf without subleaves returns the same whatever is in ecx.
    #[test]
    fn what_is_left_in_ecx_does_not_matter() {
        for leaf in [1, 0x8000_0001, 0x8000_0008] {
            assert_eq!(all(Baseline::V2, leaf, 77), all(Baseline::V2, leaf, 0));
        }
    }
}
