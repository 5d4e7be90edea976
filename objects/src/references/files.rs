//! Descriptors and open file descriptions.

use crate::Snapshot;
use crate::files::left::Left;
use crate::index::DescriptionId;
use crate::process::Process;

use super::{Faults, require};

/// Checks of descriptions and their references.
pub(super) fn descriptions(snapshot: &Snapshot, faults: &mut Faults) {
    for (number, description) in DescriptionId::each(&snapshot.descriptions) {
        description.kind.file().check(number, snapshot, faults);
    }
}

/// Checks the descriptors of a process.
pub(super) fn descriptors(snapshot: &Snapshot, process: &Process, faults: &mut Faults) {
    let pid = process.pid;
    let places = [process.removed.cwd, process.removed.root];
    require!(
        faults,
        places
            .iter()
            .flatten()
            .all(|id| id.find(&snapshot.removed).is_some()),
        "process {pid} is in a removed directory that does not exist"
    );
    require!(
        faults,
        process
            .terminal
            .is_none_or(|t| t.find(&snapshot.terminals).is_some()),
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
        let description = entry.description.find(&snapshot.descriptions);
        let kind = description.map(|d| &d.kind);
        require!(
            faults,
            kind.is_some(),
            "fd {fd} of process {pid} refers to description {}, which does not exist",
            entry.description
        );
        require!(
            faults,
            !kind.is_some_and(Left::is_absent),
            "fd {fd} of process {pid} refers to description {}, which is not in the image",
            entry.description
        );
    }
}
