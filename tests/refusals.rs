//! What cannot be done is refused in one sentence that names the object and the remedy, before
//! anything is touched: the target goes on, and nothing is left behind.

use std::fs;
use std::process::Command;

use crate::common::isolate::{open_to_all, skipped};
use crate::common::look::{assert_let_go, states, status_field};
use crate::common::refused::{attach_is_refused, unharmed};
use crate::common::tool::{CKPT, leftovers, nobody};
use crate::common::{Looks, ckpt, fixture, isolated, isolated_as_user, odd, run, start, until};

#[test]
fn no_such_process() {
    isolated("no_such_process", |case| {
        let out = ckpt(case, ["attach", "99999", "-o", "job.ckpt"]);
        out.refused(1, &["process 99999", "does not exist", "pgrep"]);
        let out = ckpt(case, ["check", "99999"]);
        assert_eq!(out.code(), 1);
        assert!(out.stdout.contains("does not exist"), "{out:?}");
        assert!(leftovers(case.dir()).is_empty());
    });
}

#[test]
fn too_few_descriptors() {
    isolated("too_few_descriptors", |case| {
        let fixture = fixture(case, "counter");
        let before = Looks::at(fixture.pid());
        let attach = format!(
            "ulimit -n 12; exec {CKPT} attach {} -o job.ckpt",
            fixture.pid()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &attach]).current_dir(case.dir());
        run(case, &mut command).refused(1, &["cannot", "open files", "ulimit -Hn"]);
        assert_let_go(fixture.pid());
        before.assert_same(fixture.pid(), &[]);
        assert!(leftovers(case.dir()).is_empty());
        fixture.passes();
    });
}

#[test]
fn kernel_thread() {
    // It is only seen from the first pid namespace, and nothing is started here.
    if fs::read_to_string("/proc/2/comm")
        .unwrap_or_default()
        .trim()
        != "kthreadd"
    {
        return skipped("refusals::kernel_thread", "sight of the kernel's threads");
    }
    let image = std::env::temp_dir().join(format!("kthreadd.{}.ckpt", std::process::id()));
    let out = Command::new(CKPT)
        .args(["attach", "2", "-o"])
        .arg(&image)
        .output();
    let out = out.expect("it was built");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        said.contains("process 2 (kthreadd)") && said.contains("thread of the kernel"),
        "{said}"
    );
    assert!(!image.exists());
}

#[test]
fn another_users_process() {
    isolated("another_users_process", |case| {
        case.needs_root();
        let fixture = fixture(case, "counter");
        let before = Looks::at(fixture.pid());
        open_to_all(case.dir());
        let out = run(
            case,
            nobody(case, CKPT.as_ref())
                .arg("attach")
                .args([&fixture.pid().to_string(), "-o", "job.ckpt"])
                .current_dir(case.dir()),
        );
        let pid = format!("process {}", fixture.pid());
        out.refused(1, &[&pid, "uid 0", "uid 65534", "as that user or as root"]);
        unharmed(case, fixture, &before);
    });
}

#[test]
fn traced_already() {
    isolated("traced_already", |case| {
        case.needs_program("strace", "strace");
        let fixture = fixture(case, "counter");
        let pid = fixture.pid().to_string();
        let mut strace = Command::new("strace");
        let strace = start(
            strace.args(["-o", "/dev/null", "-p", &pid]),
            &case.path("strace.log"),
        );
        until("strace", || {
            status_field(fixture.pid(), "TracerPid").filter(|tracer| tracer != "0")
        });
        let tracer = format!("strace (pid {})", strace.pid);
        let out = ckpt(case, ["attach", &pid, "-o", "job.ckpt"]);
        out.refused(1, &["traced by", &tracer, "end that one first"]);
        let before = Looks::at(fixture.pid());
        strace.kill();
        unharmed(case, fixture, &before);
    });
}

#[test]
fn program_of_32_bits() {
    isolated("program_of_32_bits", |case| {
        let source = case.path("tiny.s");
        // pause() for ever.
        let text = ".globl _start\n_start: mov $29, %eax\n int $0x80\n jmp _start\n";
        fs::write(&source, text).expect("the test's directory is writable");
        let (object, program) = (case.path("tiny.o"), case.path("tiny"));
        run(
            case,
            Command::new("as")
                .arg("--32")
                .arg("-o")
                .arg(&object)
                .arg(&source),
        )
        .ok();
        let mut link = Command::new("ld");
        run(
            case,
            link.args(["-m", "elf_i386", "-o"])
                .arg(&program)
                .arg(&object),
        )
        .ok();
        let mut job = start(&mut Command::new(&program), &case.path("tiny.log"));
        until("the program to wait", || match states(job.pid).first() {
            Some((_, 'S')) => Some(()),
            _ if job.ended().is_some() => case.skip("a kernel that runs 32-bit programs"),
            _ => None,
        });
        let out = ckpt(case, ["attach", &job.pid.to_string(), "-o", "job.ckpt"]);
        out.refused(1, &["(tiny)", "32-bit", "64-bit build"]);
        assert_let_go(job.pid);
    });
}

