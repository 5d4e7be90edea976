//! Interactive programs: checkpointed in one terminal, restored in another or in the same one.

use crate::common;
use std::fs;
use std::process::Command;

use crate::common::job::{Job, reap_orphans};
use crate::common::screen::Screen;
use crate::common::tool::{CKPT, RESTORE, restore_cmd};
use crate::common::{Case, Ended, attach, isolated, run, start, until};
use crate::sigkill::is_stopped;
use nix::sys::signal::Signal;

/// Ends the program with a checkpoint, and starts `restore` in the shell that it was started from.
fn restored_in(case: &Case, shell: &mut Screen, name: &str) {
    killed(case, shell.child(name));
    shell.expect("Killed");
    let image = case.path("job.ckpt");
    shell.runs("stty sane; echo 'rea''dy'", "ready");
    shell.types(&format!("{RESTORE} {}\n", image.display()));
}

/// Ends a job with a checkpoint. What loses its parent by that comes to us.
fn killed(case: &Case, pid: i32) {
    let job = Job::of(pid);
    let orphans = job.descendants();
    std::mem::forget(job);
    attach(case, pid, "job.ckpt", &["--kill"]);
    reap_orphans(&orphans);
}

/// Starts `cat` in a shell, which has the terminal as it was before its editor then.
fn cat(shell: &mut Screen) {
    shell.runs("cat", "\x1b[?2004l");
    shell.runs("typed", "typed\r\ntyped");
}

/// The shell is in the foreground of a terminal as it wants it.
fn is_back(shell: &mut Screen) {
    shell.insist("echo 'ba''ck'\n", "back");
    until("the shell's own modes or its editor's", || {
        shell.types("\n");
        (shell.foreground() == shell.job.pid).then_some(())
    });
    shell.types("exec sleep 1000\n");
    until("a sane terminal", || shell.is_sane().then_some(()));
}

#[test]
fn bash_with_jobs() {
    isolated("bash_with_jobs", |case| jobs_in(case, "keep"));
}

/// A shell that led its session gets a terminal of its own, which is relayed from outside.
#[test]
fn bash_in_a_namespace() {
    isolated("bash_in_a_namespace", |case| jobs_in(case, "namespace"));
}

/// Job control of a shell whose pids are restored in that place.
fn jobs_in(case: &Case, place: &str) {
    let mut shell = Screen::shell();
    shell.runs("word=hel; sleep 1000 &", "$ ");
    cat(&mut shell);
    killed(case, shell.job.pid);
    until("its end", || shell.job.ended());
    let image = case.path("job.ckpt");
    let mut restore = restore_cmd(&image, &["--verbose", "--pids", place]);
    let mut shell = Screen::sized(&mut restore, 30, 100);
    shell.expect("running as process");
    shell.runs("again", "again\r\nagain");
    shell.types("\x03");
    shell.expect("$ ");
    shell.runs("echo ${word}lo; stty size", "hello\r\n30 100");
    shell.runs("jobs", "Running                 sleep 1000");
    shell.runs("fg", "sleep 1000");
    shell.insist("\x1a", "Stopped");
    shell.runs("bg; jobs", "Running                 sleep 1000");
    // The size comes before what is typed after it, in whatever order restore gets to know.
    for round in 1..=10 {
        shell.job.signal(Signal::SIGSTOP);
        until("restore to be stopped", || {
            is_stopped(shell.job.pid).then_some(())
        });
        let (rows, columns) = (30 + round, 100 + round);
        shell.resize(rows, columns);
        shell.types("stty size\n");
        shell.job.signal(Signal::SIGCONT);
        shell.expect(&format!("{rows} {columns}"));
    }
    shell.types("kill %1; wait; exit 7\n");
    let ended = until("the end of restore", || shell.job.ended());
    assert_eq!(ended, Ended::Exited(7));
    assert!(shell.is_sane());
}

