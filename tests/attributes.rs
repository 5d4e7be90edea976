//! Attributes of processes: docs/attributes.md against the running kernel and the code, and warnings of what
//! cannot be as it was.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;

use ckpt::objects::memory_policy::MemoryPolicy;

use crate::common::edit::edited;
use crate::common::look::{assert_no_process_left, status_field};
use crate::common::refused::FAILED;
use crate::common::{
    Case, Job, ckpt, fixture, isolated, isolated_as_user, odd, restore_cmd, restored, run,
};

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/attributes.md");
    fs::read_to_string(path).expect("the page is there")
}

/// Those of `words` that no row of the page has in backquotes.
fn missing(words: impl Iterator<Item = String>) -> Vec<String> {
    let page = page();
    let words: Vec<String> = words.collect();
    assert!(words.len() > 5, "{words:?}");
    let rows: Vec<&str> = page.lines().filter(|l| l.starts_with("| ")).collect();
    let has = |word: &String| rows.iter().any(|row| row.contains(&format!("`{word}`")));
    words.into_iter().filter(|word| !has(word)).collect()
}

#[test]
fn every_field_of_status_has_its_row() {
    let status = fs::read_to_string("/proc/self/status").expect("we run");
    let fields = status
        .lines()
        .filter_map(|l| Some(l.split_once(':')?.0.to_owned()));
    assert_eq!(missing(fields), [""; 0], "name it in docs/attributes.md");
}

#[test]
fn every_file_of_a_process_has_its_row() {
    let files = fs::read_dir("/proc/self").expect("we run");
    let names = files.filter_map(|f| f.ok()?.file_name().into_string().ok());
    assert_eq!(missing(names), [""; 0], "name it in docs/attributes.md");
}

#[test]
fn every_switch_has_its_row() {
    let names = ckpt::objects::switches::names();
    let words = names.flat_map(|name| name.split('/')).map(str::to_owned);
    assert_eq!(missing(words), [""; 0], "name it in docs/attributes.md");
}

/// The options of prctl(2) of Linux 6.18 that are more than a question.
const PRCTL: &str = "SET_PDEATHSIG SET_DUMPABLE SET_UNALIGN SET_KEEPCAPS SET_FPEMU SET_FPEXC SET_TIMING SET_NAME \
    SET_ENDIAN SET_SECCOMP CAPBSET_DROP SET_TSC SET_SECUREBITS SET_TIMERSLACK TASK_PERF_EVENTS_DISABLE \
    TASK_PERF_EVENTS_ENABLE MCE_KILL SET_MM SET_PTRACER SET_CHILD_SUBREAPER SET_NO_NEW_PRIVS GET_TID_ADDRESS \
    SET_THP_DISABLE MPX_ENABLE_MANAGEMENT MPX_DISABLE_MANAGEMENT SET_FP_MODE CAP_AMBIENT SVE_SET_VL \
    SET_SPECULATION_CTRL PAC_RESET_KEYS SET_TAGGED_ADDR_CTRL SET_IO_FLUSHER SET_SYSCALL_USER_DISPATCH \
    PAC_SET_ENABLED_KEYS SCHED_CORE SME_SET_VL SET_MDWE SET_VMA GET_AUXV SET_MEMORY_MERGE RISCV_V_SET_CONTROL \
    RISCV_SET_ICACHE_FLUSH_CTX PPC_SET_DEXCR SET_SHADOW_STACK_STATUS LOCK_SHADOW_STACK_STATUS \
    TIMER_CREATE_RESTORE_IDS FUTEX_HASH";

/// What a header defines that begins with `prefix`; values of options are written with a space behind the `#`.
fn defined(header: &str, prefix: &str) -> Vec<String> {
    let text = fs::read_to_string(header).expect("linux-libc-dev is installed, for the fixtures");
    let names = text.lines().filter_map(|line| {
        let name = line.strip_prefix("#define ")?.split_whitespace().next()?;
        name.starts_with(prefix).then(|| name.to_owned())
    });
    names.collect()
}

#[test]
fn every_prctl_has_its_row() {
    let known = PRCTL.split_whitespace().map(|name| format!("PR_{name}"));
    assert_eq!(missing(known), [""; 0], "name it in docs/attributes.md");
    let installed = defined("/usr/include/linux/prctl.h", "PR_");
    let asks = |name: &str| {
        let setter = name.replace("GET_", "SET_");
        let reads = ["PR_CAPBSET_READ", "PR_MCE_KILL_GET"].contains(&name);
        reads || setter != name && installed.contains(&setter)
    };
    let sets = installed.iter().filter(|name| !asks(name)).cloned();
    assert_eq!(
        missing(sets),
        [""; 0],
        "the installed linux/prctl.h has an option without a row in docs/attributes.md: what becomes of it?"
    );
}

