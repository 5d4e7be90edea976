//! Objects that a job shares with processes outside.
//!
//! What a fork left shared with a process outside the job (an open file with its offset, shared anonymous memory)
//! stays shared while the job runs; a restored job has its own. That is no obstacle, but the user should know.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ckpt_tracer::kcmp::{KcmpType, kcmp};
use ckpt_tracer::proc::fdlink::list_fds;
use ckpt_tracer::proc::maps::{Vma, VmaName, read_maps};
use ckpt_tracer::proc::status::read_status;
use ckpt_tracer::proc::{ProcRoot, tasks};
use ckpt_tracer::{Pid, Tid};

/// An object shared with other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// One sentence.
    pub sentence: String,
    /// A standard stream of the job, which is usually shared with the process that started it.
    pub standard: bool,
}

/// Objects that the processes of a job share with others. Processes that may not be traced are left out, and all of
/// them run.
pub fn shared(job: &[Pid]) -> Vec<Shared> {
    let all = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let me = Pid::own();
    // A running job may have created another child since it was listed.
    let parent = |pid: &Pid| {
        let status = read_status(*pid).ok()?;
        (status.ppid.raw() != 0).then_some(status.ppid)
    };
    let of_the_job =
        |pid: &Pid| std::iter::successors(Some(*pid), parent).any(|pid| job.contains(&pid));
    let others: Vec<Pid> = all
        .into_iter()
        .filter(|pid| *pid != me && parent(pid) != Some(me) && !of_the_job(pid))
        .collect();
    let mut found = open_files(job, &others);
    found.extend(memory(job, &others));
    found
}

/// A process by name, for messages.
pub fn process_name(pid: Pid) -> String {
    format!("process {pid} ({})", tasks::name_to_tell(pid))
}

/// A descriptor.
type Fd = (Pid, i32);

/// The descriptors of these processes, by the text of their links.
fn by_link(pids: &[Pid], wanted: impl Fn(&Path, &[u8]) -> bool) -> HashMap<Vec<u8>, Vec<Fd>> {
    let mut found: HashMap<Vec<u8>, Vec<Fd>> = HashMap::new();
    for &pid in pids {
        for fd in list_fds(pid).unwrap_or_default() {
            let at = Path::new("/proc").join(format!("{pid}/fd/{fd}"));
            let Ok(link) = fs::read_link(&at) else {
                continue;
            };
            let link = link.as_os_str().as_bytes();
            if wanted(&at, link) {
                found.entry(link.to_vec()).or_default().push((pid, fd));
            }
        }
    }
    found
}

/// Whether the open file has a state worth sharing: devices and terminals have none, and pipes and sockets with an
/// end outside are reported elsewhere.
fn has_state(at: &Path, link: &[u8]) -> bool {
    link.starts_with(b"anon_inode:")
        || link.starts_with(b"/") && fs::metadata(at).is_ok_and(|m| m.is_file())
}

fn open_files(job: &[Pid], others: &[Pid]) -> Vec<Shared> {
    let ours = by_link(job, has_state);
    let theirs = by_link(others, |_, link| ours.contains_key(link));
    let mut found = Vec::new();
    let mut told = BTreeSet::new();
    for (link, fds) in &ours {
        for other in theirs.get(link).into_iter().flatten() {
            let same = |fd: &&Fd| {
                let what = KcmpType::File(fd.1, other.1);
                kcmp(Tid(fd.0.raw()), Tid(other.0.raw()), what).is_ok_and(|o| o.is_eq())
            };
            let Some(fd) = fds.iter().find(same) else {
                continue;
            };
            if told.insert((*fd, other.0)) {
                found.push((*fd, link, other.0));
            }
        }
    }
    found.sort();
    let sentence = |((pid, fd), link, other): (Fd, &Vec<u8>, Pid)| Shared {
        sentence: format!(
            "fd {fd} of {} ({}) is the same open file as in {}, which is not part of the job: a restored job \
             has it to itself, with an offset of its own",
            process_name(pid),
            crate::text::of(link),
            process_name(other),
        ),
        standard: fd <= 2,
    };
    found.into_iter().map(sentence).collect()
}

/// Shared memory without a name by which a restored job would find it.
fn is_nameless(vma: &&Vma) -> bool {
    let nameless = match &vma.name {
        VmaName::File { path, deleted } => *deleted && !path.to_string_lossy().starts_with("/SYSV"),
        VmaName::AnonShmemNamed(_) => true,
        _ => false,
    };
    vma.shared && vma.inode != 0 && nameless
}

fn memory(job: &[Pid], others: &[Pid]) -> Vec<Shared> {
    let mut objects = HashMap::new();
    for &pid in job {
        for vma in read_maps(pid)
            .unwrap_or_default()
            .iter()
            .filter(is_nameless)
        {
            objects
                .entry((vma.dev, vma.inode))
                .or_insert((pid, vma.start));
        }
    }
    let mut found: Vec<(Pid, u64, Pid)> = Vec::new();
    if !objects.is_empty() {
        for &other in others {
            let maps = read_maps(other).unwrap_or_default();
            let keys: BTreeSet<_> = maps.iter().map(|vma| (vma.dev, vma.inode)).collect();
            let common = keys.iter().filter_map(|key| objects.get(key));
            found.extend(common.map(|(pid, start)| (*pid, *start, other)));
        }
    }
    found.sort();
    let sentence = |(pid, start, other): (Pid, u64, Pid)| Shared {
        sentence: format!(
            "the memory at {start:#x} of {} is shared with {}, which is not part of the job: a restored job \
             has it to itself",
            process_name(pid),
            process_name(other),
        ),
        standard: false,
    };
    found.into_iter().map(sentence).collect()
}
