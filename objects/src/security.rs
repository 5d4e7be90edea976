//! Security contexts of a task: `/proc/PID/attr` (proc_pid_attr(5)). For SELinux and Smack this is a context, for
//! AppArmor the name of a profile. Since Linux 5.8 stackable modules also have a directory each.
//!
//! A restored task has the context of `restore`, or the one to which the policy changes it at the exec. If that
//! differs, the task itself requests its old one (only it may, `proc_pid_attr_write`, fs/proc/base.c), and refusals
//! are reported. This comes last, since a job's own policy may forbid much of a restore. Exceptions:
//!
//! - SELinux does not let a multithreaded process change its context (`selinux_lsm_setattr`,
//!   security/selinux/hooks.c), unless the new type is bounded by the old one. So it is changed before the threads
//!   are created, if a child has found that the process can still continue;
//! - AppArmor does not let a confined task with `no_new_privs` change its profile (`aa_change_profile`,
//!   security/apparmor/domain.c). So it is changed right before that is set.
//!
//! Landlock domains are not visible here.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::mem::ProcessMemory;
use ckpt_tracer::proc::ProcRoot;
use ckpt_tracer::remote::{Cave, RemoteCalls};
use ckpt_tracer::task::Stopped;
use ckpt_tracer::{Pid, Tid};
use serde::{Deserialize, Serialize};

use crate::Snapshot;
use crate::error::Result;
use crate::plan::Builder;
use crate::thread::Thread;

/// An attribute and its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The file below `attr`: `current`, `apparmor/current`, `exec` …
    pub attribute: String,
    /// Its value, without the terminator that modules append.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

impl Label {
    /// Whether its name means unrestricted (`unconfined` of AppArmor, `unconfined_t` of SELinux's usual policies).
    pub fn is_unconfined(&self) -> bool {
        let word = b"unconfined";
        self.value.windows(word.len()).any(|w| w == word)
    }
}

/// A module's own file precedes the common one, which has the same value.
const CURRENT: [&str; 3] = ["apparmor/current", "smack/current", "current"];
/// Contexts for what the task creates or executes next.
const NEXT: [&str; 5] = [
    "apparmor/exec",
    "exec",
    "fscreate",
    "keycreate",
    "sockcreate",
];

/// The attributes of a task, in its `attr` directory. A missing file, or one without a module (EINVAL), is left out.
pub fn read(attr: &Path) -> Vec<Label> {
    let label = |attribute: &&str| {
        let value = trimmed(std::fs::read(attr.join(attribute)).ok()?);
        let attribute = (*attribute).to_owned();
        (!value.is_empty()).then_some(Label { attribute, value })
    };
    let mut found: Vec<Label> = CURRENT.iter().filter_map(label).collect();
    // A module without a directory of its own has only the common file.
    if found.len() > 1 {
        let (common, own): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|l| l.attribute == "current");
        let said = |l: &Label| own.iter().any(|o| o.value == l.value);
        let common = common.into_iter().filter(|l| !said(l));
        found = own.iter().cloned().chain(common).collect();
    }
    let mut next: Vec<Label> = NEXT.iter().filter_map(label).collect();
    if next.iter().any(|l| l.attribute == "apparmor/exec") {
        next.retain(|l| l.attribute != "exec");
    }
    found.extend(next);
    found
}

/// Contexts end with a NUL (SELinux) or a line feed (AppArmor).
fn trimmed(mut value: Vec<u8>) -> Vec<u8> {
    while value.last().is_some_and(|b| matches!(b, 0 | b'\n' | b' ')) {
        value.pop();
    }
    value
}

/// The attributes of a live task.
pub fn capture(pid: Pid, tid: Tid) -> Vec<Label> {
    match modules_answer() {
        true => read(&directory(pid, tid)),
        false => Vec::new(),
    }
}

/// Whether any module provides attributes, tested on ourselves: with many threads reading them is costly.
fn modules_answer() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let own = Path::new("/proc/self/attr");
        let mut attributes = CURRENT.iter().chain(&NEXT);
        attributes.any(|attribute| std::fs::read(own.join(attribute)).is_ok())
    })
}

fn directory(pid: Pid, tid: Tid) -> PathBuf {
    ProcRoot::default().task(pid, tid).join("attr")
}

/// The attributes that differ, with their present values.
fn changed(was: &[Label], now: &[Label]) -> Vec<(Label, String)> {
    let changed = was.iter().filter(|label| !now.contains(label));
    let with = changed.map(|label| {
        let is = now.iter().find(|l| l.attribute == label.attribute);
        (label.clone(), is.map_or("nothing".into(), Label::text))
    });
    with.collect()
}

