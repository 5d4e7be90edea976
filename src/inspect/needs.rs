//! What an image needs on the machine where it is restored.

use ckpt_tracer::capabilities::Use;
use std::collections::HashSet;
use std::path::Path;

use crate::objects::index::FileId;
use crate::objects::ipc;
use crate::objects::memory::{Backing, KernelMapping, Uses};
use crate::objects::need::Need;
use crate::objects::processor;
use crate::objects::{Snapshot, aio};
use crate::restore::surroundings;

/// Everything that the image needs, files first.
pub fn needs(snapshot: &Snapshot) -> Vec<Need> {
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

fn mapped_files(snapshot: &Snapshot) -> Vec<Need> {
    let uses = Uses::of(snapshot);
    let files = FileId::each(&snapshot.mapped_files);
    let files = files.filter(|(_, file)| file.contents.is_none());
    let view = |(id, file): (FileId, &crate::objects::memory::MappedFile)| {
        let kind = match uses.executed(id) {
            true => "program",
            false => "mapped file",
        };
        let how = match uses.shared(id) {
            true => "its pages are shared with the file",
            false => "its pages are the job's",
        };
        Need::file(kind, &file.path, &file.identity, how, snapshot)
    };
    files.map(view).collect()
}

fn open_files(snapshot: &Snapshot) -> Vec<Need> {
    let open = snapshot.descriptions.iter();
    open.flat_map(|d| d.kind.file().needs(d.flags, snapshot))
        .collect()
}

fn directories(snapshot: &Snapshot) -> Vec<Need> {
    let mut needs = Vec::new();
    for process in &snapshot.processes {
        for (detail, path, removed) in [
            ("working directory", &process.cwd, process.removed.cwd),
            ("root directory", &process.root, process.removed.root),
        ] {
            if removed.is_some() {
                continue;
            }
            needs.push(Need::new("directory", crate::text::of_path(path), detail));
        }
    }
    needs
}

fn ipc(snapshot: &Snapshot) -> Vec<Need> {
    let objects = ipc::titles(&snapshot.ipc).into_iter();
    let need = |title| Need::new("IPC object", title, "with its old id");
    objects.map(need).collect()
}

fn terminals(snapshot: &Snapshot) -> Vec<Need> {
    let outside = snapshot.terminals.iter().filter(|t| t.pair.is_none());
    let view = |name: &str| Need::new("terminal", name, "that of restore takes its place");
    outside.map(|terminal| view(&terminal.name)).collect()
}

fn ids(snapshot: &Snapshot) -> Option<Need> {
    let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
    let mut ids: Vec<i32> = threads.map(|t| t.tid).collect();
    ids.extend(snapshot.zombies.iter().map(|z| z.pid));
    ids.sort_unstable();
    ids.dedup();
    let detail = format!(
        "free, and {} or a pid namespace to choose them",
        Use::ChoosePids
    );
    (!ids.is_empty()).then(|| Need::new("pids", ranges(&ids), detail))
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

fn kernel(snapshot: &Snapshot) -> Vec<Need> {
    let features = surroundings::kernel_needs(snapshot).into_iter();
    let mut needs: Vec<Need> = features
        .map(|need| Need::new("kernel", need.feature, format!("for {}", need.what)))
        .collect();
    let mut mappings = snapshot.processes.iter().flat_map(|p| &p.memory.mappings);
    if mappings.any(|m| m.backing == Backing::Kernel(KernelMapping::Vdso)) {
        let detail = "or another one, to which the functions of the job's vDSO will jump";
        let name = snapshot.host.kernel.clone();
        needs.push(Need::new("kernel", name, detail));
    }
    needs
}

fn processor(snapshot: &Snapshot) -> Vec<Need> {
    let host = &snapshot.host;
    let detail = match host.baseline {
        Some(level) => format!("the job was started to use no more than {level}"),
        None => "the job may use them".into(),
    };
    let features = processor::needed(host).join(" ");
    let mut needs = vec![Need::new("processor", features, detail)];
    let components = processor::component_names(host.xcr0 & !0b11);
    if host.xcr0 & !0b11 != 0 {
        let detail = format!("state components, {} bytes", host.xstate_size);
        needs.push(Need::new("processor", components, detail));
    }
    needs
}

fn privileges(snapshot: &Snapshot) -> Vec<Need> {
    let mut needs = Vec::new();
    for process in &snapshot.processes {
        for thread in &process.threads {
            let credentials = &thread.credentials;
            let name = format!("uid {}, gid {}", credentials.uid[1], credentials.gid[1]);
            needs.push(Need::new("user", name, "or the privileges to change to it"));
            if thread.seccomp.is_on() {
                let detail = "seccomp";
                needs.push(Need::new(
                    "privilege",
                    Use::InstallSeccomp.to_string(),
                    detail,
                ));
            }
        }
        if process.root != Path::new("/") {
            needs.push(Need::new(
                "privilege",
                Use::RootDirectory.to_string(),
                "a root directory",
            ));
        }
    }
    needs
}

fn amounts(snapshot: &Snapshot) -> Vec<Need> {
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
    let limits = limits.map(|(name, value)| Need::new("limit", name, format!("{value} or more")));
    let pools = surroundings::huge_pages(snapshot)
        .into_iter()
        .map(|(size, bytes)| {
            let name = format!("{} KiB", size / 1024);
            Need::new("huge pages", name, format!("{} of them", bytes / size))
        });
    let (contexts, requests) = aio::wanted(snapshot);
    let contexts = (contexts > 0).then(|| {
        let detail = format!("{requests} to spare, for {contexts} AIO contexts");
        Need::new("limit", "fs.aio-max-nr", detail)
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
