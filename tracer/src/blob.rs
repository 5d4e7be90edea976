//! The freestanding restorer, as it is copied into a process.

use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object, RelocationFlags};

static ELF: &[u8] = include_bytes!(env!("CKPT_RESTORER_BLOB"));

/// The restorer's memory; may be placed at any page-aligned address.
#[derive(Debug, Clone)]
pub struct Blob {
    /// Its bytes; the length is a multiple of the page size.
    pub image: Vec<u8>,
    /// Entry point, as an offset.
    pub entry: u64,
    relocations: Vec<(u64, u64)>,
}

impl Blob {
    /// Lays out the program embedded in this crate.
    ///
    /// # Panics
    ///
    /// When the embedded program is not what `build.rs` checked.
    pub fn load() -> Self {
        let file = ElfFile64::<Endianness>::parse(ELF).expect("checked by build.rs");
        let end = file.endian();
        let header = file.elf_header();
        let mut image = Vec::new();
        for segment in header
            .program_headers(end, ELF)
            .expect("checked by build.rs")
        {
            if segment.p_type(end) != elf::PT_LOAD {
                continue;
            }
            let start = segment.p_vaddr(end) as usize;
            let memory = (start + segment.p_memsz(end) as usize).next_multiple_of(4096);
            if image.len() < memory {
                image.resize(memory, 0);
            }
            let data = segment.data(end, ELF).expect("checked by build.rs");
            image[start..start + data.len()].copy_from_slice(data);
        }
        let relocations = file
            .dynamic_relocations()
            .into_iter()
            .flatten()
            .map(|(at, r)| {
                debug_assert!(matches!(
                    r.flags(),
                    RelocationFlags::Elf {
                        r_type: elf::R_X86_64_RELATIVE
                    }
                ));
                (at, r.addend() as u64)
            })
            .collect();
        Self {
            image,
            entry: header.e_entry(end),
            relocations,
        }
    }

    /// The bytes for a placement at `base`.
    pub fn placed_at(&self, base: u64) -> Vec<u8> {
        let mut image = self.image.clone();
        for &(at, addend) in &self.relocations {
            let at = at as usize;
            image[at..at + 8].copy_from_slice(&(base + addend).to_le_bytes());
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blob_loads_and_is_small() {
        let blob = Blob::load();
        assert!(blob.image.len() <= 16 * 1024);
        assert!((blob.entry as usize) < blob.image.len());
        assert_eq!(blob.placed_at(0x1000).len(), blob.image.len());
    }
}