#[test]
fn zombie() {
    isolated("zombie", |case| {
        let job = start(&mut Command::new("true"), &case.path("true.log"));
        until("a zombie", || {
            (states(job.pid) == [(job.pid, 'Z')]).then_some(())
        });
        let out = ckpt(case, ["attach", &job.pid.to_string(), "-o", "job.ckpt"]);
        out.refused(1, &["(true)", "already ended", "zombie"]);
    });
}

#[test]
fn ckpt_itself() {
    isolated("ckpt_itself", |case| {
        let script = format!("exec {CKPT} attach $$ -o job.ckpt");
        let out = run(
            case,
            Command::new("sh")
                .args(["-c", &script])
                .current_dir(case.dir()),
        );
        out.refused(1, &["is ckpt itself"]);
    });
}

#[test]
fn thread_of_a_process() {
    isolated("thread_of_a_process", |case| {
        let fixture = fixture(case, "threads");
        let before = Looks::at(fixture.pid());
        let threads = states(fixture.pid());
        let thread = threads
            .iter()
            .map(|(tid, _)| *tid)
            .find(|tid| *tid != fixture.pid());
        let thread = thread.expect("it has threads").to_string();
        let process = format!("thread of process {}", fixture.pid());
        let remedy = format!("ckpt attach {}", fixture.pid());
        let out = ckpt(case, ["attach", &thread, "-o", "job.ckpt"]);
        out.refused(1, &[&thread, &process, &remedy]);
        unharmed(case, fixture, &before);
    });
}

#[test]
fn netlink_socket_of_another_protocol() {
    isolated("netlink_socket_of_another_protocol", |case| {
        attach_is_refused(
            case,
            odd(case, "netlink", None),
            &["fd 3", "socket", "not supported"],
        );
    });
}

#[test]
fn io_uring() {
    isolated("io_uring", |case| {
        attach_is_refused(
            case,
            odd(case, "uring", None),
            &[
                "(odd)",
                "uses io_uring",
                "not supported",
                "io_uring_disabled",
            ],
        );
    });
}

/// A fork has the mapping of a ring, and not its context.
#[test]
fn ring_of_an_aio_context_after_a_fork() {
    isolated("ring_of_an_aio_context_after_a_fork", |case| {
        let target = odd(case, "aio-fork", None);
        let before = Looks::at(target.pid());
        let whole = ["AIO context", "came over with the fork", "MADV_DONTFORK"];
        ckpt(
            case,
            ["attach", &target.pid().to_string(), "-o", "job.ckpt"],
        )
        .refused(1, &whole);
        // Alone: only a call made in it tells.
        let child = target.job.descendants()[0].to_string();
        let alone = ["AIO context", "no context of this process", "MADV_DONTFORK"];
        ckpt(case, ["attach", &child, "-o", "job.ckpt"]).refused(1, &alone);
        unharmed(case, target, &before);
    });
}

/// A batch of calls that is to go on by itself must not end in SIGXFSZ.
#[test]
fn aio_context_under_a_limit_of_the_file_size() {
    isolated("aio_context_under_a_limit_of_the_file_size", |case| {
        let target = odd(case, "aio-file-size", None);
        let words = ["AIO context", "limit of the file size", "prlimit --fsize"];
        attach_is_refused(case, target, &words);
    });
}

/// Remote calls need some memory of their own.
#[test]
fn limits_of_memory() {
    isolated("limits_of_memory", |case| {
        for (program, option) in [("memory-limit", "prlimit --as="), ("data-limit", "--data=")] {
            let target = odd(case, program, None);
            attach_is_refused(case, target, &["more bytes of memory", option]);
        }
    });
}

/// The kernel stops no task that waits in vfork(2); the freeze does not wait without end.
#[test]
fn waiting_in_vfork() {
    isolated("waiting_in_vfork", |case| {
        let target = odd(case, "vfork", None);
        attach_is_refused(case, target, &["vfork", "try again"]);
    });
}

