//! Forges hostile images with valid digests, so that the checks behind the digests are reached.
//!
//! Written from docs/image-format.md and not from the crate's code, as an independent implementation.
//! Shared with the fuzz target.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub const HEADER: usize = 1024;
pub const RECORD: usize = 64;
pub const FOOTER: usize = 160;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// The range of the index, if the footer's values are inside the file.
pub fn index(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let footer = bytes.len().checked_sub(FOOTER)?;
    let (at, len) = (u64_at(bytes, footer + 16), u64_at(bytes, footer + 24));
    let end = at.checked_add(len)?;
    (at >= HEADER && end <= footer).then_some(at..end)
}

/// Positions of the record headers in the index.
pub fn records(bytes: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let Some(index) = index(bytes) else {
        return found;
    };
    let mut at = index.start;
    while at + RECORD <= index.end {
        found.push(at);
        at += RECORD + u32_at(bytes, at + 12);
    }
    found
}

/// Makes stored bytes match the digests in the index, and the record headers in the file match the index.
pub fn reseal_records(bytes: &mut [u8]) {
    let Some(index) = index(bytes) else { return };
    for at in records(bytes) {
        let (stored, table) = (u32_at(bytes, at + 8), u32_at(bytes, at + 12));
        let offset = u64_at(bytes, at + 16);
        let Some(payload) = offset.checked_add(RECORD + table) else {
            continue;
        };
        let Some(end) = payload.checked_add(stored) else {
            continue;
        };
        if end > index.start || offset < HEADER || at + RECORD + table > index.end {
            continue;
        }
        let digest = xxhash_rust::xxh3::xxh3_128(&bytes[payload..end]);
        bytes[at + 24..at + 40].copy_from_slice(&digest.to_le_bytes());
        bytes.copy_within(at..at + RECORD + table, offset);
    }
}

/// Makes the digests of header, index and footer right.
pub fn reseal(bytes: &mut [u8]) {
    if bytes.len() < HEADER + FOOTER {
        return;
    }
    let digest = blake3::hash(&bytes[..992]);
    bytes[992..1024].copy_from_slice(digest.as_bytes());
    let footer = bytes.len() - FOOTER;
    if let Some(index) = index(bytes) {
        let mut root = blake3::Hasher::new();
        root.update(&bytes[..HEADER]).update(&bytes[index]);
        bytes[footer + 88..footer + 120].copy_from_slice(root.finalize().as_bytes());
    }
    let seal = blake3::hash(&bytes[footer..footer + 120]);
    bytes[footer + 120..footer + 152].copy_from_slice(seal.as_bytes());
}

/// A record to forge: kind, codec, version, raw length, run table, block, blocks, name, stored bytes.
#[derive(Clone, Default)]
pub struct Forged {
    pub kind: u8,
    pub codec: u8,
    pub version: u16,
    pub raw: u32,
    pub table: Vec<u8>,
    pub block: u32,
    pub blocks: u32,
    pub name: [u8; 16],
    pub stored: Vec<u8>,
}

impl Forged {
    /// A chunk of `runs`: space, first page number, pages.
    pub fn chunk(codec: u8, runs: &[(u32, u64, u64)], stored: Vec<u8>) -> Self {
        let mut table = Vec::new();
        for (space, page, pages) in runs {
            table.extend_from_slice(&space.to_le_bytes());
            table.extend_from_slice(&(page << 12 | (pages - 1)).to_le_bytes());
        }
        let raw = runs.iter().map(|run| run.2 as u32 * 4096).sum();
        Forged {
            kind: 1,
            codec,
            raw,
            table,
            stored,
            ..Forged::default()
        }
    }

    /// A raw block of a section.
    pub fn block(name: &[u8], block: u32, blocks: u32, stored: Vec<u8>) -> Self {
        let mut place = [0; 16];
        place[..name.len()].copy_from_slice(name);
        Forged {
            kind: 2,
            raw: stored.len() as u32,
            block,
            blocks,
            name: place,
            stored,
            ..Forged::default()
        }
    }
}

/// A sealed image of these records behind the header of `model`.
pub fn forge(model: &[u8], records: &[Forged]) -> Vec<u8> {
    let mut bytes = model[..HEADER].to_vec();
    let mut index = Vec::new();
    let (mut chunks, mut sections, mut runs, mut pages) = (0u64, 0u64, 0u64, 0u64);
    for record in records {
        let mut head = vec![record.kind, record.codec];
        head.extend_from_slice(&record.version.to_le_bytes());
        for number in [
            record.raw,
            record.stored.len() as u32,
            record.table.len() as u32,
        ] {
            head.extend_from_slice(&number.to_le_bytes());
        }
        head.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        head.extend_from_slice(&xxhash_rust::xxh3::xxh3_128(&record.stored).to_le_bytes());
        head.extend_from_slice(&record.block.to_le_bytes());
        head.extend_from_slice(&record.blocks.to_le_bytes());
        head.extend_from_slice(&record.name);
        head.extend_from_slice(&record.table);
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&record.stored);
        index.extend_from_slice(&head);
        chunks += u64::from(record.kind == 1);
        // As the run tables say, regardless of the raw lengths.
        let entries = record.table.chunks_exact(12);
        pages += entries
            .map(|run| (u32_at(run, 4) as u64 & 0xfff) + 1)
            .sum::<u64>();
        runs += record.table.len() as u64 / 12;
        sections += u64::from(record.kind == 2 && record.block == 0);
    }
    let index_at = bytes.len() as u64;
    let index_len = index.len() as u64;
    bytes.extend_from_slice(&index);
    bytes.extend_from_slice(&model[48..64]);
    let total = index_at + index_len + FOOTER as u64;
    for number in [
        index_at,
        index_len,
        total,
        records.len() as u64,
        chunks,
        sections,
        runs,
        pages,
        0,
    ] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&[0; 64]);
    bytes.extend_from_slice(b"CKPTEND\n");
    reseal(&mut bytes);
    bytes
}
