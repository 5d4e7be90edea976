//! The capabilities that we hold.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{HeldIn, Use};
use crate::Pid;
use crate::proc::status::read_status;

/// Our effective capabilities, and the user namespaces in which they count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    effective: u64,
    in_first: bool,
}

impl Held {
    /// No capability, in the initial user namespace.
    pub const NONE: Held = Held {
        effective: 0,
        in_first: true,
    };

    /// Reads our own.
    #[must_use]
    pub fn now() -> Self {
        let own = read_status(Pid::own());
        Self {
            effective: own.map_or(0, |status| status.capabilities.effective),
            in_first: is_in_first_user_namespace(Path::new("/proc/self")),
        }
    }

    /// Those of a process in our user namespace with this effective set.
    #[must_use]
    pub fn with(self, effective: u64) -> Self {
        Self { effective, ..self }
    }

    /// The effective set, bit N for capability N.
    #[must_use]
    pub fn effective(self) -> u64 {
        self.effective
    }

    /// Whether we hold what a use requires, in the user namespace that it requires.
    #[must_use]
    pub fn allows(self, of: Use) -> bool {
        let row = of.row();
        row.takes.are_in(self.effective)
            && match row.held_in {
                // A target is in our user namespace or a descendant: otherwise we enter its own first.
                HeldIn::Own | HeldIn::Target => true,
                HeldIn::First => self.in_first,
                HeldIn::Owner(kind) => owner_is_ours(kind),
            }
    }
}

/// Whether the capabilities of a process (`/proc/PID`) count for the whole machine: only in the initial user
/// namespace (user_namespaces(7)).
pub fn is_in_first_user_namespace(process: &Path) -> bool {
    /// `PROC_USER_INIT_INO`, include/linux/proc_ns.h.
    const FIRST: u64 = 0xEFFF_FFFD;
    fs::metadata(process.join("ns/user")).is_ok_and(|meta| meta.ino() == FIRST)
}

/// Whether our namespace of a kind is owned by our user namespace or a descendant, where our capabilities count:
/// otherwise the kernel does not show the owner (`ns_get_owner`, kernel/user_namespace.c).
fn owner_is_ours(kind: &str) -> bool {
    let namespace = fs::File::open(format!("/proc/self/ns/{kind}"));
    namespace.is_ok_and(|namespace| ckpt_sys::namespaces::user_namespace(namespace).is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::Capability;
    use super::*;

    #[test]
    fn capabilities_of_another_user_namespace_do_not_count() {
        let all = Held {
            effective: u64::MAX,
            in_first: true,
        };
        let elsewhere = Held {
            in_first: false,
            ..all
        };
        assert!(all.allows(Use::HardLimits) && !elsewhere.allows(Use::HardLimits));
        assert!(elsewhere.allows(Use::RootDirectory));
        let none = all.with(0);
        assert!(Use::ALL.iter().all(|of| !none.allows(*of)));
        let one = all.with(Capability::SysResource.bit());
        assert!(one.allows(Use::HardLimits) && !one.allows(Use::RootDirectory));
    }

    #[test]
    fn ours_are_those_that_status_shows() {
        let text = fs::read_to_string("/proc/self/status").expect("we run");
        let line = text.lines().find_map(|l| l.strip_prefix("CapEff:"));
        let set = u64::from_str_radix(line.expect("it is there").trim(), 16);
        assert_eq!(Held::now().effective(), set.expect("it is a number"));
    }
}
