//! What the machine is, for the image's header and for the comparison at restore.

use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use ckpt_image::{Arch, Codec, FormatVersion, Header};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::tasks;

use crate::error::Result;
use crate::objects::clock::as_seen_by;
use crate::objects::clock::clock;
use crate::objects::memory::Uses;
use crate::objects::process::Process;
use crate::objects::processor::{Baseline, Processor};
use crate::objects::source::Source;
use crate::objects::{Host, Snapshot, vdso};

fn text(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

/// The fixed header of an image of that process, as far as it is known before the freeze.
pub fn image_header(source: &Source) -> Result<Header> {
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let words = tasks::cmdline(source.dir.clone()).unwrap_or_default();
    let words: Vec<_> = words.iter().map(|w| crate::text::of(w)).collect();
    Ok(Header {
        version: FormatVersion::CURRENT,
        arch: Arch::native(),
        page_size: 4096,
        created_unix_ns: created.as_nanos() as u64,
        boot_id: boot_id(),
        image_id: ckpt_image::random_id()?,
        pid: source.pid.raw() as u32,
        processes: 1,
        threads: source.stat.num_threads,
        codec: Codec::default(),
        comm: source.stat.comm.to_string(),
        host: text("/proc/sys/kernel/hostname"),
        kernel: format!(
            "{} {}",
            text("/proc/sys/kernel/osrelease"),
            text("/proc/sys/kernel/version")
        ),
        cpu: cpu_model(),
        command_line: words.join(" "),
    })
}

/// This boot of this machine.
pub fn boot_id() -> [u8; 16] {
    let hex: Vec<u8> = text("/proc/sys/kernel/random/boot_id")
        .bytes()
        .filter_map(|b| char::from(b).to_digit(16).map(|d| d as u8))
        .collect();
    std::array::from_fn(|i| match hex.get(2 * i..2 * i + 2) {
        Some([high, low]) => high << 4 | low,
        _ => 0,
    })
}

fn cpu_model() -> String {
    let info = text("/proc/cpuinfo");
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    model.map(|(_, name)| name.to_owned()).unwrap_or_default()
}

/// What a restore has to agree with, and how the checkpoint was taken.
pub fn describe(process: &Process, sources: &[&Source]) -> Result<Host> {
    let seen = |id| as_seen_by(Pid(process.pid), id, clock(id));
    let xstate = &process.threads[0].xstate;
    // Software-reserved bytes of the fxsave area (arch/x86/include/asm/user.h): XCR0.
    let xcr0 = xstate
        .get(464..472)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| u64::from_le_bytes(*b));
    Ok(Host {
        kernel: text("/proc/sys/kernel/osrelease"),
        name: text("/proc/sys/kernel/hostname"),
        vdso: vdso::code(),
        xstate_size: xstate.len() as u32,
        xcr0,
        monotonic_ns: seen(libc::CLOCK_MONOTONIC),
        boottime_ns: seen(libc::CLOCK_BOOTTIME),
        // A time namespace shifts it with the other one.
        monotonic_raw_ns: as_seen_by(
            Pid(process.pid),
            libc::CLOCK_MONOTONIC,
            clock(libc::CLOCK_MONOTONIC_RAW),
        ),
        realtime_ns: clock(libc::CLOCK_REALTIME),
        processor: Processor::here(),
        baseline: baseline(sources),
        binds_at_once: sources
            .iter()
            .all(|source| variable(source, BIND_NOW).is_some_and(|value| !value.is_empty())),
        command: std::env::args_os()
            .map(|word| crate::text::of(word.as_bytes()))
            .collect(),
    })
}

/// In the environment of programs that `ckpt run --cpu-baseline` starts: the name of the level.
pub const BASELINE: &str = "CKPT_CPU_BASELINE";

/// What all processes were started to use of the processor: the highest level of any, and no level
/// if one of them was started without.
fn baseline(sources: &[&Source]) -> Option<Baseline> {
    let levels = sources.iter().map(|source| {
        let level = variable(source, BASELINE)?;
        std::str::from_utf8(&level).ok()?.parse().ok()
    });
    levels.collect::<Option<Vec<Baseline>>>()?.into_iter().max()
}

/// With this in the environment, the dynamic linker looks up all functions when a program or library is
/// loaded (ld.so(8)), not each at its first call.
pub const BIND_NOW: &str = "LD_BIND_NOW";

/// A variable of the environment that a process was started with.
fn variable(source: &Source, name: &str) -> Option<Vec<u8>> {
    let environment = std::fs::read(source.dir.join("environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let name = [name, "="].concat();
    let value = variables.find_map(|v| v.strip_prefix(name.as_bytes()))?;
    Some(value.to_owned())
}

/// Adds build ids to programs and what is mapped as they are; done when the job runs again. What is mapped shared is
/// data, and somebody may watch how it is opened (inotify(7)).
pub fn read_build_ids(snapshot: &mut Snapshot) {
    let uses = Uses::of(snapshot);
    for (index, file) in snapshot.mapped_files.iter_mut().enumerate() {
        if file.contents.is_none() && uses.as_it_was(index) {
            file.identity.read_build_id(&file.path);
        }
    }
}
