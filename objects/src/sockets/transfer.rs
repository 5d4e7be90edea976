//! What follows when every description is open: unread messages, which may carry any of them, then state that would
//! have prevented sending them.

use super::filter;
use super::options::{self, SocketOption};
use super::peers::Ucred;
use super::plan::{Creation, Job};
use super::rebuild::{dial, disconnect};
use super::unix::{Message, Role, Style, sockaddr};
use super::urgent::Urgent;
use crate::Snapshot;
use crate::files::Staging;
use crate::files::kind::OpenFile;
use crate::plan::Builder;

/// Messages, connections of datagram sockets, shutdowns, options, files' modes and owners.
pub fn finish(snapshot: &Snapshot, staging: Staging, plan: &mut Builder) {
    let job = Job::of(snapshot, staging);
    if job.all.is_empty() {
        return;
    }
    send_all(&job, staging, plan);
    for (at, (_, socket)) in job.all.iter().enumerate() {
        if socket.reset {
            // The peer closes with unread data.
            let data = plan.data(b"!");
            let args = [job.at(at) as u64, data, 1, flags(), 0, 0];
            plan.expect(libc::SYS_sendto, &args, 1, || {
                format!("the {}", socket.label())
            });
        }
    }
    connect_datagrams(&job, plan);
    for (at, (_, socket)) in job.all.iter().enumerate() {
        let number = job.at(at);
        let by_the_peer = socket.style != Style::Datagram
            && socket.peer().is_some_and(|peer| peer >= super::unix::GHOST);
        if (1..=3).contains(&socket.shutdown) && !by_the_peer {
            let args = [number as u64, u64::from(socket.shutdown) - 1];
            plan.syscall(libc::SYS_shutdown, &args, || {
                format!("the {}", socket.label())
            });
        }
        filter::rebuild(&socket.filter, number, &socket.label(), plan);
        for option in &socket.options {
            option.rebuild(number, &socket.label(), plan);
        }
    }
    rebuild_files(&job, plan);
}

