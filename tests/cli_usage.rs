//! Command lines: what is refused, with which exit code, and what is printed for packages.

use std::process::{Command, Output, Stdio};

const CKPT: &str = env!("CARGO_BIN_EXE_ckpt");
const RESTORE: &str = env!("CARGO_BIN_EXE_restore");
/// Above every `kernel.pid_max`.
const NOBODY: &str = "4194305";

fn output(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_remove("CKPT_FAIL_RC")
        .env_remove("DMTCP_FAIL_RC");
    command.stdin(Stdio::null()).output().unwrap()
}

/// Exit code and standard error.
fn refusal(program: &str, arguments: &[&str]) -> (i32, String) {
    let output = output(program, arguments);
    assert!(
        output.stdout.is_empty(),
        "{arguments:?} wrote to standard output"
    );
    let text = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), text)
}

fn success(arguments: &[&str]) -> String {
    let output = output(CKPT, arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn wrong_command_lines_end_with_2() {
    for arguments in [
        &["nonsense"][..],
        &["attach"],
        &["attach", "0"],
        &["attach", "-1"],
        &["attach", "x"],
        &["attach", "1", "--kill", "--stop"],
        &["attach", "1", "--codec", "zip"],
        &["attach", "1", "-q", "-v"],
        &["run"],
        &["run", "--interval", "0", "--", "true"],
        &["run", "--interval", "5 minutes", "--", "true"],
        &["run", "--keep", "0", "--", "true"],
        &["run", "--name", "a/b", "--", "true"],
        &["restore"],
        &["restore", "--fd", "1", "x"],
        &["restore", "--fd", "1=a", "--fd", "1=b", "x"],
        &["restore", "--files", "maybe", "x"],
        &["restore", "--dry-run", "--detach", "x"],
        &["verify"],
        &["completions", "csh"],
    ] {
        let (code, text) = refusal(CKPT, arguments);
        assert_eq!(code, 2, "{arguments:?}: {text}");
        assert!(text.starts_with("ckpt: "), "{arguments:?}: {text}");
    }
    assert_eq!(refusal(RESTORE, &["--nonsense"]).0, 2);
}

#[test]
fn failures_are_said_once_with_the_commands_code() {
    for (program, arguments, code) in [
        (CKPT, &["attach", NOBODY][..], 1),
        (CKPT, &["inspect", "/nonexistent"], 1),
        (CKPT, &["verify", "/nonexistent"], 1),
        (CKPT, &["verify", "/dev/null"], 1),
        (CKPT, &["restore", "/nonexistent"], 99),
        (RESTORE, &["/nonexistent"], 99),
        (RESTORE, &["--dry-run", "/nonexistent"], 99),
    ] {
        let (got, text) = refusal(program, arguments);
        assert_eq!(got, code, "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.starts_with("ckpt: "), "{arguments:?}: {text}");
    }
}

#[test]
fn an_obstacle_is_the_answer_of_check() {
    let output = output(CKPT, &["check", NOBODY]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains(NOBODY));
    assert!(output.stderr.is_empty());
}

#[test]
fn every_option_is_explained() {
    for command in [
        "attach",
        "run",
        "restore",
        "check",
        "inspect",
        "verify",
        "completions",
        "man",
    ] {
        let help = success(&[command, "--help"]);
        assert!(help.contains("Example"), "{command} has no example");
    }
    assert!(success(&["--help"]).contains("Exit codes"));
    assert!(success(&["--version"]).starts_with("ckpt "));
}

#[test]
fn completions_are_scripts() {
    for (shell, mark) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef"),
        ("fish", "complete -c"),
    ] {
        let script = success(&["completions", shell]);
        for word in [mark, "attach", "--interval", "restore"] {
            let short = word.trim_start_matches("--");
            assert!(
                script.contains(word) || script.contains(short),
                "{shell} lacks {word}"
            );
        }
    }
    let script = success(&["completions", "bash"]);
    let parsed = Command::new("bash").args(["-n", "-c", &script]).status();
    match parsed {
        Ok(status) => assert!(status.success()),
        Err(error) => eprintln!("SKIPPED: the syntax of the completions, no bash here: {error}"),
    }
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let directory = std::env::temp_dir().join(format!("ckpt-man-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    success(&["man", directory.to_str().unwrap()]);
    for name in [
        "ckpt",
        "restore",
        "ckpt-attach",
        "ckpt-run",
        "ckpt-verify",
        "ckpt-inspect",
    ] {
        let page = std::fs::read_to_string(directory.join(format!("{name}.1"))).unwrap();
        assert!(
            page.contains(".TH ") && page.contains("SH SYNOPSIS"),
            "{name}"
        );
    }
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(success(&["man"]).contains(".TH ckpt"));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let mut command = Command::new(CKPT);
    command
        .args(["completions", "bash"])
        .stdout(write)
        .stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn features_are_listed_as_text_and_json() {
    let text = success(&["check"]);
    assert!(text.contains("PTRACE_SEIZE"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&success(&["check", "--json"])).unwrap();
    assert_eq!(json["possible"], true);
    let first = &json["features"][0];
    assert!(
        first["name"].is_string() && first["available"].is_boolean(),
        "{first}"
    );
}
