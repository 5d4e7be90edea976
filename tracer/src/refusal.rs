//! Why the kernel refuses to attach although the user ids match, and the remedy.

use crate::Pid;
use crate::capabilities::{Held, Use};
use crate::proc::ProcRoot;

/// Why a process of the same user may not be traced, and the remedy: two halves of a sentence.
#[must_use]
pub fn why(pid: Pid) -> (String, &'static str) {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let scope = scope.trim().parse().unwrap_or(0);
    let me = Pid(std::process::id() as i32);
    match (context(me), context(pid)) {
        // With the capability, only the last of Yama's scopes forbids it otherwise.
        (Some(ours), Some(theirs))
            if scope < 3 && ours != "unconfined" && Held::now().allows(Use::Trace) =>
        {
            of_contexts(&ours, &theirs)
        }
        _ => of_scope(scope),
    }
}

/// The security context of a process: SELinux's context, AppArmor's profile.
fn context(pid: Pid) -> Option<String> {
    let text = std::fs::read(ProcRoot::default().process(pid).join("attr/current")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let text = text.trim_end_matches(['\0', '\n']);
    (!text.is_empty()).then(|| text.to_owned())
}

fn of_contexts(ours: &str, theirs: &str) -> (String, &'static str) {
    (
        format!("you run as {ours} and it as {theirs}, and the security policy forbids it"),
        "run ckpt in a context that may trace it (aa-exec, runcon), or have the policy allow it \
         (ptrace)",
    )
}

/// The scopes of Yama, see Documentation/admin-guide/LSM/Yama.rst.
fn of_scope(scope: u32) -> (String, &'static str) {
    let setting = |rest: &str| format!("kernel.yama.ptrace_scope is {scope}, {rest}");
    match scope {
        0 => (
            "it changed its privileges or made itself undumpable".to_owned(),
            "run ckpt as root",
        ),
        1 => (
            setting("so that only its parents may"),
            "start the program with `ckpt run`, run ckpt as root, or have the setting lowered",
        ),
        2 => (
            setting(&format!("so that only {} allows it", Use::Trace)),
            "run ckpt as root",
        ),
        _ => (
            setting("which forbids it to all until the next boot"),
            "boot with a lower setting",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{of_contexts, of_scope};

    #[test]
    fn both_contexts_are_named() {
        let (reason, remedy) = of_contexts("docker-default (enforce)", "u:r:job_t:s0");
        assert_eq!(
            reason,
            "you run as docker-default (enforce) and it as u:r:job_t:s0, and the security policy \
             forbids it"
        );
        assert!(remedy.contains("runcon"));
    }

    #[test]
    fn each_scope_has_the_remedy_that_helps() {
        let said = |scope| {
            let (reason, remedy) = of_scope(scope);
            format!("{reason}; {remedy}")
        };
        assert_eq!(
            said(0),
            "it changed its privileges or made itself undumpable; run ckpt as root"
        );
        assert_eq!(
            said(1),
            "kernel.yama.ptrace_scope is 1, so that only its parents may; start the program with \
             `ckpt run`, run ckpt as root, or have the setting lowered"
        );
        assert_eq!(
            said(2),
            "kernel.yama.ptrace_scope is 2, so that only CAP_SYS_PTRACE allows it; run ckpt as root"
        );
        assert_eq!(
            said(3),
            "kernel.yama.ptrace_scope is 3, which forbids it to all until the next boot; boot with a lower \
             setting"
        );
    }
}
