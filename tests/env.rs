//! Jobs of one image that are told apart by `restore --env`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common;
use crate::common::look::assert_no_process_left;
use crate::common::refused::FAILED;
use crate::common::{Ended, Job, attach, isolated, restore_cmd, restored, run, start, until};

/// Each clone has its own values in one and the same file; alone, they replace that file.
#[test]
fn values() {
    isolated("values", |case| {
        let file = case.path("job.env");
        let program = "trap 'cat $CKPT_RESTORE_ENV; exit 7' TERM; echo begun
                       while :; do sleep 0.01; done";
        let mut command = Command::new("bash");
        command.args(["-c", program]).env("CKPT_RESTORE_ENV", &file);
        let log = case.path("job.log");
        let mut job = start(command.current_dir(case.dir()), &log);
        until("it to begin", || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            text.contains("begun").then_some(())
        });
        let (image, _) = attach(case, job.pid, "job.ckpt", &["--kill"]);
        common::rounds::gone(&mut job);
        fs::write(&file, "mine\n").expect("the test's directory is writable");
        let clone = |number: u32, place: &str| {
            let output = case.path(&format!("{number}.log"));
            fs::write(&output, "").expect("the test's directory is writable");
            let fd = format!("1={}", output.display());
            let seed = format!("SEED={number}");
            let options = [
                "--pids", place, "--env", &seed, "--env", "A=b c", "--fd", &fd,
            ];
            (restored(case, &image, &options), output, seed)
        };
        let told = |(mut job, output, seed): (Job, PathBuf, String)| {
            job.signal(Signal::SIGTERM);
            assert_eq!(until("its end", || job.ended()), Ended::Exited(7));
            let text = fs::read_to_string(output).expect("it was written");
            assert_eq!(text, format!("{seed}\nA=b c\n"));
        };
        let clones = [1, 2, 3].map(|number| clone(number, "namespace"));
        assert_eq!(fs::read_to_string(&file).expect("it is there"), "mine\n");
        clones.into_iter().for_each(told);
        told(clone(4, "keep"));
        assert_eq!(
            fs::read_to_string(&file).expect("it is there"),
            "SEED=4\nA=b c\n"
        );
        let before = fs::read_dir(case.dir()).expect("it is there").count();
        let mut command = restore_cmd(&image, &["--pids", "keep", "--env", "SEED=5"]);
        let out = run(case, command.env("CKPT_FAULT", "restore-threads"));
        out.refused(FAILED, &["fault injected"]);
        // Its messages are one file more.
        let after = fs::read_dir(case.dir()).expect("it is there").count();
        assert_eq!(after, before + 1);
        assert_no_process_left();
    });
}
