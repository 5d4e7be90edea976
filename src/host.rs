//! Properties of the machine, for the image's header and for the comparison at a restore.

use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use ckpt_image::{Arch, Codec, FormatVersion, Header};
use ckpt_tracer::Pid;
use ckpt_tracer::proc::tasks;

use crate::error::Result;
use crate::objects::clock::as_seen_by;
use crate::objects::clock::clock;
use crate::objects::index::FileId;
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

/// The fixed header of an image of that process, as far as known before the freeze.
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

/// The boot id of this machine.
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

/// Properties that a restore compares, and how the checkpoint was taken.
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
        // A time namespace shifts it together with CLOCK_MONOTONIC.
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

/// Environment variable of programs that `ckpt run --cpu-baseline` starts: the name of the level.
pub const BASELINE: &str = "CKPT_CPU_BASELINE";

/// The baseline of the job: the highest level of any process, and none if one of them was started without.
fn baseline(sources: &[&Source]) -> Option<Baseline> {
    let levels = sources.iter().map(|source| {
        let level = variable(source, BASELINE)?;
        std::str::from_utf8(&level).ok()?.parse().ok()
    });
    levels.collect::<Option<Vec<Baseline>>>()?.into_iter().max()
}

/// With this variable the dynamic linker resolves all functions when a program or library is loaded (ld.so(8)), not
/// at their first call.
pub const BIND_NOW: &str = "LD_BIND_NOW";

/// A variable of the initial environment of a process.
fn variable(source: &Source, name: &str) -> Option<Vec<u8>> {
    let environment = std::fs::read(source.dir.join("environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let name = [name, "="].concat();
    let value = variables.find_map(|v| v.strip_prefix(name.as_bytes()))?;
    Some(value.to_owned())
}

/// Adds build ids to programs and private mappings, after the job runs again. Shared mappings are data, and opening
/// them may be visible to an inotify(7) watch.
pub fn read_build_ids(snapshot: &mut Snapshot) {
    let uses = Uses::of(snapshot);
    for (index, file) in snapshot.mapped_files.iter_mut().enumerate() {
        if file.contents.is_none() && uses.as_it_was(FileId(index)) {
            file.identity.read_build_id(&file.path);
        }
    }
}
