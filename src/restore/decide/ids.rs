//! The job's own user namespace: its owner, and the writer of its id maps.

use std::path::Path;

use ckpt_tracer::Pid;
use ckpt_tracer::proc::ProcRoot;
use nix::unistd::{User, getegid, geteuid};

use crate::error::{Error, Obstacle, Result};
use crate::isolate::{IdMaps, Owner, Spec};
use crate::objects::Snapshot;
use crate::objects::namespaces::Extent;
use crate::objects::namespaces::{UserNamespace, parse_map};

/// The file that assigns ids to users, the program that maps them, and the kind of ids.
const USERS: [&str; 3] = ["/etc/subuid", "newuidmap", "user"];
const GROUPS: [&str; 3] = ["/etc/subgid", "newgidmap", "group"];

/// The namespace to create.
///
/// # Errors
/// [`Error::Refused`] if we may not map the ids.
pub(super) fn decide(user: &UserNamespace, snapshot: &Snapshot) -> Result<Spec> {
    let obstacles = match geteuid().is_root() {
        true => not_mapped_here(user),
        false if is_one(user) => return Ok(for_one(user)),
        false => not_given(user),
    };
    if !obstacles.is_empty() {
        return Err(Error::Refused(obstacles));
    }
    Ok(match geteuid().is_root() {
        true => by_root(user, snapshot),
        false => by_helpers(user),
    })
}

fn is_one(user: &UserNamespace) -> bool {
    matches!((&user.uids[..], &user.gids[..]), ([(_, _, 1)], [(_, _, 1)]))
}

/// The calling user takes the place of the previous one.
fn for_one(user: &UserNamespace) -> Spec {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    Spec {
        ids: Some(IdMaps::one((user.uids[0].0, uid), (user.gids[0].0, gid))),
        ..Spec::default()
    }
}

fn maps(user: &UserNamespace) -> IdMaps {
    IdMaps {
        uids: user.uids.clone(),
        gids: user.gids.clone(),
        groups_are_fixed: user.groups_are_fixed,
        without_groups: !user.groups_are_fixed && user.inherited_groups.is_empty(),
        by_helpers: false,
    }
}

/// Root creates it for its previous owner.
fn by_root(user: &UserNamespace, snapshot: &Snapshot) -> Spec {
    let uid = user.owner.unwrap_or_else(|| someone(&user.uids));
    let groups = match user.groups_are_fixed {
        true => &snapshot.processes[0].threads[0].credentials.groups,
        false => &user.inherited_groups,
    };
    let owner = Owner {
        uid,
        gid: if uid == 0 { 0 } else { someone(&user.gids) },
        groups: groups.clone(),
    };
    Spec {
        ids: Some(maps(user)),
        owner: (uid != 0 || !owner.groups.is_empty()).then_some(owner),
        ..Spec::default()
    }
}

/// The outer id with a line of its own, as for the creator of such a namespace, or the first one.
fn someone(map: &[Extent]) -> u32 {
    let own = map.iter().find(|(_, _, count)| *count == 1);
    own.or(map.first()).map_or(0, |(_, outside, _)| *outside)
}

/// An ordinary user takes the place of the previous owner; the other ids are unchanged.
fn by_helpers(user: &UserNamespace) -> Spec {
    let (uids, gids) = ours(user);
    let ids = IdMaps {
        uids,
        gids,
        by_helpers: true,
        ..maps(user)
    };
    Spec {
        ids: Some(ids),
        ..Spec::default()
    }
}

/// The maps with our ids in place of the previous owner's.
fn ours(user: &UserNamespace) -> (Vec<Extent>, Vec<Extent>) {
    let replaced = |map: &[Extent], was: u32, me: u32| -> Vec<Extent> {
        let one = |&(inside, outside, count): &Extent| match (outside, count) {
            (outside, 1) if outside == was => (inside, me, 1),
            _ => (inside, outside, count),
        };
        map.iter().map(one).collect()
    };
    let owner = user.owner.unwrap_or_else(|| someone(&user.uids));
    (
        replaced(&user.uids, owner, geteuid().as_raw()),
        replaced(&user.gids, someone(&user.gids), getegid().as_raw()),
    )
}