#[test]
fn every_advice_has_its_row() {
    let advice = defined("/usr/include/asm-generic/mman-common.h", "MADV_");
    assert_eq!(
        missing(advice.into_iter()),
        [""; 0],
        "the installed header has advice without a row in docs/attributes.md"
    );
}

/// What fcntl(2), arch_prctl(2) and ioctl(2) of terminals, files, pipes and epoll sets can set, by the headers.
#[test]
fn every_call_that_sets_has_its_row() {
    let asks = |name: &str| {
        let ends = ["INQ", "OUTQ", "QUERY", "STATUS"];
        name.contains("GET") || name.contains("IOCG") || ends.iter().any(|end| name.ends_with(end))
    };
    let headers = [
        ("/usr/include/asm-generic/fcntl.h", "F_"),
        ("/usr/include/linux/fcntl.h", "F_"),
        ("/usr/include/x86_64-linux-gnu/asm/prctl.h", "ARCH_"),
        ("/usr/include/asm-generic/ioctls.h", "T"),
        ("/usr/include/asm-generic/ioctls.h", "FIO"),
        ("/usr/include/linux/eventpoll.h", "EPIOC"),
        ("/usr/include/linux/inotify.h", "INOTIFY_IOC"),
        ("/usr/include/linux/timerfd.h", "TFD_IOC"),
    ];
    // Kinds of locks, owners, messages and features, no calls.
    let values = [
        "F_OWNER_",
        "F_LINUX_SPECIFIC_BASE",
        "TIOCPKT_",
        "TIOCSER_",
        "F_SEAL_",
        "ARCH_XCOMP_TILE",
        "ARCH_SHSTK_SHSTK",
        "ARCH_SHSTK_WRSS",
    ];
    let locks = ["F_RDLCK", "F_WRLCK", "F_UNLCK", "F_EXLCK", "F_SHLCK"];
    let names = headers
        .iter()
        .flat_map(|(header, prefix)| defined(header, prefix));
    let sets = names.filter(|name| {
        let value = values.iter().any(|v| name.starts_with(v)) || locks.contains(&name.as_str());
        !value && !asks(name)
    });
    assert_eq!(
        missing(sets),
        [""; 0],
        "an installed header has a call that sets something and has no row in docs/attributes.md: what becomes of it?"
    );
}

/// A field that a newer kernel shows has to be looked at, before it is lost in silence.
#[test]
fn every_field_of_proc_has_its_row() {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).expect("we run");
    let keys = |text: &str| -> Vec<String> {
        let keys = text.lines().filter_map(|line| line.split_once(':'));
        keys.map(|(key, _)| key.trim().to_owned()).collect()
    };
    let is_word = |word: &String| word.chars().all(|c| c.is_alphanumeric() || c == '_');
    let smaps = read("smaps");
    let mut words: Vec<String> = keys(&smaps).into_iter().filter(is_word).collect();
    let flags = smaps.lines().filter_map(|l| l.strip_prefix("VmFlags:"));
    words.extend(flags.flat_map(|f| f.split_whitespace().map(str::to_owned)));
    words.extend(keys(&read("io")));
    let limits = read("limits");
    let name = |line: &str| line.get(..26).unwrap_or_default().trim().to_owned();
    words.extend(limits.lines().skip(1).map(name));
    words.extend(fields_of_descriptors());
    words.sort();
    words.dedup();
    assert_eq!(
        missing(words.into_iter()),
        [""; 0],
        "this kernel shows a field without a row in docs/attributes.md: what becomes of it?"
    );
    let stat = read("stat");
    let (_, behind) = stat.rsplit_once(')').expect("the name is in parentheses");
    let count = behind.split_whitespace().count() + 2;
    assert!(
        count <= 52,
        "this kernel's stat has {count} fields, docs/attributes.md tells of 52"
    );
}

