//! The processor: the features that a program may have detected, and the state components of its threads.
//!
//! A program detects features once and relies on them ever after, so a restore needs all of them; only a program
//! started with a [`Baseline`] needs fewer.

use ckpt_tracer::features::Cpu;
use serde::{Deserialize, Serialize};

use super::{Host, Snapshot, bounds};
use crate::error::Obstacle;

mod features;
mod refit;
mod shown;

pub use features::Baseline;
pub use refit::Refit;
pub use shown::{Answer, shown};

/// A processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Vendor, `GenuineIntel` …
    pub vendor: String,
    /// Brand string.
    pub model: String,
    /// Family, model and stepping (leaf 1 of cpuid, `eax`).
    pub signature: u32,
    /// The feature words of cpuid.
    #[serde(deserialize_with = "bounds::few::<_, _, 256>")]
    pub words: Vec<Word>,
    /// Enabled state components other than x87 and SSE; ascending.
    #[serde(deserialize_with = "bounds::few::<_, _, 64>")]
    pub components: Vec<Component>,
}

/// An output register of cpuid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// 0 to 3 for `eax`, `ebx`, `ecx`, `edx`.
    #[serde(deserialize_with = "bounds::choice")]
    pub register: u8,
    /// Its value.
    pub bits: u32,
}

/// A state component in an XSAVE area of the standard format, which signal frames use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Its bit in `XCR0`.
    #[serde(deserialize_with = "bounds::component")]
    pub number: u32,
    /// Bytes from the beginning of the area.
    #[serde(deserialize_with = "bounds::state")]
    pub offset: u32,
    /// Bytes.
    #[serde(deserialize_with = "bounds::state")]
    pub size: u32,
}

impl Processor {
    /// The processor on which we run.
    pub fn here() -> Self {
        Self::from(&Cpu::probe())
    }

    /// Its enabled state components, `XCR0`.
    pub fn enabled_here() -> u64 {
        Cpu::probe().xcr0
    }

    /// Features that programs can use, as `/proc/cpuinfo` names them.
    pub fn features(&self) -> Vec<&'static str> {
        let has = |word: &Word, bit: u32| word.bits >> bit & 1 == 1;
        let features = features::ALL.iter().filter(|f| {
            let mut words = self.words.iter();
            words.any(|w| (w.leaf, w.subleaf, w.register) == f.word && has(w, f.bit))
        });
        features.map(|f| f.name).collect()
    }
}

impl From<&Cpu> for Processor {
    fn from(cpu: &Cpu) -> Self {
        let words = cpu.words.iter().map(|w| Word {
            leaf: w.leaf,
            subleaf: w.subleaf,
            register: w.register as u8,
            bits: w.bits,
        });
        let components = cpu.components.iter().map(|c| Component {
            number: c.number,
            offset: c.offset,
            size: c.size,
        });
        Self {
            vendor: cpu.vendor.clone(),
            model: cpu.model.clone(),
            signature: cpu.signature,
            words: words.collect(),
            components: components.collect(),
        }
    }
}

/// Result of comparing two processors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Obstacles to the restore.
    pub obstacles: Vec<Obstacle>,
    /// Features that are missing here, but outside the job's baseline.
    pub forgone: Vec<&'static str>,
}

impl Verdict {
    /// The warning for a restore that proceeds.
    pub fn warning(&self) -> Option<String> {
        (!self.forgone.is_empty()).then(|| {
            format!(
                "this processor does not have {}, which the job was started not to use; a program that \
                 executes CPUID itself instead of asking glibc may use them nevertheless",
                features::list(&self.forgone)
            )
        })
    }
}

/// Features that the job needs.
pub fn needed(host: &Host) -> Vec<&'static str> {
    let mut seen = host.processor.features();
    if let Some(baseline) = host.baseline {
        seen.retain(|feature| baseline.allows(feature));
    }
    seen
}

/// Compares the processor of the checkpoint with another one.
pub fn judge(snapshot: &Snapshot, now: &Cpu) -> Verdict {
    let here = Processor::from(now);
    let features = here.features();
    let lacking = |feature: &&str| !features.contains(feature);
    let host = &snapshot.host;
    let missing: Vec<&str> = needed(host).into_iter().filter(lacking).collect();
    let mut obstacles = Vec::new();
    if !missing.is_empty() {
        let reason = format!(
            "may use instructions that this processor does not have ({})",
            features::list(&missing)
        );
        obstacles.push(Obstacle::new("the job", reason, REMEDY));
    }
    obstacles.extend(state_missing(snapshot, now.xcr0));
    obstacles.extend(laid_out_otherwise(host, &here));
    obstacles.extend(overflows(host, now.xcr0));
    let mut forgone: Vec<&str> = host.processor.features();
    forgone.retain(|feature| lacking(feature) && !missing.contains(feature));
    Verdict { obstacles, forgone }
}

