//! Who stays outside a job and yet has something in common with it.
//!
//! What a fork left in common with a process that is no part of the job (an open file with its
//! offset, shared anonymous memory) goes on being shared while the job runs, and a restored job
//! has one of its own. That is no obstacle, but whoever takes a checkpoint should know.

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

/// Something that the job has in common with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// One sentence.
    pub sentence: String,
    /// One of the job's standard streams, which is shared with whoever started it as a rule.
    pub standard: bool,
}

/// What the processes of a job have in common with others. As far as can be told: of processes
/// that may not be traced nothing is known, and all of them run.
pub fn shared(job: &[Pid]) -> Vec<Shared> {
    let everybody = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let me = Pid::own();
    // A job that runs may have got another child since it was looked through.
    let parent = |pid: &Pid| {
        let status = read_status(*pid).ok()?;
        (status.ppid.raw() != 0).then_some(status.ppid)
    };
    let of_the_job =
        |pid: &Pid| std::iter::successors(Some(*pid), parent).any(|pid| job.contains(&pid));
    let others: Vec<Pid> = everybody
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

/// By what their links say, the descriptors of these processes.
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

/// Whether the open file has a state that one would miss: devices and terminals have none, and
/// pipes and sockets with somebody outside are told of elsewhere.
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

/// Memory that is shared and has no name by which a restored job would find it again.
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
