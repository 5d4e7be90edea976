//! What security modules say of a task. No module with contexts may be at work where this runs, so the
//! image gets contexts that the kernel does not know.

use crate::common;
use crate::common::edit::edited;
use crate::common::fixture::killed;
use crate::common::look::assert_no_process_left;
use crate::common::tool::restored;
use crate::common::{ckpt, isolated, restore_cmd, run};
use ckpt::objects::security::Label;

/// A context that cannot be set: the job continues without it, and a warning names both.
#[test]
fn a_context_that_is_refused() {
    isolated("a_context_that_is_refused", |case| {
        let (mut target, image) = killed(case, "threads");
        let label = |value: &str| Label {
            attribute: "current".into(),
            value: value.into(),
        };
        let image = edited(case, &image, "other.ckpt", |snapshot| {
            for thread in &mut snapshot.processes[0].threads {
                thread.security = vec![label("no_u:such_r:context_t:s0")];
            }
        });
        let shown = ckpt(case, ["inspect".as_ref(), image.as_os_str()]);
        let line = "current=no_u:such_r:context_t:s0";
        assert!(shown.ok().contains(line), "{shown:?}");
        let out = run(
            case,
            restore_cmd(&image, &["--detach"]).current_dir(case.dir()),
        );
        let pid: i32 = out.ok().trim().parse().expect("it is a pid");
        let warnings = out.stderr.lines().filter(|l| l.contains("warning: "));
        let warnings: Vec<&str> = warnings
            .filter(|l| l.contains("security attribute"))
            .collect();
        let [warning] = &warnings[..] else {
            panic!("one warning is due: {out:?}");
        };
        assert!(
            warning.contains("was no_u:such_r:context_t:s0 and is "),
            "{warning}"
        );
        target.continued_by(common::Job::of(pid));
        target.passes();
        assert_no_process_left();
    });
}

/// What is as it was is not asked for.
#[test]
fn nothing_is_said_of_what_is_the_same() {
    isolated("nothing_is_said_of_what_is_the_same", |case| {
        let (mut target, image) = killed(case, "threads");
        let before = case.dir().read_dir().expect("it is there").count();
        target.continued_by(restored(case, &image, &[]));
        // A warning would have left a file with it.
        assert_eq!(case.dir().read_dir().expect("it is there").count(), before);
        target.passes();
        assert_no_process_left();
    });
}
