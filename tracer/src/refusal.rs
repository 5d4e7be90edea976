//! Why the kernel lets nobody attach although the user is the right one, and what helps.

use crate::capabilities::Use;

/// Why a process of one's own may not be traced, and the remedy: two halves of a sentence.
#[must_use]
pub fn why() -> (String, &'static str) {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    of_scope(scope.trim().parse().unwrap_or(0))
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
            setting("which allows it to no one until the next boot"),
            "boot with a lower setting",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::of_scope;

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
            "kernel.yama.ptrace_scope is 3, which allows it to no one until the next boot; boot \
             with a lower setting"
        );
    }
}
