//! Names for addresses, from the symbol tables of the mapped files.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use object::read::elf::{ElfFile64, FileHeader, SectionHeader, Sym};
use object::{Endianness, Object, ObjectSegment, ObjectSymbol, ReadCache, SymbolKind, elf};

use crate::objects::index::FileId;
use crate::objects::memory::image::find;
use crate::objects::memory::mapped::MappedFiles;
use crate::objects::memory::{Backing, KernelMapping, Mapping};

/// Finds names; reads each file once.
pub struct Symbols<'a> {
    files: &'a MappedFiles<'a>,
    tables: RefCell<HashMap<FileId, Option<Rc<Table>>>>,
}

/// A file's symbols by address, and the addresses of its segments. A file has thousands of symbols, few of which are
/// looked up: names are read then.
struct Table {
    file: File,
    /// Ascending by address.
    symbols: Vec<Symbol>,
    /// Offset in the file, size in the file, address.
    segments: Vec<(u64, u64, u64)>,
}

/// A symbol.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    /// Its first address.
    start: u64,
    /// Its size; 0 if unknown.
    size: u64,
    /// Offset of its name in the file, and the end of all names.
    name: (u64, u64),
}

impl<'a> Symbols<'a> {
    /// Names in the files of a snapshot.
    pub fn new(files: &'a MappedFiles<'a>) -> Self {
        Symbols {
            files,
            tables: RefCell::default(),
        }
    }

    /// The name of an address: `read+0x12 (libc.so.6)`, `libc.so.6+0x3f12` if the file has no symbol there, `[vdso]`,
    /// or `None` if nothing is mapped or only memory without a name.
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
        match table.and_then(|table| table.symbol(offset)) {
            Some((name, 0)) => Some(format!("{name} ({file})")),
            Some((name, beyond)) => Some(format!("{name}+{beyond:#x} ({file})")),
            None => Some(format!("{file}+{offset:#x}")),
        }
    }

    fn table(&self, file: FileId) -> Option<Rc<Table>> {
        let mut tables = self.tables.borrow_mut();
        let read = || Table::read(&*self.files.file(file)?).map(Rc::new);
        tables.entry(file).or_insert_with(read).clone()
    }
}

impl Table {
    fn read(file: &File) -> Option<Self> {
        let cache = ReadCache::new(file.try_clone().ok()?);
        let parsed = ElfFile64::<Endianness, _>::parse(&cache).ok()?;
        let endian = parsed.endian();
        if parsed.elf_header().e_machine(endian) != elf::EM_X86_64 {
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
        let tables = [
            (parsed.symbols(), parsed.elf_symbol_table()),
            (parsed.dynamic_symbols(), parsed.elf_dynamic_symbol_table()),
        ];
        let mut symbols = Vec::new();
        for (all, table) in tables {
            let names = parsed.elf_section_table().section(table.string_section());
            let Some((names, len)) = names.ok().and_then(|names| names.file_range(endian)) else {
                continue;
            };
            let functions = all.filter(|s| s.kind() == SymbolKind::Text && s.is_definition());
            symbols.extend(functions.filter_map(|symbol| {
                let name = u64::from(symbol.elf_symbol().st_name(endian));
                (name != 0).then_some(Symbol {
                    start: symbol.address(),
                    size: symbol.size(),
                    name: (names.checked_add(name)?, names.checked_add(len)?),
                })
            }));
        }
        symbols.sort_unstable_by_key(|symbol: &Symbol| symbol.start);
        Some(Table {
            file: file.try_clone().ok()?,
            symbols,
            segments,
        })
    }

    /// The symbol that contains the byte at `offset` of the file, and the distance from its start.
    fn symbol(&self, offset: u64) -> Option<(String, u64)> {
        let address = self.segments.iter().find_map(|(start, size, address)| {
            let inside = offset.checked_sub(*start).filter(|inside| inside < size)?;
            address.checked_add(inside)
        })?;
        let after = self.symbols.partition_point(|s| s.start <= address);
        let before = &self.symbols[..after];
        // Aliases of one address are adjacent: the smallest that extends far enough, and of equal ones the first by
        // name.
        let last = before.last()?.start;
        let first = before.partition_point(|s| s.start < last);
        let fits = |s: &&Symbol| s.size == 0 || address - s.start < s.size;
        let aliases = before[first..].iter().filter(fits);
        let named = aliases.filter_map(|s| Some((s.size, self.name(s.name)?)));
        let (_, name) = named.min()?;
        Some((name, address - last))
    }

    /// The name at an offset of the file, limited by the end of all names.
    fn name(&self, (start, end): (u64, u64)) -> Option<String> {
        /// Longer names are ignored.
        const LONGEST: u64 = 4096;
        let mut name = vec![0; end.checked_sub(start)?.min(LONGEST) as usize];
        let read = self.file.read_at(&mut name, start).ok()?;
        name.truncate(name[..read].iter().position(|byte| *byte == 0)?);
        String::from_utf8(name).ok().filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn symbols_cover_their_size() {
        // Names in a different order than the symbols.
        let names = b"\0f\0asm\0alias\0large\0";
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(std::env::temp_dir());
        let file = file.expect("a file without a name can be made");
        file.write_all_at(names, 0).expect("it can be written");
        let symbol = |start, size, name| Symbol {
            start,
            size,
            name: (name, names.len() as u64),
        };
        let table = Table {
            file,
            symbols: vec![
                symbol(0x1000, 0x10, 1),
                symbol(0x1000, 0x10, 7),
                symbol(0x1000, 0x18, 13),
                symbol(0x1020, 0, 3),
            ],
            segments: vec![(0x400, 0x100, 0x1000)],
        };
        let found = |offset| table.symbol(offset);
        let named = |name: &str, beyond| Some((name.to_owned(), beyond));
        assert_eq!(found(0x400), named("alias", 0));
        assert_eq!(found(0x40f), named("alias", 0xf));
        assert_eq!(found(0x410), named("large", 0x10));
        assert_eq!(found(0x418), None, "between the two");
        assert_eq!(found(0x430), named("asm", 0x10));
        assert_eq!(found(0x500), None, "outside the segment");
        assert_eq!(found(0), None);
    }

    #[test]
    fn our_own_symbols_are_found() {
        let table = Table::read(&File::open("/proc/self/exe").unwrap()).unwrap();
        let mut names = table.symbols.iter().filter_map(|s| table.name(s.name));
        assert!(names.any(|name| name.contains("our_own_symbols")));
        assert!(!table.segments.is_empty());
    }
}