#[test]
fn python_prompt() {
    isolated("python_prompt", |case| {
        let python = case.system_python();
        let mut shell = Screen::shell();
        shell.runs(&format!("{python} -q"), ">>> ");
        shell.runs("answer = 41", ">>> ");
        restored_in(case, &mut shell, "python3");
        shell.runs("answer + 1", "42");
        // Before that its editor does not read, and the terminal takes the key for the end of a file.
        shell.expect(">>> ");
        shell.types("\x04");
        is_back(&mut shell);
    });
}

#[test]
fn vim_with_unsaved_text() {
    isolated("vim_with_unsaved_text", |case| {
        let program = if common::isolate::installed("vim.tiny") {
            "vim.tiny"
        } else {
            "vim"
        };
        case.needs_program(program, "vim-tiny");
        let file = case.path("text");
        fs::write(&file, "one\ntwo\n").expect("the test's directory is writable");
        let mut shell = Screen::shell();
        shell.runs(&format!("{program} -u NONE -n {}", file.display()), "two");
        shell.types("Gothree");
        shell.expect("three");
        restored_in(case, &mut shell, program);
        shell.expect("three");
        shell.types("!\x1b");
        shell.types("\x1a");
        shell.expect("Stopped");
        shell.runs("echo 'bet''ween'", "between");
        shell.types("fg\n");
        shell.expect("three!");
        let mut asked = 0;
        until("the text to be written", || {
            let text = fs::read_to_string(&file).expect("it is there");
            // Vim forgets what is typed while it takes the terminal over.
            if asked % 100 == 50 {
                shell.types("\x1b:wq\r");
            }
            asked += 1;
            (text == "one\ntwo\nthree!\n").then_some(())
        });
        is_back(&mut shell);
    });
}

#[test]
fn less_and_its_place() {
    isolated("less_and_its_place", |case| {
        case.needs_program("less", "less");
        let mut shell = Screen::shell();
        let file = case.path("text");
        let lines: String = (1..1000).map(|i| format!("line {i}.\n")).collect();
        fs::write(&file, lines).expect("the test's directory is writable");
        shell.runs(&format!("less {}", file.display()), "line 9.");
        shell.types("500g");
        shell.expect("line 520.");
        restored_in(case, &mut shell, "less");
        shell.expect("line 501.");
        shell.types("\x20");
        shell.expect("line 540.");
        shell.types("q");
        is_back(&mut shell);
    });
}

#[test]
fn top_keeps_drawing() {
    isolated("top_keeps_drawing", |case| {
        case.needs_program("top", "procps");
        let mut shell = Screen::shell();
        shell.runs("top -d 0.2", "PID");
        restored_in(case, &mut shell, "top");
        for _ in 0..5 {
            shell.expect("top - ");
        }
        shell.types("q");
        is_back(&mut shell);
    });
}

#[test]
fn script_with_a_shell() {
    isolated("script_with_a_shell", |case| {
        case.needs_program("script", "bsdutils");
        let mut shell = Screen::shell();
        let inner = "PS1='in''side> ' script -q -c 'bash --norc -i' typescript";
        shell.runs(&format!("cd {}; {inner}", case.dir().display()), "inside> ");
        shell.runs("word=in; sleep 1000 &", "inside> ");
        cat(&mut shell);
        restored_in(case, &mut shell, "script");
        shell.runs("again", "again\r\nagain");
        shell.types("\x03");
        shell.expect("inside> ");
        shell.runs("echo ${word}ner; jobs", "inner\r\n[1]");
        shell.types("kill %1; wait; exit\n");
        is_back(&mut shell);
        let text = fs::read(case.path("typescript")).expect("it was written");
        assert!(String::from_utf8_lossy(&text).contains("inner"));
    });
}