impl Label {
    /// For display.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.value).into_owned()
    }

    /// Whether it is AppArmor's: without a directory of its own, by its format.
    fn is_of_apparmor(&self) -> bool {
        self.attribute.starts_with("apparmor/")
            || self.value.ends_with(b")") && self.text().contains(" (")
            || self.value == b"unconfined"
    }

    /// The value to write in order to request it: a context as it is; for AppArmor a command and the profile's name
    /// without its mode (`apparmor_setprocattr`, security/apparmor/lsm.c).
    fn request(&self) -> Vec<u8> {
        let text = self.text();
        let mode = text
            .rsplit_once(" (")
            .filter(|(_, rest)| rest.ends_with(')'));
        let profile = mode.map(|(name, _)| name);
        if !self.is_of_apparmor() {
            return [self.value.as_slice(), b"\0"].concat();
        }
        let command = match self.attribute.ends_with("exec") {
            true => "exec",
            false => "changeprofile",
        };
        format!("{command} {}", profile.unwrap_or(&text)).into_bytes()
    }
}

/// Our security contexts, and those that a new process may take.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    own: Vec<Label>,
    /// Contexts that a process may take before it has threads, and then continue.
    early: Vec<Vec<u8>>,
}

impl Surroundings {
    /// Reads ours; `may_become` tests what can only be tried.
    pub fn of(snapshot: &Snapshot, may_become: impl Fn(&[u8]) -> bool) -> Self {
        let me = Pid(std::process::id() as i32);
        match modules_answer() {
            true => Self::trying(capture(me, me.leader()), snapshot, may_become),
            false => Self::default(),
        }
    }

    fn trying(own: Vec<Label>, snapshot: &Snapshot, may_become: impl Fn(&[u8]) -> bool) -> Self {
        let processes = snapshot.processes.iter();
        let wanted = processes.filter_map(|p| common_context(&p.threads));
        let mut wanted: Vec<&Label> = wanted.filter(|l| !own.contains(l)).collect();
        wanted.sort_unstable_by(|a, b| a.value.cmp(&b.value));
        wanted.dedup();
        let may = wanted.into_iter().filter(|l| may_become(&l.request()));
        let early = may.map(|l| l.value.clone()).collect();
        Self { own, early }
    }
}

/// The SELinux context that several threads have in common.
fn common_context(threads: &[Thread]) -> Option<&Label> {
    let (first, others) = threads.split_first()?;
    let mut labels = first.security.iter();
    let label = labels.find(|l| l.attribute == "current" && !l.is_of_apparmor())?;
    let all = others.iter().all(|t| t.security.contains(label));
    (all && !others.is_empty()).then_some(label)
}

/// A process that will have threads requests their common context, if it may.
pub fn ask_before_threads(threads: &[Thread], plan: &mut Builder) {
    let label = common_context(threads);
    let early = &plan.host().security.early;
    if let Some(label) = label.filter(|l| early.contains(&l.value)) {
        ask(label, plan);
    }
}

/// A thread that will have `no_new_privs` requests its profile. The result is checked at the end.
pub fn ask_before_no_new_privs(was: &[Label], plan: &mut Builder) {
    let own = plan.host().security.own.clone();
    for label in was
        .iter()
        .filter(|l| l.is_of_apparmor() && !own.contains(l))
    {
        ask(label, plan);
    }
}

fn ask(label: &Label, plan: &mut Builder) {
    let object = || format!("security attribute {}", label.attribute);
    let path = plan.path(&Path::new("/proc/thread-self/attr").join(&label.attribute));
    let request = label.request();
    let at = plan.data(&request);
    let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
    plan.attempt(
        libc::SYS_openat,
        &[libc::AT_FDCWD as u64, path, flags],
        object,
    );
    let written = [0, at, request.len() as u64];
    plan.attempt_with_answer(libc::SYS_write, (0, &written), object);
    plan.attempt_with_answer(libc::SYS_close, (1, &[]), object);
}

/// Bytes of scratch memory for a request: a path, and an attribute of at most a page (`proc_pid_attr_write`).
pub const ROOM: u64 = 8192;

