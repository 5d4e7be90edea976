//! Names for addresses, from the symbol tables of the mapped files.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::rc::Rc;

use object::read::elf::{ElfFile64, FileHeader};
use object::{Endianness, Object, ObjectSegment, ObjectSymbol, ReadCache, SymbolKind, elf};

use crate::objects::memory::image::find;
use crate::objects::memory::mapped::MappedFiles;
use crate::objects::memory::{Backing, KernelMapping, Mapping};

/// Finds names; reads each file once.
pub struct Symbols<'a> {
    files: &'a MappedFiles<'a>,
    tables: RefCell<HashMap<usize, Option<Rc<Table>>>>,
}

/// A file's symbols by address, and where its segments are loaded.
struct Table {
    /// First address, size, name; ascending.
    symbols: Vec<(u64, u64, String)>,
    /// Offset in the file, size there, address.
    segments: Vec<(u64, u64, u64)>,
}

impl<'a> Symbols<'a> {
    /// Names in the files of a snapshot.
    pub fn new(files: &'a MappedFiles<'a>) -> Self {
        Symbols {
            files,
            tables: RefCell::default(),
        }
    }

    /// What an address is called: `read+0x12 (libc.so.6)`, `libc.so.6+0x3f12` when the file has
    /// no symbol there, `[vdso]`, or `None` when nothing is mapped or only memory without a name.
    pub fn name(&self, mappings: &[Mapping], address: u64) -> Option<String> {
        let mapping = find(mappings, address)?;
        let inside = address - mapping.start;
        let (index, offset) = match &mapping.backing {
            Backing::PrivateFile { file, offset } | Backing::SharedFile { file, offset, .. } => {
                (*file, offset.checked_add(inside)?)
            }
            Backing::Kernel(KernelMapping::Vdso) => return Some("[vdso]".into()),
            _ => return None,
        };
        let path = &self.files.record(index)?.path;
        let file = path
            .file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy();
        let table = self.table(index);
        match table.as_deref().and_then(|table| table.symbol(offset)) {
            Some((name, 0)) => Some(format!("{name} ({file})")),
            Some((name, beyond)) => Some(format!("{name}+{beyond:#x} ({file})")),
            None => Some(format!("{file}+{offset:#x}")),
        }
    }

    fn table(&self, index: usize) -> Option<Rc<Table>> {
        let mut tables = self.tables.borrow_mut();
        let read = || Table::read(&*self.files.file(index)?).map(Rc::new);
        tables.entry(index).or_insert_with(read).clone()
    }
}

impl Table {
    fn read(file: &File) -> Option<Self> {
        let cache = ReadCache::new(file.try_clone().ok()?);
        let parsed = ElfFile64::<Endianness, _>::parse(&cache).ok()?;
        let machine = parsed.elf_header().e_machine(parsed.endian());
        if machine != elf::EM_X86_64 {
            return None;
        }
        let segments = parsed
            .segments()
            .map(|segment| {
                (
                    segment.file_range().0,
                    segment.file_range().1,
                    segment.address(),
                )
            })
            .collect();
        let mut symbols: Vec<_> = parsed
            .symbols()
            .chain(parsed.dynamic_symbols())
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition())
            .filter_map(|symbol| {
                let name = symbol.name().ok().filter(|name| !name.is_empty())?;
                Some((symbol.address(), symbol.size(), name.to_owned()))
            })
            .collect();
        symbols.sort();
        Some(Table { symbols, segments })
    }

    /// The symbol that the byte at `offset` of the file belongs to, and how far into it that is.
    fn symbol(&self, offset: u64) -> Option<(&str, u64)> {
        let address = self.segments.iter().find_map(|(start, size, address)| {
            let inside = offset.checked_sub(*start).filter(|inside| inside < size)?;
            address.checked_add(inside)
        })?;
        let after = self
            .symbols
            .partition_point(|(start, ..)| *start <= address);
        let before = &self.symbols[..after];
        // Aliases of one address stand side by side; the first of them that reaches far enough.
        let last = before.last()?.0;
        let first = before.partition_point(|(start, ..)| *start < last);
        let fits = |(start, size, _): &&(u64, u64, String)| *size == 0 || address - start < *size;
        let (start, _, name) = before[first..].iter().find(fits)?;
        Some((name, address - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_cover_their_size() {
        let symbol = |start, size, name: &str| (start, size, name.to_owned());
        let table = Table {
            symbols: vec![
                symbol(0x1000, 0x10, "alias"),
                symbol(0x1000, 0x10, "f"),
                symbol(0x1020, 0, "asm"),
            ],
            segments: vec![(0x400, 0x100, 0x1000)],
        };
        assert_eq!(table.symbol(0x400), Some(("alias", 0)));
        assert_eq!(table.symbol(0x40f), Some(("alias", 0xf)));
        assert_eq!(table.symbol(0x410), None, "between the two");
        assert_eq!(table.symbol(0x430), Some(("asm", 0x10)));
        assert_eq!(table.symbol(0x500), None, "outside the segment");
        assert_eq!(table.symbol(0), None);
    }

    #[test]
    fn our_own_symbols_are_found() {
        let table = Table::read(&File::open("/proc/self/exe").unwrap()).unwrap();
        assert!(
            table
                .symbols
                .iter()
                .any(|(_, _, name)| name.contains("our_own_symbols"))
        );
        assert!(!table.segments.is_empty());
    }
}
