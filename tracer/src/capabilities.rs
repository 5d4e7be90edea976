//! Capabilities (capabilities(7)): one table of every use.
//!
//! Code that depends on a capability checks a [`Use`] here, and messages name the capability from here. Only held
//! capabilities are used: no program of this project is set-uid or has file capabilities.

mod held;
mod table;

use std::fmt;

pub use held::{Held, is_in_first_user_namespace};
pub use table::Use;

macro_rules! capabilities {
    ($($variant:ident = $number:literal $name:literal,)*) => {
        /// The capabilities in use, by number (linux/capability.h).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Capability { $($variant = $number,)* }

        impl Capability {
            /// Its name as in capabilities(7).
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

capabilities!(
    Chown = 0 "CAP_CHOWN",
    DacOverride = 1 "CAP_DAC_OVERRIDE",
    DacReadSearch = 2 "CAP_DAC_READ_SEARCH",
    Fowner = 3 "CAP_FOWNER",
    Setgid = 6 "CAP_SETGID",
    Setuid = 7 "CAP_SETUID",
    Setpcap = 8 "CAP_SETPCAP",
    NetBindService = 10 "CAP_NET_BIND_SERVICE",
    NetAdmin = 12 "CAP_NET_ADMIN",
    IpcLock = 14 "CAP_IPC_LOCK",
    SysRawio = 17 "CAP_SYS_RAWIO",
    SysChroot = 18 "CAP_SYS_CHROOT",
    SysPtrace = 19 "CAP_SYS_PTRACE",
    SysAdmin = 21 "CAP_SYS_ADMIN",
    SysNice = 23 "CAP_SYS_NICE",
    SysResource = 24 "CAP_SYS_RESOURCE",
    SysTime = 25 "CAP_SYS_TIME",
    Lease = 28 "CAP_LEASE",
    AuditControl = 30 "CAP_AUDIT_CONTROL",
    CheckpointRestore = 40 "CAP_CHECKPOINT_RESTORE",
);

impl Capability {
    /// Its bit in a set, as `/proc/PID/status` prints sets.
    pub const fn bit(self) -> u64 {
        1 << self as u32
    }
}

/// The user namespace in which a capability must be held (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldIn {
    /// The initial one (`capable`, kernel/capability.c). The root of another user namespace, as in a rootless
    /// container, does not hold it there.
    First,
    /// Ours (`ns_capable(current_user_ns(), …)`).
    Own,
    /// That of the target process.
    Target,
    /// The owner of our namespace of this kind (`pid`, `ipc` …).
    Owner(&'static str),
}

impl fmt::Display for HeldIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeldIn::First => f.write_str("the initial one"),
            HeldIn::Own => f.write_str("yours"),
            HeldIn::Target => f.write_str("the target's"),
            HeldIn::Owner(kind) => write!(f, "that of the {kind} namespace"),
        }
    }
}

/// Which capabilities a use requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Any one of them.
    Any(&'static [Capability]),
    /// All of them.
    All(&'static [Capability]),
}

impl Takes {
    /// All that are named.
    pub fn capabilities(self) -> &'static [Capability] {
        match self {
            Takes::Any(all) | Takes::All(all) => all,
        }
    }

    /// Whether a set contains what is required.
    pub fn are_in(self, set: u64) -> bool {
        let has = |c: &Capability| set & c.bit() != 0;
        match self {
            Takes::Any(all) => all.iter().any(has),
            Takes::All(all) => all.iter().all(has),
        }
    }
}

/// `CAP_A or CAP_B`, `CAP_A and CAP_B`.
impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = match self {
            Takes::Any(_) => " or ",
            Takes::All(_) => " and ",
        };
        let names: Vec<_> = self.capabilities().iter().map(|c| c.name()).collect();
        f.write_str(&names.join(between))
    }
}

/// The table row of a use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Required capabilities.
    pub takes: Takes,
    /// Where they must be held.
    pub held_in: HeldIn,
    /// Purpose.
    pub what: &'static str,
    /// The kernel function that checks, and its file.
    pub kernel: &'static str,
    /// What happens without them.
    pub without: &'static str,
}

/// The required capabilities, for messages.
impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.row().takes.fmt(f)
    }
}

/// Names of capabilities in the order of their numbers, see capabilities(7).
const NAMES: &str = "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap \
    linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner \
    sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice \
    sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap \
    mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf \
    checkpoint_restore";

/// A set for display: `all`, `none`, `all but X`, or the names.
#[must_use]
pub fn set_names(set: u64) -> String {
    let all = (1 << NAMES.split(' ').count()) - 1;
    let names = |set: u64| {
        let named = NAMES
            .split(' ')
            .enumerate()
            .filter(|(bit, _)| set >> bit & 1 == 1);
        named.map(|(_, name)| name).collect::<Vec<_>>().join(", ")
    };
    let missing = all & !set;
    match set & all {
        0 => "none".to_owned(),
        _ if missing == 0 => "all".to_owned(),
        _ if missing.count_ones() < 8 => format!("all but {}", names(missing)),
        _ => names(set),
    }
}

/// The table for the documentation.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from(
        "| Capability | Held in the user namespace | For | Without it | The kernel's rule |\n|---|---|---|---|---|\n",
    );
    for of in Use::ALL {
        let row = of.row();
        let (takes, held_in, kernel) = (row.takes, row.held_in, row.kernel);
        text += &format!(
            "| {takes} | {held_in} | {} | {} | {kernel} |\n",
            row.what, row.without
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_joined_by_and_or_or() {
        assert_eq!(
            Use::ChoosePids.to_string(),
            "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"
        );
        assert_eq!(Use::OwnClocks.to_string(), "CAP_SYS_ADMIN and CAP_SYS_TIME");
        let both = Use::OwnClocks.row().takes;
        assert!(!both.are_in(Capability::SysAdmin.bit()));
        assert!(both.are_in(Capability::SysAdmin.bit() | Capability::SysTime.bit()));
        assert!(Use::ChoosePids.row().takes.are_in(1 << 40));
    }

    #[test]
    fn every_row_says_something() {
        for of in Use::ALL {
            let row = of.row();
            assert!(!row.takes.capabilities().is_empty());
            for text in [row.what, row.kernel, row.without] {
                assert!(!text.is_empty() && !text.contains(['|', '\n']), "{text}");
            }
            assert!(
                row.kernel.contains('(') && row.kernel.contains('/'),
                "{}",
                row.kernel
            );
        }
    }

    #[test]
    fn sets_read_well() {
        assert_eq!(set_names(0), "none");
        assert_eq!(set_names(u64::MAX), "all");
        assert_eq!(set_names(0x0000_01ff_feff_ffff), "all but sys_resource");
        assert_eq!(
            set_names(Capability::CheckpointRestore.bit() | 1),
            "chown, checkpoint_restore"
        );
    }
}