#[test]
fn started_in_the_background() {
    isolated("started_in_the_background", |case| {
        let mut shell = Screen::shell();
        cat(&mut shell);
        killed(case, shell.child("cat"));
        shell.expect("Killed");
        let image = case.path("job.ckpt");
        shell.types(&format!("{RESTORE} {} &\n", image.display()));
        until("it to be stopped for reading", || {
            shell.types("\n");
            let restore = shell.child("restore");
            let state = common::look::status_field(restore, "State")?;
            state.starts_with('T').then_some(())
        });
        shell.types("fg\n");
        until("it to be in the foreground", || {
            (shell.foreground() != shell.job.pid).then_some(())
        });
        shell.runs("again", "again\r\nagain");
        shell.types("\x04");
        is_back(&mut shell);
    });
}

#[test]
fn detached_with_a_console() {
    isolated("detached_with_a_console", |case| console_of(case, "keep"));
}

#[test]
fn detached_in_a_namespace() {
    isolated("detached_in_a_namespace", |case| {
        console_of(case, "namespace")
    });
}

fn console_of(case: &Case, place: &str) {
    let mut shell = Screen::shell();
    shell.runs("word=hel; sleep 1000 & true", "$ ");
    let pid = shell.job.pid;
    killed(case, pid);
    until("its end", || shell.job.ended());
    let image = case.path("job.ckpt");
    let home = case.path("runtime");
    fs::create_dir(&home).expect("the test's directory is writable");
    let out = run(
        case,
        restore_cmd(&image, &["--detach", "--pids", place]).env("XDG_RUNTIME_DIR", &home),
    );
    let was = pid.to_string();
    let pid = out.ok().trim().to_owned();
    assert_eq!(pid == was, place == "keep");
    let console = || {
        let mut command = Command::new(CKPT);
        command
            .args(["console", &pid])
            .env("XDG_RUNTIME_DIR", &home);
        command
    };
    let mut first = Screen::start(&mut console());
    first.runs("echo ${word}lo; stty size", "hello\r\n24 80");
    run(case, &mut console()).refused(1, &["console of process", "another ckpt console"]);
    first.types("\x1c\x1c");
    first.expect("detached");
    let ended = until("its end", || first.job.ended());
    assert_eq!(ended, Ended::Exited(0));
    assert!(first.is_sane());
    let mut second = Screen::sized(&mut console(), 30, 90);
    second.expect("hello");
    second.runs("jobs; stty size", "30 90");
    second.types("kill %1; wait; exit\n");
    second.expect("has ended");
    until("its end", || second.job.ended());
    assert!(second.is_sane());
    until("the socket to be gone", || {
        let names = fs::read_dir(home.join("ckpt")).ok()?;
        (names.count() == 0).then_some(())
    });
    run(case, &mut console()).refused(1, &["console of process", "not there"]);
}

/// One that did not lead its session does so behind its console.
#[test]
fn editor_detached() {
    isolated("editor_detached", |case| {
        case.needs_program("vim", "vim");
        let file = case.path("text");
        fs::write(&file, "one\n").expect("the test's directory is writable");
        let mut shell = Screen::shell();
        shell.runs(&format!("vim -u NONE -n {}", file.display()), "one");
        shell.types("Gotwo");
        shell.expect("two");
        let pid = shell.child("vim");
        attach(case, pid, "job.ckpt", &["--kill"]);
        let home = case.path("runtime");
        fs::create_dir(&home).expect("the test's directory is writable");
        let image = case.path("job.ckpt");
        let mut detached = restore_cmd(&image, &["--detach"]);
        run(case, detached.env("XDG_RUNTIME_DIR", &home)).ok();
        let mut console = Command::new(CKPT);
        console
            .args(["console", &pid.to_string()])
            .env("XDG_RUNTIME_DIR", &home);
        let mut screen = Screen::start(&mut console);
        screen.expect("two");
        screen.types("\x1b:wq\r");
        screen.expect("has ended");
        let text = fs::read_to_string(&file).expect("it was written");
        assert_eq!(text, "one\ntwo\n");
    });
}

