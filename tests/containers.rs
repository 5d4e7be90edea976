//! Jobs in a container such as docker makes by default, as root and as a user in it.

mod common;

use common::container::{Container, contained};
use common::{Case, attach, ckpt, restored, start, until, Ended, run, restore_cmd};

fn explore(case: &Case) {
    use std::process::Command;
    let sh = |name: &str, script: &str| {
        let o = run(case, Command::new("bash").args(["-c", script]).env("C", common::tool::CKPT).env("R", common::tool::RESTORE));
        eprintln!("== {name}: {:?}\n{}{}", o.ended, o.stdout, o.stderr);
    };
    sh("status", "grep -E 'Cap|Secc|NoNew' /proc/self/status; cat /proc/1/status | grep -E 'Cap|Secc|Uid'; unshare -p true; cat /proc/sys/kernel/ns_last_pid; echo 5 > /proc/sys/kernel/ns_last_pid; ls /proc/acpi; touch xx");
    sh("sleep", "sleep 1000 & p=$!; sleep 0.2; $C check $p; $C attach $p -o a.ckpt; $C attach $p -o a.ckpt; cat /proc/$p/status | grep -E 'Umask|FDSize|State'; ls -l /proc/$p/fd; kill -9 $p");
    sh("python", "python3 -c 'import threading,time; [threading.Thread(target=time.sleep,args=(100,),daemon=True).start() for i in range(3)]; time.sleep(1000)' & p=$!; sleep 0.5; $C check $p; $C attach $p -o b.ckpt; kill -9 $p");
    sh("pipeline", "bash -c 'while sleep 0.1; do echo x; done | cat | wc' & p=$!; sleep 0.5; $C check $p; $C attach $p -o c.ckpt; kill -9 $p");
    sh("restore", "$R --dry-run a.ckpt | tail -1; $R a.ckpt");
    sh("run", "$C run --interval 1s -- sleep 2");
    panic!("look");
}

#[test]
fn explore_root() {
    contained("explore_root", Container::root(), explore);
}
#[test]
fn explore_user() {
    contained("explore_user", Container::user(), explore);
}
