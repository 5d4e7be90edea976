//! Summary of an image.

use ckpt_image::Reader;
use serde::Serialize;

use crate::objects::Snapshot;
use crate::objects::zombie::Zombie;

/// The summary that `ckpt inspect` shows first; the JSON keys are fixed.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Path of the image.
    pub image: String,
    /// Version of the file format, such as `1.0`.
    pub format: String,
    /// Identity of the image, 32 hexadecimal digits.
    pub image_id: String,
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Name of the job's first process.
    pub name: String,
    /// Its pid.
    pub pid: u32,
    /// Its command line, cut at 512 bytes.
    pub command_line: String,
    /// The machine.
    pub host: String,
    /// Its kernel.
    pub kernel: String,
    /// Its boot id: `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Its processor.
    pub cpu: String,
    /// Features of the processor that programs can use, as `/proc/cpuinfo` names them.
    pub cpu_features: Vec<&'static str>,
    /// The baseline for which the job was started, such as `x86-64-v3`.
    pub cpu_baseline: Option<&'static str>,
    /// The command line that took the checkpoint.
    pub checkpoint_command: Vec<String>,
    /// When the checkpoint was taken, nanoseconds since 1970.
    pub created_unix_ns: u64,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
    /// Number of pages.
    pub pages: u64,
    /// Bytes of memory in the image before compression.
    pub memory_bytes: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Memory size divided by image size: 4.0 means a quarter.
    pub ratio: f64,
    /// The codec, such as `zstd:1`.
    pub codec: String,
    /// Number of files that `--bundle` stored.
    pub bundled_files: usize,
    /// Largest number of inherited seccomp filters of the environment in a thread.
    pub filters_around: u32,
    /// The processes, the job's first one first.
    pub process_list: Vec<ProcessView>,
    /// Zombies.
    pub zombies: Vec<ZombieView>,
}

/// A process in the summary.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessView {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Number of threads.
    pub threads: usize,
    /// Number of descriptors.
    pub fds: usize,
    /// Number of mappings.
    pub mappings: usize,
    /// Whether it is in a group stop.
    pub stopped: bool,
    /// Its arguments.
    pub command_line: Vec<String>,
    /// Security contexts of its first thread, as `attribute=value`.
    pub security: Vec<String>,
}

/// A zombie.
#[derive(Clone, Debug, Serialize)]
pub struct ZombieView {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its wait status.
    pub status: i32,
    /// Its name.
    pub name: String,
}

/// The summary of an image.
pub fn summary(reader: &Reader, snapshot: &Snapshot) -> Summary {
    let header = reader.header();
    let memory_bytes = reader.pages().saturating_mul(header.page_size.into());
    Summary {
        image: crate::text::of_path(reader.path()),
        format: header.version.to_string(),
        image_id: header
            .image_id
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        arch: header.arch.to_string(),
        name: header.comm.clone(),
        pid: header.pid,
        command_line: header.command_line.clone(),
        host: header.host.clone(),
        kernel: header.kernel.clone(),
        boot_id: boot_id(header.boot_id),
        cpu: header.cpu.clone(),
        cpu_features: snapshot.host.processor.features(),
        cpu_baseline: snapshot.host.baseline.map(|level| level.name()),
        checkpoint_command: snapshot.host.command.clone(),
        created_unix_ns: header.created_unix_ns,
        processes: snapshot.processes.len(),
        threads: snapshot
            .processes
            .iter()
            .map(|process| process.threads.len())
            .sum(),
        pages: reader.pages(),
        memory_bytes,
        image_bytes: reader.bytes(),
        ratio: memory_bytes as f64 / reader.bytes().max(1) as f64,
        codec: header.codec.to_string(),
        bundled_files: snapshot.bundle.len(),
        filters_around: snapshot.filters_around(),
        process_list: snapshot.processes.iter().map(process).collect(),
        zombies: snapshot.zombies.iter().map(zombie).collect(),
    }
}

fn zombie(zombie: &Zombie) -> ZombieView {
    ZombieView {
        pid: zombie.pid,
        parent: zombie.parent,
        status: zombie.status,
        name: crate::text::of(&zombie.name),
    }
}

/// In the kernel's notation, in groups.
fn boot_id(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [0..8, 8..12, 12..16, 16..20, 20..32];
    groups.map(|group| &hex[group]).join("-")
}

fn process(process: &crate::objects::process::Process) -> ProcessView {
    let line = process
        .command_line
        .strip_suffix(b"\0")
        .unwrap_or(&process.command_line);
    let words = line.split(|byte| *byte == 0);
    ProcessView {
        pid: process.pid,
        parent: process.parent,
        threads: process.threads.len(),
        fds: process.fds.len(),
        mappings: process.memory.mappings.len(),
        stopped: process.stopped.is_some(),
        command_line: words.map(crate::text::of).collect(),
        security: process.threads.first().map_or(Vec::new(), |leader| {
            let labels = leader.security.iter();
            labels
                .map(|l| format!("{}={}", l.attribute, l.text()))
                .collect()
        }),
    }
}
