//! What an image needs from the machine that it is restored on.

use ckpt_tracer::capabilities::Use;
use std::collections::HashSet;
use std::path::Path;

use serde::Serialize;

use crate::objects::files::Kind;
use crate::objects::files::regular::Regular;
use crate::objects::ipc::Object;
use crate::objects::ipc::table::Type;
use crate::objects::memory::{Backing, FileIdentity, KernelMapping, Uses};
use crate::objects::processor;
use crate::objects::{Snapshot, aio};
use crate::restore::surroundings;

/// One thing that must be there; the JSON keys stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NeedView {
    /// What kind of thing: `program`, `mapped file`, `open file`, `directory` …
    pub kind: &'static str,
    /// Its path or name.
    pub name: String,
    /// What for, or how much of it.
    pub detail: String,
    /// Size of a file in bytes.
    pub size: Option<u64>,
    /// Time of its last change, nanoseconds since 1970.
    pub modified_ns: Option<i64>,
    /// Its inode number.
    pub inode: Option<u64>,
    /// The image has it too, so it need not be there.
    pub bundled: bool,
}

impl NeedView {
    fn new(kind: &'static str, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind,
            name: name.into(),
            detail: detail.into(),
            size: None,
            modified_ns: None,
            inode: None,
            bundled: false,
        }
    }

    /// A file of the job.
    fn file(
        kind: &'static str,
        path: &Path,
        identity: &FileIdentity,
        detail: &str,
        snapshot: &Snapshot,
    ) -> Self {
        let bundled = snapshot.bundled(identity).is_some();
        let detail = match bundled {
            true => format!("{detail}; bundled"),
            false => detail.to_owned(),
        };
        Self {
            size: Some(identity.size),
            modified_ns: Some(identity.modified_ns),
            inode: Some(identity.inode),
            bundled,
            ..Self::new(kind, crate::text::of_path(path), detail)
        }
    }
}

/// Everything that the image needs, files first.
pub fn needs(snapshot: &Snapshot) -> Vec<NeedView> {
    let mut needs = mapped_files(snapshot);
    needs.extend(open_files(snapshot));
    needs.extend(directories(snapshot));
    needs.extend(ipc(snapshot));
    needs.extend(terminals(snapshot));
    needs.extend(ids(snapshot));
    needs.extend(kernel(snapshot));
    needs.extend(processor(snapshot));
    needs.extend(privileges(snapshot));
    needs.extend(amounts(snapshot));
    let mut seen = HashSet::new();
    needs.retain(|need| seen.insert((need.kind, need.name.clone(), need.detail.clone())));
    needs
}

fn mapped_files(snapshot: &Snapshot) -> Vec<NeedView> {
    let uses = Uses::of(snapshot);
    let files = snapshot.mapped_files.iter().enumerate();
    let files = files.filter(|(_, file)| file.contents.is_none());
    let view = |(index, file): (usize, &crate::objects::memory::MappedFile)| {
        let kind = match uses.executed(index) {
            true => "program",
            false => "mapped file",
        };
        let how = match uses.shared(index) {
            true => "its pages are shared with the file",
            false => "its pages are the job's",
        };
        NeedView::file(kind, &file.path, &file.identity, how, snapshot)
    };
    files.map(view).collect()
}