fn flags() -> u64 {
    // A plan that cannot continue must fail rather than wait.
    (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64
}

fn send_all(job: &Job<'_>, staging: Staging, plan: &mut Builder) {
    let mut bytes = vec![(0usize, 0usize); job.all.len()];
    let messages = || job.all.iter().flat_map(|(_, s)| &s.queue);
    for message in messages() {
        if let Some(from) = job.position(message.from) {
            bytes[from].0 += message.data.len() + 1024;
            bytes[from].1 += 1;
        }
    }
    // Below this every sender has room.
    let much = |bytes: &(usize, usize)| bytes.0 > 60_000;
    for (at, sent) in bytes.iter().enumerate().filter(|(_, b)| much(b)) {
        options::make_room(job.at(at), sent.0, plan);
    }
    let off = |at: &usize| job.creations[*at] == Creation::AlongAndOff;
    let (leave, stay): (Vec<usize>, Vec<usize>) = (0..job.all.len()).partition(off);
    send_to(job, &stay, staging, plan);
    // Messages of a socket that has left its peer were sent afterwards.
    for at in &leave {
        disconnect(job.at(*at), plan, || job.socket(*at).label());
    }
    send_to(job, &leave, staging, plan);
    for (at, _) in bytes.iter().enumerate().filter(|(_, b)| much(b)) {
        for option in SocketOption::send_room_of_new() {
            option.rebuild(job.at(at), &job.socket(at).label(), plan);
        }
    }
}

fn send_to(job: &Job<'_>, sockets: &[usize], staging: Staging, plan: &mut Builder) {
    for &to in sockets {
        let socket = job.socket(to);
        for message in &socket.queue {
            if let Some(from) = job.position(message.from) {
                let what = format!("an unread message of the {}", socket.label());
                // Pid 0: the receiver did not request credentials when it was sent.
                let who = message.credentials.filter(|c| c.pid != 0);
                job.names.act(who, &what, plan, |who, plan| {
                    send(job, (from, to), message, who, staging, plan);
                });
            }
        }
    }
}

/// Sends one message by sendmsg(2); all structures are in the plan's data.
fn send(
    job: &Job<'_>,
    (from, to): (usize, usize),
    message: &Message,
    who: Option<Ucred>,
    staging: Staging,
    plan: &mut Builder,
) {
    let label = job.socket(to).label();
    let paired = |a: usize, b: usize| job.creations[a] == Creation::PairWith(b);
    let direct = job.socket(to).style != Style::Datagram || paired(from, to) || paired(to, from);
    let address = if direct { Vec::new() } else { job.address(to) };
    let mut control = Vec::new();
    if let Some(who) = who {
        let words = [who.pid as u32, who.uid, who.gid].map(u32::to_le_bytes);
        let words = words.concat();
        control_message(libc::SCM_CREDENTIALS, &words, &mut control);
    }
    if !message.rights.is_empty() {
        let numbers = message.rights.iter().map(|d| staging.of(*d).to_le_bytes());
        let words: Vec<u8> = numbers.flatten().collect();
        control_message(libc::SCM_RIGHTS, &words, &mut control);
    }
    // Of a byte that was read, only the position is known.
    let bytes: &[u8] = match message.urgent {
        Some(Urgent::Read) => b"!",
        _ => &message.data,
    };
    let data = plan.data(bytes);
    let part = plan.data(&[data, bytes.len() as u64].map(u64::to_le_bytes).concat());
    let pointer = |bytes: &[u8], plan: &mut Builder| match bytes {
        [] => 0,
        _ => plan.data(bytes),
    };
    // struct msghdr
    let words = [
        pointer(&address, plan),
        address.len() as u64,
        part,
        1,
        pointer(&control, plan),
        control.len() as u64,
        0,
    ];
    let header = plan.data(&words.map(u64::to_le_bytes).concat());
    let object = || format!("an unread message of the {label}");
    let urgent = match message.urgent {
        Some(_) => libc::MSG_OOB as u64,
        None => 0,
    };
    let args = [job.at(from) as u64, header, flags() | urgent];
    plan.expect(libc::SYS_sendmsg, &args, bytes.len() as u64, object);
    if message.urgent == Some(Urgent::Read) {
        let to_nowhere = plan.reserve(1);
        let args = [job.at(to) as u64, to_nowhere, 1, flags() | urgent, 0, 0];
        plan.expect(libc::SYS_recvfrom, &args, 1, object);
    }
}

/// `struct cmsghdr` with its data.
fn control_message(kind: i32, data: &[u8], control: &mut Vec<u8>) {
    let len = 16 + data.len();
    control.extend_from_slice(&(len as u64).to_le_bytes());
    control.extend_from_slice(&libc::SOL_SOCKET.to_le_bytes());
    control.extend_from_slice(&kind.to_le_bytes());
    control.extend_from_slice(data);
    control.resize(control.len().next_multiple_of(8), 0);
}

/// Connects datagram sockets to their peers by name. A connected socket accepts no connection from others, so it is
/// connected after all that connect to it.
fn connect_datagrams(job: &Job<'_>, plan: &mut Builder) {
    let target = |at: usize| match job.creations[at] {
        Creation::Alone | Creation::Severed | Creation::AlongAndOff
            if job.socket(at).style == Style::Datagram =>
        {
            job.socket(at).peer().and_then(|peer| job.position(peer))
        }
        _ => None,
    };
    let mut waiting: Vec<(usize, usize)> = (0..job.all.len())
        .filter_map(|at| Some((at, target(at)?)))
        .collect();
    while !waiting.is_empty() {
        let is_free = |(at, to): &(usize, usize)| {
            !waiting
                .iter()
                .any(|(other, t)| t == at && other != at && other != to)
        };
        // There is always one, since a ring of more than two is impossible; for a hostile image this ends too.
        let next = waiting.iter().position(is_free).unwrap_or(0);
        let (at, to) = waiting.remove(next);
        dial(job.at(at), &job.address(to), &job.socket(at).label(), plan);
    }
    for (at, (_, socket)) in job.all.iter().enumerate() {
        if let Role::Beyond { address } = &socket.role {
            dial(job.at(at), &sockaddr(address), &socket.label(), plan);
        }
    }
}

/// Sets permission bits and owners of the sockets' files.
fn rebuild_files(job: &Job<'_>, plan: &mut Builder) {
    let (uid, gid) = {
        let now = &plan.host().credentials;
        (now.uid[3], now.gid[3])
    };
    for (at, path) in job.present() {
        let socket = job.socket(at);
        let Some(file) = socket.name.as_ref().and_then(|n| n.file.as_ref()) else {
            continue;
        };
        let here = libc::AT_FDCWD as u64;
        let path_at = plan.path(path);
        let object = || format!("the file of the {}", socket.label());
        if (file.uid, file.gid) != (uid, gid) {
            let args = [
                here,
                path_at,
                file.uid.into(),
                file.gid.into(),
                libc::AT_SYMLINK_NOFOLLOW as u64,
            ];
            let warning = format!(
                "{} belongs to uid {uid} now and not to uid {}",
                object(),
                file.uid
            );
            plan.try_syscall(libc::SYS_fchownat, &args, &warning);
        }
        plan.syscall(
            libc::SYS_fchmodat,
            &[here, path_at, file.mode.into()],
            object,
        );
    }
}
