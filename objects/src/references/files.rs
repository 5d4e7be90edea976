//! Descriptors and open file descriptions.

use crate::Snapshot;
use crate::files::Kind;
use crate::files::pieces::{self, Piece};
use crate::process::Process;

use super::{Faults, require};

/// What descriptions say of themselves and of each other.
pub(super) fn descriptions(snapshot: &Snapshot, faults: &mut Faults) {
    for (number, description) in snapshot.descriptions.iter().enumerate() {
        match &description.kind {
            Kind::Epoll(epoll) => {
                for entry in &epoll.entries {
                    require!(
                        faults,
                        entry.description < snapshot.descriptions.len(),
                        "entry {} of the epoll in description {number} refers to description {}, \
                         which does not exist",
                        entry.fd,
                        entry.description
                    );
                    require!(
                        faults,
                        entry.description != number && entry.fd >= 0,
                        "entry {} of the epoll in description {number} is none that an epoll can have",
                        entry.fd
                    );
                }
            }
            Kind::Regular(file) => require!(
                faults,
                file.removed
                    .is_none_or(|index| index < snapshot.removed.len()),
                "description {number} refers to a removed directory that does not exist"
            ),
            Kind::Inotify(inotify) => {
                if let Some(reason) = inotify.out_of_reach() {
                    faults.add(format_args!("description {number} {reason}"));
                }
                require!(
                    faults,
                    inotify.watches.is_sorted_by(|a, b| a.wd < b.wd),
                    "watches of the inotify in description {number} are out of order"
                );
                for open in inotify.watches.iter().filter_map(|watch| watch.open) {
                    require!(
                        faults,
                        open < snapshot.descriptions.len() && open != number,
                        "a watch of the inotify in description {number} refers to description {open}, which \
                         it cannot watch"
                    );
                }
            }
            Kind::Pipe(pipe) => contents(number, &pipe.unread, pipe.capacity, faults),
            Kind::Fifo(fifo) => contents(number, &fifo.unread, fifo.capacity, faults),
            Kind::Terminal(end) => require!(
                faults,
                end.terminal < snapshot.terminals.len(),
                "description {number} refers to terminal {}, which does not exist",
                end.terminal
            ),
            Kind::Outside(outside) => require!(
                faults,
                outside.fd >= 0,
                "description {number} comes from the impossible descriptor {}",
                outside.fd
            ),
            _ => {}
        }
    }
}

/// What is in a pipe or FIFO.
fn contents(number: usize, unread: &[Piece], capacity: u32, faults: &mut Faults) {
    let buffers = pieces::buffers(unread);
    require!(
        faults,
        pieces::fit(unread, capacity),
        "the pipe in description {number} has {buffers} pages in it and room for {capacity} bytes"
    );
    require!(
        faults,
        unread.iter().all(|piece| !piece.bytes.is_empty()),
        "the pipe in description {number} has an empty buffer"
    );
}

/// A process's descriptors.
pub(super) fn descriptors(snapshot: &Snapshot, process: &Process, faults: &mut Faults) {
    let pid = process.pid;
    let places = [process.removed.cwd, process.removed.root];
    require!(
        faults,
        places
            .iter()
            .flatten()
            .all(|index| *index < snapshot.removed.len()),
        "process {pid} is in a removed directory that does not exist"
    );
    require!(
        faults,
        process
            .terminal
            .is_none_or(|t| t < snapshot.terminals.len()),
        "process {pid} refers to a controlling terminal that does not exist"
    );
    let mut last = -1;
    for entry in &process.fds {
        let fd = entry.fd;
        require!(
            faults,
            fd > last,
            "fd {fd} of process {pid} is out of order or exists twice"
        );
        last = last.max(fd);
        let kind = snapshot
            .descriptions
            .get(entry.description)
            .map(|d| &d.kind);
        require!(
            faults,
            kind.is_some(),
            "fd {fd} of process {pid} refers to description {}, which does not exist",
            entry.description
        );
        require!(
            faults,
            !matches!(kind, Some(Kind::Left(left)) if left.instead.is_none()),
            "fd {fd} of process {pid} refers to description {}, which is not in the image",
            entry.description
        );
    }
}
