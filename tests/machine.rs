//! Another machine: what an image says of its own, what it needs, and what is told when it is not
//! there.

use crate::common;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::edit::edited;
use crate::common::fixture::killed;
use crate::common::logger::{Logger, mapping};
use crate::common::look::assert_no_process_left;
use crate::common::refused::{FAILED, restore_is_refused};
use crate::common::tool::{CKPT, source};
use crate::common::{
    Case, attach, ckpt, isolated, isolated_as_user, restore_cmd, restored, run, start, until,
};
use ckpt::objects::Snapshot;
use serde_json::Value;

fn json(case: &Case, args: &[&str], image: &Path) -> Value {
    let mut words: Vec<&std::ffi::OsStr> = args.iter().map(|a| a.as_ref()).collect();
    words.push(image.as_os_str());
    let out = ckpt(case, words);
    serde_json::from_str(&out.stdout).unwrap_or_else(|error| panic!("{error}: {out:#?}"))
}

#[test]
fn an_image_says_where_and_how_it_was_taken() {
    isolated("an_image_says_where_and_how_it_was_taken", |case| {
        let (_target, image) = killed(case, "counter");
        let summary = &json(case, &["inspect", "--json"], &image)["summary"];
        let of_kernel = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/kernel/{name}"));
            text.expect("/proc is mounted").trim().to_owned()
        };
        assert_eq!(summary["boot_id"], of_kernel("random/boot_id"));
        assert_eq!(summary["host"], of_kernel("hostname"));
        let kernel = summary["kernel"].as_str().expect("a string");
        assert!(kernel.starts_with(&of_kernel("osrelease")), "{kernel}");
        let features = summary["cpu_features"].as_array().expect("a list");
        assert!(features.contains(&"sse2".into()), "{features:?}");
        let command = summary["checkpoint_command"].as_array().expect("a list");
        assert_eq!(command[1], "attach");
        assert!(command.contains(&"--kill".into()), "{command:?}");
        let text = ckpt(case, ["inspect".as_ref(), image.as_os_str()]);
        for word in ["boot id", "taken by", " sse2 ", &of_kernel("hostname")] {
            assert!(text.ok().contains(word), "no {word} in {text:#?}");
        }
    });
}

/// Everything that the job had is elsewhere: one attempt names all of it, by `restore` as by `ckpt
/// check`, and creates nothing.
#[test]
fn everything_missing_is_told_at_once() {
    isolated("everything_missing_is_told_at_once", missing);
}

#[test]
fn everything_missing_is_told_at_once_to_a_user() {
    isolated_as_user("everything_missing_is_told_at_once_to_a_user", missing);
}

fn missing(case: &Case) {
    let mut logger = Logger::start(case, "a");
    let image = logger.killed_into(case, &[]);
    let possible = ckpt(case, ["check".as_ref(), image.as_os_str()]);
    assert!(possible.ok().contains("can be restored here"));
    let (old, new) = (case.path("old"), case.path("new"));
    fs::rename(&old, &new).expect("it is ours");
    let names = ["out.log", "table", "input", "state.bin", "python"].map(|name| logger.path(name));
    let cwd = format!("the working directory {}", old.display());
    let out = run(case, &mut restore_cmd(&image, &[]));
    for name in names.iter().chain([&cwd]) {
        out.refused(FAILED, &[name, "No such file", "--map-path OLD=NEW"]);
    }
    assert_no_process_left();
    assert!(!old.exists());
    let check = ckpt(case, ["check".as_ref(), image.as_os_str()]);
    assert_eq!(check.code(), 1);
    let told: Vec<&str> = out
        .stderr
        .lines()
        .flat_map(|l| l.strip_prefix("ckpt: "))
        .collect();
    assert_eq!(check.stdout.lines().collect::<Vec<_>>(), told);
    let obstacles = json(case, &["check", "--json"], &image);
    assert_eq!(obstacles["possible"], false);
    assert_eq!(
        obstacles["obstacles"].as_array().map(Vec::len),
        Some(told.len())
    );

    let map = mapping(&old, &new);
    let args = ["--map-path", &map];
    let check = ckpt(
        case,
        ["check", "--map-path", &map, &image.display().to_string()],
    );
    check.ok();
    logger.dir = new;
    logger.goes_on(case, &image, &args);
    logger.passes();
}

