//! Images with other metadata, as another machine might have made them.

use std::fs;
use std::path::{Path, PathBuf};

use ckpt::objects::Snapshot;
use ckpt_image::{Reader, Writer, WriterOptions};

use super::isolate::Case;

/// Writes a copy of an image whose snapshot was edited.
pub fn edited(case: &Case, image: &Path, name: &str, edit: impl FnOnce(&mut Snapshot)) -> PathBuf {
    let reader = Reader::open(image).expect("it was just written");
    let mut snapshot = ckpt::snapshot::read(&reader, image).expect("likewise");
    edit(&mut snapshot);
    let pid = snapshot.processes[0].pid as u32;
    let path = case.path(name);
    rewritten(&reader, pid, &ckpt::snapshot::encode(&snapshot), &path);
    path
}

/// Writes a copy of an image with other bytes as its snapshot, and right digests.
pub fn rewritten(reader: &Reader, pid: u32, snapshot: &[u8], path: &Path) {
    let mut header = reader.header().clone();
    header.pid = pid;
    let mut writer = Writer::new(Vec::new(), &header, WriterOptions::default()).expect("to memory");
    let (mut data, mut scratch) = (Vec::new(), Vec::new());
    for index in 0..reader.chunks().len() {
        let read = reader.read_chunk(index, &mut data, &mut scratch);
        read.expect("its digests are right");
        let mut chunk = writer.chunk();
        chunk.runs.extend(reader.runs(index));
        chunk.data.extend_from_slice(&data);
        writer.submit(chunk).expect("to memory");
    }
    let (section, version) = (ckpt::snapshot::SECTION, ckpt::snapshot::VERSION);
    let written = writer.section(section, version, snapshot);
    written.expect("to memory");
    let (bytes, _) = writer.finish().expect("to memory");
    fs::write(path, bytes).expect("the test's directory is writable");
}