/// What fdinfo shows of descriptors of all kinds.
#[allow(unsafe_code)]
fn fields_of_descriptors() -> Vec<String> {
    let _pair = std::os::unix::net::UnixStream::pair().expect("sockets");
    let _us = ckpt_tracer::pidfd::PidFd::open(ckpt_tracer::Pid::own()).expect("a pidfd");
    // SAFETY: each makes a descriptor, from nothing but numbers and memory that lives until then.
    let made = unsafe {
        let mask: libc::sigset_t = std::mem::zeroed();
        let mut event: libc::epoll_event = std::mem::zeroed();
        let made = [
            libc::eventfd(0, libc::EFD_CLOEXEC),
            libc::epoll_create1(libc::EPOLL_CLOEXEC),
            libc::inotify_init1(libc::IN_CLOEXEC),
            libc::signalfd(-1, &raw const mask, libc::SFD_CLOEXEC),
            libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC),
        ];
        libc::epoll_ctl(made[1], libc::EPOLL_CTL_ADD, made[0], &raw mut event);
        libc::inotify_add_watch(made[2], c"/".as_ptr(), libc::IN_CREATE);
        made
    };
    let descriptors = fs::read_dir("/proc/self/fdinfo").expect("we run").flatten();
    let texts = descriptors.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let mut keys = Vec::new();
    for line in texts.collect::<String>().lines().filter(|l| !l.is_empty()) {
        let key = line.split(':').next().unwrap_or_default().trim();
        let key = key.strip_suffix(" wd").unwrap_or(key);
        keys.push(key.to_owned());
    }
    for fd in made {
        nix::unistd::close(fd).expect("it was made");
    }
    for seen in [
        "eventfd-count",
        "tfd",
        "inotify",
        "sigmask",
        "clockid",
        "NSpid",
    ] {
        assert!(keys.iter().any(|key| key == seen), "{seen}: {keys:?}");
    }
    keys
}

#[test]
fn fixtures_in_the_tables_exist() {
    let page = page();
    let rows = page.lines().filter(|l| l.starts_with("| "));
    let last = rows.filter_map(|row| row.trim_end_matches(['|', ' ']).rsplit_once('|'));
    let named = last.filter(|(row, _)| row.matches('|').count() == 2);
    let words = named.flat_map(|(_, cell)| cell.split('`').skip(1).step_by(2));
    let all: Vec<String> = ckpt_fixtures::all().into_iter().map(|f| f.name).collect();
    let unknown: Vec<&str> = words.filter(|w| !all.iter().any(|f| f == w)).collect();
    assert_eq!(unknown, [""; 0], "no such file in fixtures/");
}

/// A policy of a node that this machine has not.
#[test]
fn a_missing_node_is_told() {
    isolated("a_missing_node_is_told", |case| {
        let mut target = fixture(case, "counter");
        let image = target.killed_into(case, "job.ckpt");
        let edited = edited(case, &image, "edited.ckpt", |snapshot| {
            let policy = |mode| {
                Some(MemoryPolicy {
                    mode,
                    nodes: vec![1000],
                })
            };
            let process = &mut snapshot.processes[0];
            process.threads[0].memory_policy = policy(3);
            let mut mappings = process.memory.mappings.iter_mut();
            let heap = mappings.find(|m| m.prot == 3 && m.policy.is_none());
            heap.expect("it has memory").policy = policy(2);
        });
        let out = run(case, restore_cmd(&edited, &[]).arg("--detach"));
        let pid = out.ok().trim().parse().expect("it prints the pid");
        for words in [
            "memory policy of a thread (interleave on nodes [1000]) is not kept",
            "(bind on nodes [1000]) is not kept",
        ] {
            assert!(out.stderr.contains(words), "{out:?}");
        }
        target.continued_by(Job::of(pid));
        target.passes();
    });
}

/// Nothing tells of a Landlock domain, but what is in one may not look out of it.
fn landlock_is_told(case: &Case) {
    let mut target = odd(case, "landlocked", None);
    let pid = target.pid().to_string();
    let noted = ckpt(case, ["check", &pid]);
    let hint = status_field(target.pid(), "NoNewPrivs").as_deref() == Some("1");
    assert_eq!(noted.ok().contains("Landlock"), hint, "{noted:?}");
    let told = ckpt(case, ["attach", &pid, "-o", "first.ckpt"]);
    told.ok();
    assert!(told.stderr.contains("restricted by Landlock"), "{told:?}");
    let image = target.killed_into(case, "job.ckpt");
    let out = run(case, restore_cmd(&image, &[]).arg("--detach"));
    let pid = out.ok().trim().parse().expect("it prints the pid");
    assert!(out.stderr.contains("restricted by Landlock"), "{out:?}");
    target.continued_by(Job::of(pid));
    target.passes();
}

#[test]
fn landlock() {
    isolated("landlock", landlock_is_told);
}

#[test]
fn landlock_of_a_user() {
    isolated_as_user("landlock_of_a_user", landlock_is_told);
}

/// `restore` under PR_SET_MDWE cannot make the restorer executable.
#[test]
#[allow(unsafe_code)]
fn mdwe_of_restore_is_refused() {
    isolated("mdwe_of_restore_is_refused", |case| {
        let mut target = fixture(case, "counter");
        let image = target.killed_into(case, "job.ckpt");
        let mut command = restore_cmd(&image, &[]);
        // SAFETY: one system call without pointers.
        unsafe {
            command.pre_exec(|| match libc::prctl(65, 1, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let out = run(case, &mut command);
        out.refused(FAILED, &["PR_SET_MDWE", "MemoryDenyWriteExecute=no"]);
        assert_no_process_left();
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}