/// Makes a task request its contexts, by remote calls, with [`ROOM`] bytes at `at`. Returns refusals, one sentence
/// each.
///
/// # Errors
/// When no call can be made in it.
pub fn rebuild(
    task: &mut Stopped,
    was: &[Label],
    mem: &ProcessMemory,
    at: u64,
    cave: &Cave<'_>,
) -> Result<Vec<String>> {
    let tid = task.tid();
    let now = capture(mem.pid(), tid);
    let (mut warnings, mut refused) = (Vec::new(), Vec::new());
    for (label, is) in changed(was, &now) {
        let path = format!("/proc/thread-self/attr/{}\0", label.attribute);
        let mut request = label.request();
        request.truncate(4096);
        mem.write(RemoteAddr(at), path.as_bytes())?;
        mem.write(RemoteAddr(at + 256), &request)?;
        let mut calls = RemoteCalls::begin_without_scratch(task, cave)?;
        let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
        let open = [libc::AT_FDCWD as u64, at, flags, 0, 0, 0];
        let opened = calls.call("openat", libc::SYS_openat, open);
        let answer = match opened {
            Ok(fd) => {
                let args = [fd, at + 256, request.len() as u64, 0, 0, 0];
                let written = calls.call("write", libc::SYS_write, args);
                calls.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
                written
            }
            failed => failed,
        };
        calls.finish()?;
        match answer {
            Ok(_) => {}
            Err(ckpt_tracer::Error::Remote { errno, .. }) => {
                warnings.push(not_permitted(&label, &is, errno.desc()));
                refused.push(label.attribute);
            }
            Err(e) => return Err(e.into()),
        }
    }
    // The request may succeed and the value still differ, for a profile reloaded in another mode, say.
    for (label, is) in changed(was, &capture(mem.pid(), tid)) {
        if !refused.contains(&label.attribute) {
            let why = "the security policy changed it";
            warnings.push(not_permitted(&label, &is, why));
        }
    }
    Ok(warnings)
}