/// What stands in the way of one process does not hide what stands in the way of another.
#[test]
fn obstacles_of_all_processes_are_told() {
    isolated("obstacles_of_all_processes_are_told", |case| {
        let places = ["a", "b", "c"].map(|name| case.path(name));
        for place in &places {
            fs::create_dir(place).expect("the test's directory is writable");
        }
        let log = fs::File::create(case.path("c/log")).expect("the test's directory is writable");
        drop(log);
        let script = "(cd ../b; exec sleep 1000) & (cd ../c; exec sleep 1000 3<log) & wait";
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir(&places[0]);
        let shell = start(&mut shell, &case.path("shell.log"));
        until("both children", || {
            let all = shell.descendants();
            let sleeps = |pid: &i32| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm"));
                name.is_ok_and(|name| name == "sleep\n")
            };
            (all.len() == 2 && all.iter().all(sleeps)).then_some(())
        });
        let (image, _) = attach(case, shell.pid, "job.ckpt", &[]);
        for place in &places {
            fs::remove_dir_all(place).expect("it is ours");
        }
        // Their pids are taken too.
        let out = run(case, &mut restore_cmd(&image, &["--pids", "keep"]));
        for place in &places {
            out.refused(FAILED, &["working directory", &place.display().to_string()]);
        }
        out.refused(FAILED, &["c/log", "No such file"]);
        for pid in shell.descendants().iter().chain([&shell.pid]) {
            out.refused(FAILED, &[&format!("the pid {pid}"), "taken"]);
        }
    });
}

#[test]
fn needs_are_listed() {
    isolated("needs_are_listed", |case| {
        let mut logger = Logger::start(case, "a");
        let image = logger.killed_into(case, &[]);
        let view = json(case, &["inspect", "--needs", "--json"], &image);
        let needs = view["needs"].as_array().expect("a list");
        let find = |kind: &str, name: &str| {
            let of_it = |need: &&Value| need["kind"] == kind && need["name"] == name;
            let found = needs.iter().find(of_it);
            found.unwrap_or_else(|| panic!("no {kind} {name} in {needs:#?}"))
        };
        let input = find("open file", &logger.path("input"));
        assert_eq!(
            (&input["size"], &input["detail"]),
            (&12.into(), &"for reading".into())
        );
        find("open file", &logger.path("state.bin"));
        find("mapped file", &logger.path("table"));
        find("program", &logger.path("python"));
        find("directory", &case.path("old").display().to_string());
        find("pids", &logger.job.pid.to_string());
        let text = ckpt(case, ["inspect", "--needs", &image.display().to_string()]);
        for word in ["program", "limit", "processor", "user", "vDSO"] {
            assert!(text.ok().contains(word), "no {word} in {text:#?}");
        }
    });
}

/// A job whose processor had more than any has, or less.
#[test]
fn missing_features_of_the_processor_are_named() {
    isolated("missing_features_of_the_processor_are_named", |case| {
        let (mut target, image) = killed(case, "counter");
        let more = |snapshot: &mut Snapshot| {
            // XOP and 3DNow!: no processor has both, and one that has either has neither AVX-512.
            let words = &mut snapshot.host.processor.words;
            for word in words.iter_mut() {
                match (word.leaf, word.subleaf, word.register) {
                    (0x8000_0001, 0, 2) => word.bits |= 1 << 11,
                    (0x8000_0001, 0, 3) => word.bits |= 1 << 31,
                    (7, 0, 1) => word.bits |= 1 << 27,
                    _ => {}
                }
            }
        };
        let strange = edited(case, &image, "strange.ckpt", more);
        let words = [
            "avx512er",
            "xop",
            "3dnow",
            "newer processor",
            "--cpu-baseline",
        ];
        restore_is_refused(case, &strange, &words);
        let check = ckpt(case, ["check".as_ref(), strange.as_os_str()]);
        assert_eq!(check.code(), 1);
        assert!(
            check.stdout.contains("(avx512er, xop, 3dnow)"),
            "{check:#?}"
        );
        // Started with a baseline it does not ask for them, which is told.
        let modest = edited(case, &strange, "modest.ckpt", |snapshot| {
            snapshot.host.baseline = "x86-64-v3".parse().ok();
        });
        let out = run(case, restore_cmd(&modest, &[]).arg("--detach"));
        let pid = out.ok().trim().parse().expect("it is a pid");
        assert!(out.stderr.contains("avx512er, xop, 3dnow"), "{out:#?}");
        target.continued_by(common::Job::of(pid));
        target.passes();
    });
}

