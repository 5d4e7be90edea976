//! Memory of a process under inspection.

use std::os::unix::fs::FileExt;

use ckpt_image::Reader;

use super::mapped::MappedFiles;
use crate::files::memfd::MemFd;
use crate::index::FileId;
use crate::memory::{Backing, Mapping};
use crate::process::Process;
use crate::{Snapshot, SpaceId};

/// Memory of a process, in an image or live.
pub trait TargetMemory {
    /// Reads from `address` on into `into`; returns the number of bytes before the first unreadable one.
    fn read(&self, address: u64, into: &mut [u8]) -> usize;
}

/// A process's memory in an image: its pages there, mapped files on disk, and zeros elsewhere.
pub struct ImageMemory<'a> {
    reader: &'a Reader,
    snapshot: &'a Snapshot,
    process: &'a Process,
    files: &'a MappedFiles<'a>,
}

impl<'a> ImageMemory<'a> {
    /// The memory of a process of `snapshot`.
    pub fn new(
        reader: &'a Reader,
        snapshot: &'a Snapshot,
        process: &'a Process,
        files: &'a MappedFiles<'a>,
    ) -> Self {
        ImageMemory {
            reader,
            snapshot,
            process,
            files,
        }
    }

    /// Reads the rest of the page at `address`, as far as `into` has room.
    fn piece(&self, address: u64, into: &mut [u8]) -> Option<()> {
        let mapping = find(&self.process.memory.mappings, address)?;
        if self
            .stored(self.process.memory.space, address, into)
            .is_some()
        {
            return Some(());
        }
        if mapping
            .guards
            .iter()
            .any(|(start, end)| (*start..*end).contains(&address))
        {
            return None;
        }
        let inside = address - mapping.start;
        match &mapping.backing {
            Backing::Anonymous | Backing::AnonymousHuge { .. } => into.fill(0),
            Backing::PrivateFile { file, offset } | Backing::SharedFile { file, offset, .. } => {
                self.of_file(*file, offset.checked_add(inside)?, into)?;
            }
            Backing::SharedMemory { object, offset } => {
                let space = object.find(&self.snapshot.shared_memory)?.space;
                self.stored_or_zero(space, offset.checked_add(inside)?, into);
            }
            Backing::SysV {
                segment, offset, ..
            } => {
                let space = segment.find(&self.snapshot.ipc.segments)?.contents;
                self.stored_or_zero(space, offset.checked_add(inside)?, into);
            }
            Backing::Description {
                description,
                offset,
                ..
            } => {
                let description = description.find(&self.snapshot.descriptions)?;
                let memfd = description.kind.get::<MemFd>()?;
                self.stored_or_zero(memfd.contents, offset.checked_add(inside)?, into);
            }
            Backing::AioRing(_) | Backing::Kernel(_) => return None,
        }
        Some(())
    }

    fn of_file(&self, file: FileId, offset: u64, into: &mut [u8]) -> Option<()> {
        let record = self.files.record(file)?;
        if let Some(space) = record.stored() {
            self.stored_or_zero(space, offset, into);
            return Some(());
        }
        // The rest of a file's last page reads as zeros.
        let rest = record.identity.size.checked_sub(offset)?;
        let (present, beyond) = into.split_at_mut(into.len().min(rest as usize));
        self.files.file(file)?.read_exact_at(present, offset).ok()?;
        beyond.fill(0);
        Some(())
    }

    fn stored(&self, space: SpaceId, address: u64, into: &mut [u8]) -> Option<()> {
        // A damaged page is unreadable; `ckpt verify` reports why.
        let page = self.reader.page(space.0, address).ok()??;
        let at = (address % page.len() as u64) as usize;
        into.copy_from_slice(page.get(at..at + into.len())?);
        Some(())
    }

    fn stored_or_zero(&self, space: SpaceId, address: u64, into: &mut [u8]) {
        if self.stored(space, address, into).is_none() {
            into.fill(0);
        }
    }
}

impl TargetMemory for ImageMemory<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> usize {
        let page = u64::from(self.reader.header().page_size);
        let mut done = 0;
        while done < into.len() {
            let Some(at) = address.checked_add(done as u64) else {
                break;
            };
            let piece = (page - at % page).min((into.len() - done) as u64) as usize;
            if self.piece(at, &mut into[done..done + piece]).is_none() {
                break;
            }
            done += piece;
        }
        done
    }
}

/// The mapping at an address; mappings must be ascending.
pub fn find(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let after = mappings.partition_point(|mapping| mapping.start <= address);
    mappings
        .get(after.checked_sub(1)?)
        .filter(|mapping| address < mapping.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{MEMORY, good_image, snapshot};

    #[test]
    fn memory_comes_from_pages_zeros_and_files() {
        let (snapshot, reader) = (snapshot(), good_image());
        let files = MappedFiles::new(&snapshot);
        let memory = ImageMemory::new(&reader, &snapshot, &snapshot.processes[0], &files);
        let mut bytes = [1; 4];
        assert_eq!(memory.read(MEMORY + 4096 - 2, &mut bytes), 4);
        assert_eq!(
            bytes,
            [0, 0, 0x90, 0x90],
            "a page of zeros, then the stored one"
        );
        assert_eq!(
            memory.read(MEMORY + 4 * 4096 - 2, &mut bytes),
            2,
            "the mapping ends"
        );
        assert_eq!(memory.read(0x1000, &mut bytes), 0, "the file is gone");
        assert_eq!(memory.read(u64::MAX, &mut bytes), 0);
    }
}