fn not_permitted(label: &Label, is: &str, why: &str) -> String {
    format!(
        "the security attribute {} was {} and is {is} now: {why}",
        label.attribute,
        label.text()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::HostState;

    /// An `attr` directory with these files.
    struct Attr(PathBuf);

    impl Attr {
        fn with(name: &str, files: &[(&str, &[u8])]) -> Self {
            let dir = std::env::temp_dir().join(format!("ckpt-attr-{name}.{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(dir.join("apparmor")).unwrap();
            std::fs::create_dir_all(dir.join("smack")).unwrap();
            for (file, text) in files {
                std::fs::write(dir.join(file), text).unwrap();
            }
            Attr(dir)
        }

        fn read(&self) -> Vec<(String, String)> {
            let labels = read(&self.0);
            labels
                .into_iter()
                .map(|l| (l.attribute.clone(), l.text()))
                .collect()
        }
    }

    impl Drop for Attr {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn pair(attribute: &str, value: &str) -> (String, String) {
        (attribute.into(), value.into())
    }

    #[test]
    fn without_a_module_there_is_nothing() {
        assert_eq!(Attr::with("none", &[("current", b"")]).read(), []);
        // A directory cannot be read, nor a file that returns EINVAL.
        let attr = Attr::with("error", &[]);
        std::fs::create_dir(attr.0.join("current")).unwrap();
        assert_eq!(attr.read(), []);
        assert_eq!(read(Path::new("/nonexistent/attr")), []);
    }

    #[test]
    fn contexts_of_selinux() {
        let context = b"system_u:system_r:container_t:s0:c1,c2\0".as_slice();
        let attr = Attr::with("selinux", &[("current", context), ("exec", b"u:r:t:s0\0")]);
        let text = "system_u:system_r:container_t:s0:c1,c2";
        assert_eq!(
            attr.read(),
            [pair("current", text), pair("exec", "u:r:t:s0")]
        );
        let label = &read(&attr.0)[0];
        assert_eq!(label.request(), context);
    }

    #[test]
    fn profiles_of_apparmor() {
        let said = b"/usr/bin/man (enforce)\n".as_slice();
        let attr = Attr::with("apparmor", &[("current", said), ("apparmor/current", said)]);
        assert_eq!(
            attr.read(),
            [pair("apparmor/current", "/usr/bin/man (enforce)")]
        );
        assert_eq!(read(&attr.0)[0].request(), b"changeprofile /usr/bin/man");
        // Before Linux 5.8.
        for (said, request) in [
            ("docker-default (enforce)\n", "changeprofile docker-default"),
            ("unconfined\n", "changeprofile unconfined"),
            ("a//&b (complain)\n", "changeprofile a//&b"),
        ] {
            let attr = Attr::with("old", &[("current", said.as_bytes())]);
            assert_eq!(read(&attr.0)[0].request(), request.as_bytes());
        }
        let next = Attr::with("next", &[("apparmor/exec", b"p (enforce)\n")]);
        assert_eq!(read(&next.0)[0].request(), b"exec p");
    }

    #[test]
    fn only_what_differs_is_asked_for_and_both_are_named() {
        let label = |value: &str| Label {
            attribute: "current".into(),
            value: value.into(),
        };
        let (was, is) = (label("container_t"), label("unconfined_t"));
        assert_eq!(
            changed(std::slice::from_ref(&was), std::slice::from_ref(&was)),
            []
        );
        let changed = changed(std::slice::from_ref(&was), &[is]);
        let [(label, is)] = &changed[..] else {
            panic!("{changed:?}");
        };
        let said = not_permitted(label, is, "Permission denied");
        assert!(
            said.contains("was container_t and is unconfined_t now: Permission denied"),
            "{said}"
        );
        let gone = super::changed(&[was], &[]);
        assert_eq!(gone[0].1, "nothing");
    }

    /// The calls of a plan that `fill` appends, with these contexts.
    fn planned(security: Surroundings, fill: impl FnOnce(&mut Builder)) -> Vec<String> {
        let host = HostState {
            security,
            ..HostState::default()
        };
        let mut plan = Builder::new(0, host);
        fill(&mut plan);
        let text = plan.finish().to_text();
        let calls = text.lines().filter_map(|line| {
            let words = line.split([' ', '(']);
            let calls = ["openat", "write", "close", "prctl"];
            words
                .into_iter()
                .find(|w| calls.contains(w))
                .map(str::to_owned)
        });
        calls.collect()
    }

    fn labeled(contexts: &[&str]) -> Vec<Thread> {
        let thread = crate::fixture::snapshot().processes[0].threads[0].clone();
        let with = contexts.iter().map(|context| Thread {
            security: vec![Label {
                attribute: "current".into(),
                value: context.as_bytes().to_vec(),
            }],
            ..thread.clone()
        });
        with.collect()
    }

    #[test]
    fn threads_with_one_context_are_created_in_it() {
        let asked = |threads: &[Thread], early: &[&str]| {
            let early = early.iter().map(|c| c.as_bytes().to_vec()).collect();
            let here = Surroundings {
                early,
                ..Default::default()
            };
            planned(here, |plan| ask_before_threads(threads, plan))
        };
        let all = labeled(&["u:r:t:s0", "u:r:t:s0"]);
        assert_eq!(asked(&all, &["u:r:t:s0"]), ["openat", "write", "close"]);
        assert_eq!(asked(&all, &[]), [""; 0], "it would not go well");
        assert_eq!(asked(&all[..1], &["u:r:t:s0"]), [""; 0], "it is done last");
        let several = labeled(&["u:r:t:s0", "u:r:other:s0"]);
        assert_eq!(asked(&several, &["u:r:t:s0"]), [""; 0]);
        let profiles = labeled(&["p (enforce)", "p (enforce)"]);
        assert_eq!(asked(&profiles, &["p (enforce)"]), [""; 0]);
        assert!(asked(&labeled(&[]), &[]).is_empty());
    }

    #[test]
    fn a_profile_comes_before_no_new_privs() {
        let mut thread = labeled(&["p (enforce)"]).remove(0);
        let own = thread.security.clone();
        let credentials = |thread: &Thread, own: Vec<Label>| {
            let here = Surroundings {
                own,
                ..Default::default()
            };
            planned(here, |plan| thread.rebuild_privileges(plan))
        };
        thread.credentials.no_new_privs = false;
        let without = credentials(&thread, Vec::new());
        assert!(!without.contains(&"openat".into()), "it is done last");
        thread.credentials.no_new_privs = true;
        let with = credentials(&thread, Vec::new());
        assert_eq!(
            with[with.len() - 4..],
            ["openat", "write", "close", "prctl"]
        );
        let same = credentials(&thread, own);
        assert!(
            !same.contains(&"openat".into()),
            "nothing is to be asked for"
        );
        let mut thread = labeled(&["u:r:t:s0"]).remove(0);
        thread.credentials.no_new_privs = true;
        assert!(!credentials(&thread, Vec::new()).contains(&"openat".into()));
    }

    #[test]
    fn only_contexts_of_several_threads_are_tried_beforehand() {
        let mut snapshot = crate::fixture::snapshot();
        snapshot.processes[0].threads = labeled(&["u:r:t:s0", "u:r:t:s0"]);
        let here = Surroundings::trying(Vec::new(), &snapshot, |c| c == b"u:r:t:s0\0");
        assert_eq!(here.early, [b"u:r:t:s0"]);
        let here = Surroundings::trying(Vec::new(), &snapshot, |_| false);
        assert!(here.early.is_empty());
        let own = snapshot.processes[0].threads[0].security.clone();
        let never = |_: &[u8]| panic!("it is the same already");
        assert!(Surroundings::trying(own, &snapshot, never).early.is_empty());
        snapshot.processes[0].threads.pop();
        let never = |_: &[u8]| panic!("a single thread asks at the end");
        let here = Surroundings::trying(Vec::new(), &snapshot, never);
        assert!(here.early.is_empty());
    }

    /// Errors of the kernel itself, with its active modules.
    #[test]
    fn our_own_can_be_read() {
        let me = Pid::own();
        let labels = capture(me, me.leader());
        assert!(
            labels
                .iter()
                .all(|l| !l.value.is_empty() && !l.value.ends_with(b"\n"))
        );
    }
}