/// An image from a processor without XSAVEC and with fewer state components: what glibc saves at the first call
/// of a function is too much for the room that it made.
#[test]
fn more_state_than_there_is_room_for_is_refused() {
    isolated("more_state_than_there_is_room_for_is_refused", |case| {
        let older = |snapshot: &mut Snapshot| {
            let host = &mut snapshot.host;
            for word in &mut host.processor.words {
                if (word.leaf, word.subleaf, word.register) == (0xd, 1, 0) {
                    word.bits &= !0b10;
                }
            }
            host.xcr0 &= 0b11;
        };
        let (_, image) = killed(case, "counter");
        let old = edited(case, &image, "old.ckpt", older);
        restore_is_refused(case, &old, &["AVX", "LD_BIND_NOW=1"]);
        let mut program = Command::new(case.fixtures().join("counter"));
        program.env("LD_BIND_NOW", "1");
        let mut target = common::fixture::start_in(case, "counter", "run-at-once", program);
        let image = target.killed_into(case, "at-once.ckpt");
        let old = edited(case, &image, "old-at-once.ckpt", older);
        target.continued_by(restored(case, &old, &[]));
        target.passes();
    });
}

/// An image from a processor with fewer state components: the kernel here wants a larger area.
#[test]
fn a_smaller_extended_state_fits() {
    isolated("a_smaller_extended_state_fits", |case| {
        let (mut target, image) = killed(case, "xstate");
        let mut cut = 0;
        let smaller = edited(case, &image, "smaller.ckpt", |snapshot| {
            let host = &mut snapshot.host;
            let in_use = |xstate: &[u8]| u64::from_le_bytes(xstate[512..520].try_into().unwrap());
            let threads = snapshot.processes.iter().flat_map(|p| &p.threads);
            let used = threads.fold(0, |all, t| all | in_use(&t.xstate));
            // Protection keys are in use by the kernel's default.
            let used = used & !(1 << 9);
            let unused = |c: &ckpt::objects::processor::Component| used >> c.number & 1 == 0;
            while let Some(last) = host.processor.components.pop_if(|c| unused(c)) {
                host.xcr0 &= !(1 << last.number);
                cut = last.offset as usize;
            }
            for thread in snapshot.processes.iter_mut().flat_map(|p| &mut p.threads) {
                let bits = in_use(&thread.xstate) & host.xcr0;
                thread.xstate[512..520].copy_from_slice(&bits.to_le_bytes());
                thread
                    .xstate
                    .truncate(if cut == 0 { usize::MAX } else { cut });
            }
        });
        if cut == 0 {
            case.skip("a state component that the fixture does not use");
        }
        target.continued_by(restored(case, &smaller, &[]));
        target.passes();
    });
}

/// What a program of that level is told by glibc; and `ckpt` by its environment.
#[test]
fn a_baseline_is_kept_by_glibc_and_known_at_the_checkpoint() {
    isolated(
        "a_baseline_is_kept_by_glibc_and_known_at_the_checkpoint",
        |case| {
            if !Path::new("/usr/include/x86_64-linux-gnu/sys/platform/x86.h").exists() {
                case.skip("sys/platform/x86.h (libc6-dev 2.33 or newer)");
            }
            let program = case.path("levels");
            let mut gcc = Command::new("gcc");
            gcc.arg("-O1")
                .arg("-o")
                .arg(&program)
                .arg(source("levels.c"));
            run(case, &mut gcc).ok();
            let mut levels = Vec::new();
            for level in [None, Some("x86-64-v3"), Some("x86-64-v2")] {
                let name = level.unwrap_or("none");
                let log = case.path(&format!("{name}.log"));
                let mut command = Command::new(CKPT);
                command
                    .arg("run")
                    .args(level.map(|l| format!("--cpu-baseline={l}")))
                    .args(level.map(|_| "--cpuid=host"));
                let job = start(command.arg("--").arg(&program), &log);
                let text = until("what it finds", || {
                    let text = fs::read_to_string(&log).ok()?;
                    text.contains("compiler avx2").then_some(text)
                });
                let pid = job.descendants()[0];
                let (image, _) = attach(case, pid, format!("{name}.ckpt"), &["--kill"]);
                assert_eq!(job.wait(), common::Ended::Exited(137));
                let summary = &json(case, &["inspect", "--json"], &image)["summary"];
                assert_eq!(summary["cpu_baseline"], Value::from(level));
                levels.push(text);
            }
            let here = |text: &str, word: &str| text.contains(word);
            if !here(&levels[0], "popcnt 1 avx2 1") {
                case.skip("a processor with AVX2");
            }
            assert!(here(&levels[1], "popcnt 1 avx2 1"), "{levels:?}");
            assert!(here(&levels[2], "popcnt 1 avx2 0"), "{levels:?}");
            // Who asks the processor itself is not kept from it, as docs/limits.md says.
            assert!(here(&levels[2], "compiler avx2 1"), "{levels:?}");
        },
    );
}