/// It could not be created again.
#[test]
fn memory_of_a_sibling() {
    isolated("memory_of_a_sibling", |case| {
        let target = odd(case, "sibling", None);
        let words = [
            "shares its memory (CLONE_VM)",
            "not with its parent",
            "has ended",
        ];
        attach_is_refused(case, target, &words);
    });
}

#[test]
fn memory_of_a_parent_outside_the_job() {
    isolated("memory_of_a_parent_outside_the_job", |case| {
        let target = fixture(case, "tree_vm");
        let before = Looks::at(target.pid());
        let mate = target.job.descendants()[0].to_string();
        let out = ckpt(case, ["attach", &mate, "-o", "job.ckpt"]);
        let whole = format!("ckpt attach {}", target.pid());
        out.refused(
            1,
            &["shares its memory (CLONE_VM)", "outside the job", &whole],
        );
        unharmed(case, target, &before);
    });
}

#[test]
fn thread_with_descriptors_of_its_own() {
    isolated("thread_with_descriptors_of_its_own", |case| {
        let target = odd(case, "own-files", None);
        let pid = format!("process {} (odd)", target.pid());
        attach_is_refused(case, target, &[&pid, "its own table of descriptors"]);
    });
}

#[test]
fn another_namespace() {
    isolated("another_namespace", |case| {
        let target = odd(case, "own-uts", None);
        let pid = format!("process {} (odd)", target.pid());
        attach_is_refused(case, target, &[&pid, "uts namespace", "nsenter", "--uts"]);
    });
}

#[test]
fn several_obstacles_are_told_at_once() {
    isolated("several_obstacles_are_told_at_once", |case| {
        let target = odd(case, "netlink-twice", None);
        let out = ckpt(case, ["check", "--json", &target.pid().to_string()]);
        assert_eq!(out.code(), 1);
        let told: serde_json::Value = serde_json::from_str(&out.stdout).expect("it is JSON");
        assert_eq!(told["possible"], false);
        assert_eq!(
            told["obstacles"].as_array().map(Vec::len),
            Some(2),
            "{told}"
        );
        let objects = [0, 1].map(|i| told["obstacles"][i]["object"].to_string());
        // One socket of the process, one that only its child has.
        let own = format!("of process {} (odd)", target.pid());
        assert!(
            objects[0].contains(&own) && !objects[1].contains(&own),
            "{told}"
        );
        assert!(told["obstacles"][0]["remedy"].is_string(), "{told}");
        target.passes();
    });
}

#[test]
fn a_filter_with_a_listener() {
    isolated("a_filter_with_a_listener", |case| {
        case.needs_root();
        let target = odd(case, "notifying", None);
        let words = ["SECCOMP_RET_USER_NOTIF", "without that listener"];
        attach_is_refused(case, target, &words);
    });
}

/// No call can be made in it from outside, since our code would be another there.
#[test]
fn a_thread_in_32_bit_code() {
    isolated("a_thread_in_32_bit_code", |case| {
        let target = odd(case, "code32", None);
        attach_is_refused(case, target, &["the segment 0x23", "in a moment"]);
    });
}

#[test]
fn strict_seccomp_of_an_ordinary_user() {
    isolated_as_user("strict_seccomp_of_an_ordinary_user", |case| {
        let target = fixture(case, "seccomp_strict");
        attach_is_refused(
            case,
            target,
            &["strict seccomp", "CAP_SYS_ADMIN", "as root"],
        );
    });
}

#[test]
fn seccomp_of_an_ordinary_user() {
    isolated_as_user("seccomp_of_an_ordinary_user", |case| {
        let target = fixture(case, "seccomp");
        attach_is_refused(case, target, &["seccomp", "CAP_SYS_ADMIN", "as root"]);
    });
}

/// A timer of another process's CPU time.
#[test]
fn timer_of_an_outsiders_time() {
    isolated("timer_of_an_outsiders_time", |case| {
        let target = odd(case, "others-time", None);
        let words = ["POSIX timer (id 0)", "CPU time of", "delete it"];
        attach_is_refused(case, target, &words);
    });
}

/// No remote call can be made from where the program may make calls: there is no room.
#[test]
fn dispatch_with_a_narrow_range() {
    isolated("dispatch_with_a_narrow_range", |case| {
        let target = odd(case, "narrow-dispatch", None);
        let words = ["unused room", "syscall user dispatch", "turn that off"];
        attach_is_refused(case, target, &words);
    });
}

/// Another driver than the terminal's own has what was read and written.
#[test]
fn line_discipline() {
    isolated("line_discipline", |case| {
        let target = odd(case, "discipline", None);
        let words = ["line discipline 27", "TIOCSETD", "N_TTY"];
        attach_is_refused(case, target, &words);
    });
}
