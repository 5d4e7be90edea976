//! The ids of a user namespace: user_namespaces(7), newuidmap(1).

use std::io;
use std::process::Command;

use nix::unistd::{Gid, Uid, setresgid, setresuid};

use super::work::keep_exit_codes;
use crate::objects::namespaces::Extent;

/// Id mappings of a user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// `/proc/PID/uid_map`.
    pub uids: Vec<Extent>,
    /// `/proc/PID/gid_map`.
    pub gids: Vec<Extent>,
    /// setgroups(2) is denied, as required when the map is written without privilege.
    pub groups_are_fixed: bool,
    /// Supplementary groups are dropped, since they are the creator's.
    pub without_groups: bool,
    /// The maps are written by newuidmap and newgidmap: an ordinary user may map only its own ids.
    pub by_helpers: bool,
}

impl IdMaps {
    /// Maps one user and one group, which needs no privilege.
    pub fn one((uid, outer_uid): (u32, u32), (gid, outer_gid): (u32, u32)) -> Self {
        Self {
            uids: vec![(uid, outer_uid, 1)],
            gids: vec![(gid, outer_gid, 1)],
            groups_are_fixed: true,
            ..Self::default()
        }
    }

    /// Writes them from outside for the namespace of that process.
    pub(super) fn write(&self, pid: i32) -> io::Result<()> {
        if self.groups_are_fixed {
            std::fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
        }
        if self.by_helpers {
            help("newuidmap", pid, &self.uids)?;
            return help("newgidmap", pid, &self.gids);
        }
        std::fs::write(format!("/proc/{pid}/uid_map"), lines(&self.uids))?;
        std::fs::write(format!("/proc/{pid}/gid_map"), lines(&self.gids))
    }

    /// Sets mapped ids in the creator of the namespace, whose ids `uid` and `gid` outside may be unmapped.
    pub(super) fn settle(&self, uid: u32, gid: u32) -> io::Result<()> {
        let new_gid = instead_of_unmapped(&self.gids, gid);
        let new_uid = instead_of_unmapped(&self.uids, uid);
        if self.without_groups {
            ckpt_sys::credentials::set_groups(&[])?;
        }
        if let Some(gid) = new_gid.map(Gid::from_raw) {
            setresgid(gid, gid, gid)?;
        }
        if let Some(uid) = new_uid.map(Uid::from_raw) {
            setresuid(uid, uid, uid)?;
        }
        // Otherwise our files in /proc would be root's from now on.
        ckpt_sys::prctl::make_dumpable();
        Ok(())
    }
}

fn lines(map: &[Extent]) -> String {
    let lines = map.iter().map(|(i, o, n)| format!("{i} {o} {n}\n"));
    lines.collect()
}

/// An id inside for an unmapped one: root's if it is mapped.
fn instead_of_unmapped(map: &[Extent], outer: u32) -> Option<u32> {
    if map
        .iter()
        .any(|(_, o, n)| (*o..o.saturating_add(*n)).contains(&outer))
    {
        return None;
    }
    map.iter().map(|(inside, _, _)| *inside).min()
}

/// Runs newuidmap(1) or newgidmap(1).
fn help(program: &str, pid: i32, map: &[Extent]) -> io::Result<()> {
    keep_exit_codes();
    let mut command = Command::new(program);
    command.arg(pid.to_string());
    for (inside, outside, count) in map {
        command.args([inside, outside, count].map(u32::to_string));
    }
    let out = command.output().map_err(|error| {
        io::Error::other(format!("{program} (package uidmap) cannot be run: {error}"))
    })?;
    match out.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(
            String::from_utf8_lossy(&out.stderr)
                .trim()
                .replace('\n', "; "),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_leads_nowhere_becomes_another_one() {
        let map = [(1, 100_000, 65536), (0, 1000, 1)];
        assert_eq!(instead_of_unmapped(&map, 1000), None);
        assert_eq!(instead_of_unmapped(&map, 100_007), None);
        assert_eq!(instead_of_unmapped(&map, 0), Some(0));
        assert_eq!(instead_of_unmapped(&map, 165_536), Some(0));
        assert_eq!(lines(&map), "1 100000 65536\n0 1000 1\n");
    }
}
