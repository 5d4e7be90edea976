//! Process groups that reach beyond the job.

use std::fs;
use std::process::Command;

use crate::common::job::reap_orphans;
use crate::common::look::{children, states};
use crate::common::{Ended, ckpt, isolated, restored, start, until};

/// A zombie in its parent's process group, which is that of a shell outside the job: both come back in the group of
/// `restore`, which may have no id in the pid namespace.
#[test]
fn a_zombie_in_a_group_of_the_outside() {
    isolated("a_zombie_in_a_group_of_the_outside", |case| {
        case.needs_program("perl", "perl");
        let mut command = Command::new("setsid");
        let line = "perl -e 'if (!($p = fork)) { exit 3 } sleep 1 until -e q(go); waitpid($p, 0); exit $? >> 8' & wait";
        command.args(["sh", "-c", line]).current_dir(case.dir());
        let shell = start(&mut command, &case.path("perl.log"));
        let zombie = |parent: i32| {
            let mut children = children(parent).into_iter();
            children.find(|pid| states(*pid).iter().any(|(_, state)| *state == 'Z'))
        };
        let (root, ended) = until("a zombie", || {
            let mut below = children(shell.pid).into_iter();
            below.find_map(|pid| Some((pid, zombie(pid)?)))
        });
        let group = |pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there");
            let (_, behind) = stat.rsplit_once(')').expect("the name is in parentheses");
            behind.split_whitespace().nth(2).map(str::to_owned)
        };
        assert_eq!(group(ended), group(root));
        assert_ne!(group(root), Some(root.to_string()));
        let target = root.to_string();
        let arguments = ["attach", &target, "-o", "job.ckpt", "--rehearse", "--kill"];
        ckpt(case, arguments).ok();
        shell.kill();
        // The shell may have been killed before it waited for the root.
        reap_orphans(&[root, ended]);
        let mut job = restored(case, &case.path("job.ckpt"), &[]);
        assert_eq!(zombie(job.pid), Some(ended));
        assert_eq!(group(ended), group(job.pid));
        fs::write(case.path("go"), "").expect("the directory is ours");
        assert_eq!(until("its end", || job.ended()), Ended::Exited(3));
    });
}