/// A server with two windows: it has no terminal itself, and ptys whose slaves its children have.
#[test]
fn tmux_with_two_windows() {
    isolated("tmux_with_two_windows", |case| {
        case.needs_program("tmux", "tmux");
        let socket = case.path("socket");
        let tmux = |args: &[&str]| {
            let mut command = Command::new("tmux");
            command.env("TERM", "xterm").env_remove("TMUX");
            command
                .args(["-f", "/dev/null", "-S"])
                .arg(&socket)
                .args(args);
            run(case, &mut command).ok().to_owned()
        };
        let shell = "bash --norc --noprofile -i";
        tmux(&[
            "new-session",
            "-d",
            "-s",
            "main",
            "-x",
            "80",
            "-y",
            "24",
            shell,
        ]);
        tmux(&["new-window", "-t", "main", shell]);
        for (window, word) in [("main:0", "first"), ("main:1", "second")] {
            tmux(&["send-keys", "-t", window, &format!("word={word}"), "Enter"]);
        }
        let pid = tmux(&["display-message", "-p", "#{pid}"]);
        let pid = pid.trim().parse().expect("it is a pid");
        killed(case, pid);
        reap_orphans(&[pid]);
        let restored = common::restored(case, &case.path("job.ckpt"), &[]);
        for (window, word) in [("main:0", "first"), ("main:1", "second")] {
            tmux(&["send-keys", "-t", window, "echo 'it'' is' $word", "Enter"]);
            until("the pane to answer", || {
                let text = tmux(&["capture-pane", "-p", "-t", window]);
                text.contains(&format!("it is {word}")).then_some(())
            });
        }
        tmux(&["kill-server"]);
        assert_eq!(restored.wait(), Ended::Exited(0));
    });
}

/// In a pid namespace of its own an editor has the terminal as it has outside: stopped by its key and
/// brought back by the shell.
#[test]
fn less_in_a_namespace() {
    isolated("less_in_a_namespace", |case| {
        case.needs_program("less", "less");
        let mut shell = Screen::shell();
        let file = case.path("text");
        let lines: String = (1..1000).map(|i| format!("line {i}.\n")).collect();
        fs::write(&file, lines).expect("the test's directory is writable");
        shell.runs(&format!("less {}", file.display()), "line 9.");
        shell.types("500g");
        shell.expect("line 520.");
        killed(case, shell.child("less"));
        shell.expect("Killed");
        let image = case.path("job.ckpt");
        shell.runs("stty sane; echo 'rea''dy'", "ready");
        shell.types(&format!("{RESTORE} --pids namespace {}\n", image.display()));
        shell.expect("line 501.");
        shell.types("\x20");
        shell.expect("line 540.");
        shell.insist("\x1a", "Stopped");
        shell.runs("echo 'bet''ween'", "between");
        shell.types("fg\n");
        shell.expect("line 540.");
        shell.types("q");
        is_back(&mut shell);
    });
}

/// A checkpoint that takes some seconds, since it is compressed as well as can be.
#[test]
fn progress_of_long_work() {
    isolated("progress_of_long_work", |case| {
        const HOLDS: &str = "import os, signal, sys
text = os.urandom(4 << 20).hex()
open(sys.argv[1], 'w').close()
signal.pause()";
        let ready = case.path("ready");
        let mut command = Command::new(case.system_python());
        let job = start(
            command.args(["-c", HOLDS]).arg(&ready),
            &case.path("job.log"),
        );
        until("the text", || ready.exists().then_some(()));
        let attach = || {
            let mut command = Command::new(CKPT);
            command.args(["attach", "--codec", "zstd:19", &job.pid.to_string(), "-o"]);
            command.arg(case.path("job.ckpt"));
            command
        };
        let mut screen = Screen::start(&mut attach());
        screen.expect("checkpoint [");
        screen.expect(" left");
        // The line goes when the work is done, and one with the figures comes.
        screen.expect("1 process, 1 thread");
        assert_eq!(until("its end", || screen.job.ended()), Ended::Exited(0));
        let piped = run(case, &mut attach());
        piped.ok();
        assert_eq!(piped.stderr, "");
        job.kill();
    });
}
