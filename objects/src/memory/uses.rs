//! How processes use mapped files.

use std::collections::HashSet;

use super::Backing;
use crate::Snapshot;
use crate::index::FileId;

/// How mapped files are used.
#[derive(Debug)]
pub struct Uses {
    executed: HashSet<FileId>,
    private: HashSet<FileId>,
    shared: HashSet<FileId>,
}

impl Uses {
    /// Evaluates the mappings of all processes.
    pub fn of(snapshot: &Snapshot) -> Self {
        let memory = || snapshot.processes.iter().map(|process| &process.memory);
        let backings = || memory().flat_map(|memory| memory.mappings.iter().map(|m| &m.backing));
        Self {
            executed: memory().map(|memory| memory.executable).collect(),
            private: backings()
                .filter_map(|backing| match backing {
                    Backing::PrivateFile { file, .. } => Some(*file),
                    _ => None,
                })
                .collect(),
            shared: backings()
                .filter_map(|backing| match backing {
                    Backing::SharedFile { file, .. } => Some(*file),
                    _ => None,
                })
                .collect(),
        }
    }

    /// Whether a process executes the file.
    pub fn executed(&self, file: FileId) -> bool {
        self.executed.contains(&file)
    }

    /// Whether unchanged contents of the file are required.
    pub fn as_it_was(&self, file: FileId) -> bool {
        self.executed(file) || self.private.contains(&file)
    }

    /// Whether writes to its pages reach the file.
    pub fn shared(&self, file: FileId) -> bool {
        self.shared.contains(&file)
    }
}