fn open_files(snapshot: &Snapshot) -> Vec<NeedView> {
    let mut needs = Vec::new();
    for description in &snapshot.descriptions {
        let flags = description.flags as i32;
        match &description.kind {
            Kind::Regular(file) if file.contents.is_none() && file.removed.is_none() => {
                needs.push(open_file(file, flags, snapshot))
            }
            Kind::Device(device) => {
                let (major, minor) = device.number;
                let detail = format!("number {major}:{minor}");
                needs.push(NeedView::new(
                    "device",
                    crate::text::of_path(&device.path),
                    detail,
                ));
            }
            Kind::Fifo(fifo) if !fifo.deleted => {
                needs.push(NeedView::new(
                    "FIFO",
                    crate::text::of_path(&fifo.path),
                    "by its name",
                ));
            }
            Kind::Inotify(inotify) => needs.extend(
                inotify
                    .watches
                    .iter()
                    .filter(|w| w.open.is_none())
                    .map(|watch| {
                        NeedView::new(
                            "watched file",
                            crate::text::of_path(&watch.path),
                            "for inotify",
                        )
                    }),
            ),
            Kind::Fanotify(group) => needs.extend(group.marks.iter().map(|mark| {
                NeedView::new(
                    "watched file",
                    crate::text::of_path(&mark.path),
                    "for fanotify",
                )
            })),
            Kind::UnixSocket(socket) => {
                socket.clone().each_path(&mut |path| {
                    let name = crate::text::of_path(path);
                    needs.push(NeedView::new(
                        "unix socket",
                        name,
                        "its name, or its peer's",
                    ));
                });
            }
            Kind::Left(left) => needs.extend(left.instead.iter().map(|path| {
                let detail = format!("in the place of {}", left.name);
                NeedView::new("replacement", crate::text::of_path(path), detail)
            })),
            Kind::Outside(outside) => {
                let (name, fd) = (&outside.name, outside.fd);
                let detail = match fd {
                    0..=2 => format!("fd {fd} of restore takes its place"),
                    _ => format!("restore --fd {fd}=PATH"),
                };
                needs.push(NeedView::new("outside", name, detail));
            }
            _ => {}
        }
    }
    needs
}

fn open_file(file: &Regular, flags: i32, snapshot: &Snapshot) -> NeedView {
    let how = match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => "as a handle",
        libc::O_RDONLY => "for reading",
        libc::O_WRONLY => "for writing",
        _ => "for reading and writing",
    };
    let kind = match file.is(libc::S_IFDIR) {
        true => "open directory",
        false => "open file",
    };
    let detail = match file.saved {
        Some(_) => format!("{how}; restore --put-files puts it back"),
        None => how.to_owned(),
    };
    NeedView::file(kind, &file.path, &file.identity, &detail, snapshot)
}

fn directories(snapshot: &Snapshot) -> Vec<NeedView> {
    let mut needs = Vec::new();
    for process in &snapshot.processes {
        for (detail, path, removed) in [
            ("working directory", &process.cwd, process.removed.cwd),
            ("root directory", &process.root, process.removed.root),
        ] {
            if removed.is_some() {
                continue;
            }
            needs.push(NeedView::new(
                "directory",
                crate::text::of_path(path),
                detail,
            ));
        }
    }
    needs
}

fn ipc(snapshot: &Snapshot) -> Vec<NeedView> {
    let ipc = &snapshot.ipc;
    let object = |kind: Type, object: &Object| {
        NeedView::new("IPC object", object.title(kind), "with its old id")
    };
    let segments = ipc.segments.iter().map(|s| object(Type::Shm, &s.object));
    let sets = ipc.semaphores.iter().map(|s| object(Type::Sem, &s.object));
    let queues = ipc.queues.iter().map(|q| object(Type::Msg, &q.object));
    let posix = snapshot.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::MessageQueue(queue) => Some(NeedView::new(
            "IPC object",
            queue.title(),
            "POSIX message queue",
        )),
        _ => None,
    });
    segments.chain(sets).chain(queues).chain(posix).collect()
}

fn terminals(snapshot: &Snapshot) -> Vec<NeedView> {
    let outside = snapshot.terminals.iter().filter(|t| t.pair.is_none());
    let view = |name: &str| NeedView::new("terminal", name, "that of restore takes its place");
    outside.map(|terminal| view(&terminal.name)).collect()
}

fn ids(snapshot: &Snapshot) -> Option<NeedView> {
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let mut ids: Vec<i32> = threads.map(|t| t.tid).collect();
    ids.extend(snapshot.zombies.iter().map(|z| z.pid));
    ids.sort_unstable();
    ids.dedup();
    let detail = format!(
        "free, and {} or a pid namespace to choose them",
        Use::ChoosePids
    );
    (!ids.is_empty()).then(|| NeedView::new("pids", ranges(&ids), detail))
}