const REMEDY: &str = "restore it on a machine with the same or a newer processor; programs started \
                      by ckpt run --cpu-baseline need less";

/// State components that are missing here and that the job has, or may request.
fn state_missing(snapshot: &Snapshot, xcr0: u64) -> Option<Obstacle> {
    let missing = snapshot.host.xcr0 & !xcr0;
    let mut threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let user = threads.find_map(|t| {
        let used = needed_of(&t.xstate, &snapshot.host.processor.components) & missing;
        (used != 0).then_some((t.tid, used))
    });
    if let Some((tid, used)) = user {
        let reason = format!(
            "has processor state that this machine does not have ({})",
            component_names(used)
        );
        let remedy = "restore it on a machine with the same or a newer processor";
        return Some(Obstacle::new(format!("thread {tid}"), reason, remedy));
    }
    // With a baseline it does not request it.
    if missing == 0 || snapshot.host.baseline.is_some() {
        return None;
    }
    let reason = format!(
        "may use processor state that this machine does not have ({})",
        component_names(missing)
    );
    Some(Obstacle::new("the job", reason, REMEDY))
}

/// State that the program itself has saved is in the old layout; a program with a baseline is assumed not to read it
/// ([`Refit`] handles the rest).
fn laid_out_otherwise(host: &Host, now: &Processor) -> Option<Obstacle> {
    if host.baseline.is_some() {
        return None;
    }
    let refit = Refit::to(host, now);
    refit.moved().map(|(old, new)| {
        let reason = format!(
            "may have saved processor state in another layout than this processor's ({} at byte {}, \
             here at {})",
            component_names(1 << old.number),
            old.offset,
            new.offset
        );
        let vendor = match host.processor.vendor.as_str() {
            "" => "that vendor",
            vendor => vendor,
        };
        let remedy = format!(
            "restore it on a processor of {vendor}; programs started by ckpt run --cpu-baseline are not \
             affected"
        );
        Obstacle::new("the job", reason, remedy)
    })
}

/// Components that glibc's dynamic linker saves at the first call of a function (`STATE_SAVE_MASK`,
/// sysdeps/x86/sysdep.h): SSE, AVX, MPX, AVX-512, APX.
const SAVED_BY_LINKER: u64 = 0b1110_1110 | 1 << 19;

/// The dynamic linker computes once how much room they take. With XSAVEC, unused components take none later; without
/// it, all components of the processor are written, possibly past that room.
fn overflows(host: &Host, xcr0: u64) -> Option<Obstacle> {
    let features = host.processor.features();
    let has = |feature| features.contains(&feature);
    let by_xsave = match host.baseline {
        Some(Baseline::V2) => false,
        Some(Baseline::V3) => true,
        None => !has("xsavec"),
    };
    let more = xcr0 & !host.xcr0 & SAVED_BY_LINKER;
    if !(by_xsave && has("xsave") && has("osxsave")) || more == 0 || host.binds_at_once {
        return None;
    }
    let reason = format!(
        "may save processor state into room that is too small on this machine, which has more of it ({}): its \
         dynamic linker does so with XSAVE when a function is called for the first time",
        component_names(more)
    );
    let remedy = "restore it on a machine without that state; programs that are started with LD_BIND_NOW=1 \
                  in their environment, as ckpt run --cpu-baseline does, are not affected";
    Some(Obstacle::new("the job", reason, remedy))
}

/// Offset of the XSAVE header; `XSTATE_BV` is its first word (Intel SDM volume 1, 13.4.2).
pub(super) const HEADER: usize = 512;
/// Smallest offset of a component after the header.
pub(super) const COMPONENTS: usize = 576;

/// Protection keys (pkeys(7)): the component's bit, and the kernel's initial value (`init_pkru`,
/// arch/x86/mm/pkeys.c).
const PKRU: (u32, u32) = (9, 0x5555_5554);

/// Components that a thread's state requires. Every thread has access rights for protection keys; the initial value
/// concerns only keys that are not allocated.
fn needed_of(xstate: &[u8], components: &[Component]) -> u64 {
    let (number, at_birth) = PKRU;
    let keys = components.iter().find(|c| c.number == number);
    let rights = keys.and_then(|c| xstate.get(c.offset as usize..)?.first_chunk());
    let idle = rights.is_some_and(|bytes| u32::from_le_bytes(*bytes) == at_birth);
    in_use(xstate) & !(u64::from(idle) << number)
}

