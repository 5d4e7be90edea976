//! The files that a job has mapped, as they are on disk now.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

use crate::Snapshot;
use crate::index::FileId;
use crate::memory::MappedFile;
use crate::open::Handle;

/// Opens mapped files, each once, and only those unchanged since the checkpoint.
pub struct MappedFiles<'a> {
    files: &'a [MappedFile],
    open: RefCell<HashMap<FileId, Option<Rc<File>>>>,
}

impl<'a> MappedFiles<'a> {
    /// The mapped files of a snapshot.
    pub fn new(snapshot: &'a Snapshot) -> Self {
        MappedFiles {
            files: &snapshot.mapped_files,
            open: RefCell::default(),
        }
    }

    /// The record of a file.
    pub fn record(&self, file: FileId) -> Option<&'a MappedFile> {
        file.find(self.files)
    }

    /// The open file; `None` if it has gone, has changed, or cannot be read.
    pub fn file(&self, file: FileId) -> Option<Rc<File>> {
        let record = self.record(file)?;
        let mut open = self.open.borrow_mut();
        open.entry(file)
            .or_insert_with(|| open_same(record).map(Rc::new))
            .clone()
    }
}

fn open_same(record: &MappedFile) -> Option<File> {
    let found = Handle::of_regular(&record.path).ok()?;
    let now = found.meta();
    let modified = now
        .mtime()
        .checked_mul(1_000_000_000)?
        .checked_add(now.mtime_nsec())?;
    let same = now.size() == record.identity.size && modified == record.identity.modified_ns;
    same.then(|| found.read().ok())?
}
