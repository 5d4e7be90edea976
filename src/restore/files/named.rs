//! Named files: the file that was checked is the one that is opened.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Obstacle, Result};
use crate::objects::files::regular::Regular;
use crate::objects::index::{DescriptionId, FileId};
use crate::objects::memory::{FileIdentity, MappedFile};
use crate::objects::open::Handle;
use crate::objects::rights::{self, Rights};

/// A named file, and the rights with which it is opened.
pub(super) struct Named<'a> {
    path: &'a Path,
    was: &'a FileIdentity,
    rights: Option<&'a Rights>,
    /// Its user may not open it; we do, if it is the same file.
    for_it: bool,
}

impl<'a> Named<'a> {
    /// The file of a description.
    pub(super) fn open_file(
        index: DescriptionId,
        file: &'a Regular,
        rights: Option<&'a Rights>,
    ) -> Self {
        let for_it = rights.is_some_and(|rights| rights.opens_for_it(index));
        Self::new((&file.path, &file.identity), rights, for_it)
    }

    /// A mapped or executed file.
    pub(super) fn mapped(id: FileId, record: &'a MappedFile, rights: Option<&'a Rights>) -> Self {
        let for_it = rights.is_some_and(|rights| rights.maps_for_it(id));
        Self::new((&record.path, &record.identity), rights, for_it)
    }

    fn new(
        (path, was): (&'a Path, &'a FileIdentity),
        rights: Option<&'a Rights>,
        for_it: bool,
    ) -> Self {
        Self {
            path,
            was,
            rights: rights.filter(|_| !for_it),
            for_it,
        }
    }

    /// Looks it up, checks it once more, and opens what was checked.
    pub(super) fn open(
        &self,
        find: impl FnOnce() -> Result<Handle, Box<Obstacle>>,
        flags: i32,
    ) -> Result<File> {
        rights::with(self.rights, || {
            let found = find().map_err(|o| Error::refuse(*o))?;
            if self.for_it {
                let same = rights::is_the_same(&found, self.path, self.was);
                same.map_err(|o| Error::refuse(*o))?;
            }
            found.open(flags).map_err(Error::file("open", self.path))
        })
    }
}