/// `XSTATE_BV`: components that are not in their initial state.
pub(super) fn in_use(xstate: &[u8]) -> u64 {
    let word = xstate.get(HEADER..HEADER + 8).and_then(|b| b.first_chunk());
    word.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Names of state components (Intel SDM volume 1, chapter 13).
pub fn component_names(bits: u64) -> String {
    const NAMES: &[(u64, &str)] = &[
        (1 << 1, "SSE"),
        (1 << 2, "AVX"),
        (3 << 3, "MPX"),
        (7 << 5, "AVX-512"),
        (1 << 9, "protection keys"),
        (3 << 17, "AMX"),
        (1 << 19, "APX"),
    ];
    let names: Vec<&str> = NAMES
        .iter()
        .filter(|(mask, _)| bits & mask != 0)
        .map(|(_, name)| *name)
        .collect();
    if names.is_empty() {
        format!("components {bits:#x}")
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    /// The processor on which we run, and a snapshot taken on it.
    fn here() -> (Cpu, Snapshot) {
        let cpu = Cpu::probe();
        let mut snapshot = fixture::snapshot();
        snapshot.host.processor = Processor::from(&cpu);
        snapshot.host.xcr0 = cpu.xcr0;
        (cpu, snapshot)
    }

    /// The processor without these features.
    fn without(mut cpu: Cpu, names: &[&str]) -> Cpu {
        for feature in features::ALL.iter().filter(|f| names.contains(&f.name)) {
            for word in &mut cpu.words {
                if (word.leaf, word.subleaf, word.register as u8) == feature.word {
                    word.bits &= !(1 << feature.bit);
                }
            }
        }
        cpu
    }

    #[test]
    fn the_same_processor_has_everything() {
        let (cpu, snapshot) = here();
        assert_eq!(judge(&snapshot, &cpu), Verdict::default());
        let features = snapshot.host.processor.features();
        for basic in ["sse2", "fxsr", "cmov"] {
            assert!(features.contains(&basic), "{features:?} lack {basic}");
        }
    }

    #[test]
    fn missing_features_are_named_unless_they_are_above_the_baseline() {
        let (cpu, mut snapshot) = here();
        let features = snapshot.host.processor.features();
        assert!(features.contains(&"popcnt") && features.contains(&"avx2"));
        let less = without(cpu, &["popcnt", "avx2"]);
        let reason = |v: &Verdict| {
            v.obstacles
                .iter()
                .map(|o| o.reason.clone())
                .collect::<Vec<_>>()
        };
        let verdict = judge(&snapshot, &less);
        assert_eq!(reason(&verdict).len(), 1);
        assert!(
            reason(&verdict)[0].contains("(popcnt, avx2)"),
            "{verdict:?}"
        );
        snapshot.host.baseline = Some(Baseline::V2);
        let verdict = judge(&snapshot, &less);
        assert!(reason(&verdict)[0].contains("(popcnt)"), "{verdict:?}");
        assert_eq!(verdict.forgone, ["avx2"]);
    }

    #[test]
    fn components_that_are_used_are_needed_whatever_the_baseline() {
        let (mut cpu, mut snapshot) = here();
        snapshot.host.baseline = Some(Baseline::V2);
        cpu.xcr0 &= !(1 << 2);
        assert_eq!(judge(&snapshot, &cpu).obstacles, []);
        let mut xstate = vec![0; 832];
        xstate[HEADER] = 1 << 2;
        snapshot.processes[0].threads[1].xstate = xstate;
        let verdict = judge(&snapshot, &cpu);
        assert!(verdict.obstacles[0].reason.contains("(AVX)"), "{verdict:?}");
    }

    #[test]
    fn more_state_than_the_linker_has_room_for_is_refused() {
        let (mut cpu, mut snapshot) = here();
        let why = |snapshot: &Snapshot, cpu: &Cpu| -> Vec<String> {
            let verdict = judge(snapshot, cpu);
            verdict.obstacles.into_iter().map(|o| o.reason).collect()
        };
        snapshot.host.xcr0 = 0b111;
        cpu.xcr0 = 0b1110_0111;
        let old = without(cpu.clone(), &["xsavec"]);
        snapshot.host.processor.words = Processor::from(&old).words;
        let said = why(&snapshot, &cpu);
        assert!(said.len() == 1 && said[0].contains("(AVX-512)"), "{said:?}");
        snapshot.host.binds_at_once = true;
        assert_eq!(why(&snapshot, &cpu), [""; 0]);
        snapshot.host.binds_at_once = false;
        // The baseline disables XSAVE.
        snapshot.host.baseline = Some(Baseline::V2);
        assert_eq!(why(&snapshot, &cpu), [""; 0]);
        // It has XSAVEC, which the baseline disables.
        snapshot.host.processor.words = Processor::from(&cpu).words;
        snapshot.host.baseline = Some(Baseline::V3);
        assert_eq!(why(&snapshot, &cpu).len(), 1);
        snapshot.host.baseline = None;
        assert_eq!(why(&snapshot, &cpu), [""; 0]);
    }

    #[test]
    fn another_layout_is_refused() {
        let (cpu, mut snapshot) = here();
        snapshot.host.processor.components[0].offset += 64;
        let verdict = judge(&snapshot, &cpu);
        assert!(
            verdict.obstacles[0].reason.contains("another layout"),
            "{verdict:?}"
        );
    }

    /// Two processors: one with AVX only, one with a further component.
    #[test]
    fn a_state_fits_a_larger_and_a_smaller_machine() {
        let avx = Component {
            number: 2,
            offset: 576,
            size: 256,
        };
        let keys = Component {
            number: 9,
            offset: 832,
            size: 8,
        };
        let host = |components: &[Component], size| Host {
            xstate_size: size,
            xcr0: components.iter().fold(3, |all, c| all | 1 << c.number),
            processor: Processor {
                components: components.to_vec(),
                ..Processor::default()
            },
            ..Host::default()
        };
        let mut small = vec![1; 832];
        small[HEADER..HEADER + 64].fill(0);
        small[HEADER] = 0b111;
        let mut large = vec![2; 840];
        large[HEADER..HEADER + 64].fill(0);
        large[HEADER..HEADER + 2].copy_from_slice(&[0b11, 0b10]);

        let processor = |components: &[Component]| Processor {
            components: components.to_vec(),
            ..Processor::default()
        };
        let refit = Refit::to(&host(&[avx], 832), &processor(&[avx, keys]));
        let up = refit.fit(&small, &large);
        assert_eq!(up.len(), 840);
        assert_eq!(up[..HEADER], small[..HEADER]);
        assert_eq!(up[HEADER..HEADER + 2], [0b111, 0b10]);
        assert_eq!(up[576..832], small[576..]);
        assert_eq!(up[832..], large[832..]);

        let refit = Refit::to(&host(&[avx, keys], 840), &processor(&[avx]));
        let down = refit.fit(&large, &small);
        assert_eq!(down.len(), 832);
        assert_eq!(down[HEADER..HEADER + 2], [0b11, 0]);
        assert_eq!(down[576..], large[576..832]);

        // On a processor of another vendor the second one has a higher offset.
        let far = Component {
            offset: 2688,
            ..keys
        };
        large[HEADER + 1] = 0b10;
        let mut theirs = vec![0; 2696];
        theirs[HEADER] = 0b11;
        let refit = Refit::to(&host(&[avx, keys], 840), &processor(&[avx, far]));
        let moved = refit.fit(&large, &theirs);
        assert_eq!(moved.len(), 2696);
        assert_eq!(moved[HEADER..HEADER + 2], [0b11, 0b10]);
        assert_eq!(moved[2688..], large[832..]);
        assert_eq!(moved[832..2688], theirs[832..2688]);
    }

    #[test]
    fn protection_keys_are_needed_only_if_changed() {
        let (mut cpu, mut snapshot) = here();
        snapshot.host.baseline = Some(Baseline::V2);
        snapshot.host.xcr0 |= 1 << 9;
        snapshot.host.processor.components = vec![Component {
            number: 9,
            offset: 832,
            size: 8,
        }];
        cpu.xcr0 &= !(1 << 9);
        let mut xstate = vec![0; 840];
        xstate[HEADER + 1] = 1 << 1;
        xstate[832..836].copy_from_slice(&PKRU.1.to_le_bytes());
        snapshot.processes[0].threads[1].xstate = xstate.clone();
        assert_eq!(judge(&snapshot, &cpu).obstacles, []);
        xstate[832] = 0;
        snapshot.processes[0].threads[1].xstate = xstate;
        let verdict = judge(&snapshot, &cpu);
        assert!(
            verdict.obstacles[0].reason.contains("(protection keys)"),
            "{verdict:?}"
        );
    }
}