/// Ids that our own user namespace does not map, even for root.
fn not_mapped_here(user: &UserNamespace) -> Vec<Obstacle> {
    let me = ProcRoot::default().process(Pid::own());
    let lacking = |file: &str, map: &[Extent], what: &str| {
        let here = parse_map(&me.read(file).ok()?);
        let given: Vec<(u32, u32)> = here.iter().map(|(inside, _, n)| (*inside, *n)).collect();
        let missing = map.iter().find(|e| !covers(&given, (e.1, e.2)))?;
        Some(Obstacle::new(
            "the user namespace of the job",
            format!(
                "has {what} ids that your own has not: {}",
                range((missing.1, missing.2))
            ),
            "restore it outside of that one",
        ))
    };
    let uids = lacking("uid_map", &user.uids, "user");
    uids.into_iter()
        .chain(lacking("gid_map", &user.gids, "group"))
        .collect()
}

/// Ids that an ordinary user may not map, and missing programs for that.
fn not_given(user: &UserNamespace) -> Vec<Obstacle> {
    let (uids, gids) = ours(user);
    let me = geteuid().as_raw();
    let name = User::from_uid(geteuid())
        .ok()
        .flatten()
        .map(|user| user.name);
    let mut obstacles = Vec::new();
    for (map, own, [file, program, what]) in [(uids, me, USERS), (gids, getegid().as_raw(), GROUPS)]
    {
        let wanted: Vec<(u32, u32)> = map
            .iter()
            .map(|(_, outside, count)| (*outside, *count))
            .filter(|range| *range != (own, 1))
            .collect();
        if !wanted.is_empty() && !installed(program) {
            obstacles.push(Obstacle::new(
                "the user namespace of the job",
                format!("has several {what} ids, and you have no {program} to map them with"),
                "install the package uidmap, or restore as root",
            ));
        }
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let given = given(&text, me, name.as_deref());
        let missing: Vec<&(u32, u32)> = wanted.iter().filter(|w| !covers(&given, **w)).collect();
        if missing.is_empty() || asks_elsewhere() {
            continue;
        }
        let who = name.clone().unwrap_or_else(|| me.to_string());
        let lines = missing
            .iter()
            .map(|(first, count)| format!("{who}:{first}:{count}"));
        let ranges = missing.iter().map(|range_| range(**range_));
        obstacles.push(Obstacle::new(
            "the user namespace of the job",
            format!(
                "has {what} ids that {file} does not give to you: {}",
                ranges.collect::<Vec<_>>().join(", ")
            ),
            format!(
                "restore as root, or let root add to {file}: {}",
                lines.collect::<Vec<_>>().join(", ")
            ),
        ));
    }
    obstacles
}

fn range((first, count): (u32, u32)) -> String {
    match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", u64::from(first) + u64::from(count) - 1),
    }
}

/// The ids that a file assigns to a user, by name or number: subuid(5).
fn given(text: &str, uid: u32, name: Option<&str>) -> Vec<(u32, u32)> {
    let line = |line: &str| {
        let mut fields = line.trim().split(':');
        let who = fields.next()?;
        (Some(who) == name || who == uid.to_string()).then_some(())?;
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Whether one of the ranges covers all of another, as newuidmap(1) requires.
fn covers(given: &[(u32, u32)], (first, count): (u32, u32)) -> bool {
    let end = |(first, count): (u32, u32)| u64::from(first) + u64::from(count);
    given
        .iter()
        .any(|g| g.0 <= first && end((first, count)) <= end(*g))
}

/// Whether ids are assigned by another source than files, which only the helper programs query (nsswitch.conf(5),
/// subid).
fn asks_elsewhere() -> bool {
    let text = std::fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default();
    text.lines()
        .any(|line| line.trim_start().starts_with("subid:"))
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| Path::new(&dir).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_given_ids_by_name_or_number() {
        let text = "root:1:5\nme:100000:65536\n# me:7:7\n1000:300000:10\nbroken\nme:x:1\n";
        let given = given(text, 1000, Some("me"));
        assert_eq!(given, [(100_000, 65536), (300_000, 10)]);
        assert!(covers(&given, (100_000, 65536)) && covers(&given, (165_535, 1)));
        assert!(!covers(&given, (165_536, 1)) && !covers(&given, (u32::MAX, u32::MAX)));
        assert_eq!(range((5, 1)), "5");
        assert_eq!(range((100_000, 65536)), "100000-165535");
    }
}