/// `7 50-52`; the ids ascend.
fn ranges(ids: &[i32]) -> String {
    let runs = ids.chunk_by(|a, b| a + 1 == *b);
    let text = runs.map(|run| match run {
        [one] => one.to_string(),
        _ => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    text.collect::<Vec<_>>().join(" ")
}

fn kernel(snapshot: &Snapshot) -> Vec<NeedView> {
    let features = surroundings::kernel_needs(snapshot).into_iter();
    let mut needs: Vec<NeedView> = features
        .map(|need| NeedView::new("kernel", need.feature, format!("for {}", need.what)))
        .collect();
    let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
    if mappings.any(|m| m.backing == Backing::Kernel(KernelMapping::Vdso)) {
        let detail = "or another one, to which the functions of the job's vDSO then lead on";
        let name = snapshot.host.kernel.clone();
        needs.push(NeedView::new("kernel", name, detail));
    }
    needs
}

fn processor(snapshot: &Snapshot) -> Vec<NeedView> {
    let host = &snapshot.host;
    let detail = match host.baseline {
        Some(level) => format!("the job was started to use no more than {level}"),
        None => "the job may have seen them".into(),
    };
    let features = processor::needed(host).join(" ");
    let mut needs = vec![NeedView::new("processor", features, detail)];
    let components = processor::component_names(host.xcr0 & !0b11);
    if host.xcr0 & !0b11 != 0 {
        let detail = format!("state components, {} bytes", host.xstate_size);
        needs.push(NeedView::new("processor", components, detail));
    }
    needs
}

fn privileges(snapshot: &Snapshot) -> Vec<NeedView> {
    let mut needs = Vec::new();
    for process in &snapshot.processes {
        for thread in &process.threads {
            let credentials = &thread.credentials;
            let name = format!("uid {}, gid {}", credentials.uid[1], credentials.gid[1]);
            needs.push(NeedView::new("user", name, "or what changing to it takes"));
            if thread.seccomp.is_on() {
                let detail = "seccomp";
                needs.push(NeedView::new(
                    "privilege",
                    Use::InstallSeccomp.to_string(),
                    detail,
                ));
            }
        }
        if process.root != Path::new("/") {
            needs.push(NeedView::new(
                "privilege",
                Use::RootDirectory.to_string(),
                "a root directory",
            ));
        }
    }
    needs
}

fn amounts(snapshot: &Snapshot) -> Vec<NeedView> {
    let mappings = snapshot.processes.iter().map(|p| p.memory.mappings.len());
    let fds = snapshot
        .processes
        .iter()
        .flat_map(|p| &p.fds)
        .map(|e| e.fd + 1);
    let limits = [
        ("vm.max_map_count", mappings.max().unwrap_or(0).to_string()),
        ("RLIMIT_NOFILE", fds.max().unwrap_or(0).to_string()),
    ];
    let limits =
        limits.map(|(name, value)| NeedView::new("limit", name, format!("{value} or more")));
    let pools = surroundings::huge_pages(snapshot)
        .into_iter()
        .map(|(size, bytes)| {
            let name = format!("{} KiB", size / 1024);
            NeedView::new("huge pages", name, format!("{} of them", bytes / size))
        });
    let (contexts, requests) = aio::wanted(snapshot);
    let contexts = (contexts > 0).then(|| {
        let detail = format!("{requests} to spare, for {contexts} AIO contexts");
        NeedView::new("limit", "fs.aio-max-nr", detail)
    });
    limits.into_iter().chain(contexts).chain(pools).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::fixture;

    #[test]
    fn a_job_needs_its_program_its_devices_and_its_ids() {
        let needs = needs(&fixture::snapshot());
        let names = |kind: &str| {
            let of_it = needs.iter().filter(|n| n.kind == kind);
            of_it.map(|n| n.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(names("program"), ["/nonexistent/program"]);
        assert_eq!(names("device"), ["/dev/null"]);
        assert_eq!(names("pids"), ["50-51"]);
        assert_eq!(needs[0].size, Some(4096));
    }

    #[test]
    fn ids_that_follow_each_other_are_ranges() {
        assert_eq!(ranges(&[7, 50, 51, 52]), "7 50-52");
    }
}