/// A process that lost the environment may use everything, and so may the job.
#[test]
fn a_baseline_is_that_of_all_processes() {
    isolated("a_baseline_is_that_of_all_processes", |case| {
        for (script, baseline) in [
            ("sleep 1000 & wait", Value::from("x86-64-v2")),
            ("env -i sleep 1000 & wait", Value::Null),
        ] {
            let mut command = Command::new(CKPT);
            command.args([
                "run",
                "--cpu-baseline",
                "x86-64-v2",
                "--cpuid=host",
                "--",
                "sh",
                "-c",
                script,
            ]);
            let job = start(&mut command, &case.path("run.log"));
            let pid = until("sleep", || {
                let all = job.descendants();
                let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm"));
                let sleeps = all
                    .iter()
                    .any(|pid| name(pid).is_ok_and(|n| n == "sleep\n"));
                sleeps.then(|| all[0])
            });
            let (image, _) = attach(case, pid, "job.ckpt", &["--kill"]);
            assert_eq!(job.wait(), common::Ended::Exited(137));
            let summary = &json(case, &["inspect", "--json"], &image)["summary"];
            assert_eq!(summary["cpu_baseline"], baseline);
        }
    });
}

/// What is there and cannot be used is found in time too.
#[test]
fn what_cannot_be_used_is_told() {
    isolated("what_cannot_be_used_is_told", |case| {
        let program = case.path("program");
        fs::copy(case.fixtures().join("inotify"), &program).expect("there is room");
        let mut target = common::fixture::start_in(case, "inotify", "run", Command::new(&program));
        let image = target.killed_into(case, "job.ckpt");
        let mode = |mode| {
            let set = fs::set_permissions(&program, fs::Permissions::from_mode(mode));
            set.expect("it is ours");
        };
        mode(0o644);
        let (watched, aside) = (target.path("dir"), case.path("aside"));
        fs::rename(&watched, &aside).expect("it is ours");
        // More huge pages than any machine has.
        let greedy = edited(case, &image, "greedy.ckpt", |snapshot| {
            let mappings = &mut snapshot.processes[0].memory.mappings;
            let (start, page_size) = (1 << 40, 2 << 20);
            let at = mappings.partition_point(|m| m.start < start);
            let huge = ckpt::objects::memory::Mapping {
                start,
                end: start + (1 << 44),
                backing: ckpt::objects::memory::Backing::AnonymousHuge { page_size },
                flags: ckpt::objects::memory::MappingFlags::empty(),
                name: None,
                guards: Vec::new(),
                policy: None,
                ..mappings[0].clone()
            };
            mappings.insert(at, huge);
        });
        let out = run(case, &mut restore_cmd(&greedy, &[]));
        let watched = watched.display().to_string();
        out.refused(
            FAILED,
            &[&program.display().to_string(), "cannot be executed"],
        );
        out.refused(FAILED, &["inotify watch", &watched, "--map-path"]);
        out.refused(
            FAILED,
            &["huge pages of 2048 KiB", "8388608", "nr_hugepages"],
        );
        assert_no_process_left();
        mode(0o755);
        fs::rename(&aside, &watched).expect("it is ours");
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}
