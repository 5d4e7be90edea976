//! Restores on a kernel with another vDSO than that of the checkpoint. The other kernel is an image in
//! which the vDSO is a different one: the functions of this kernel's, of which only the beginnings may be
//! executed. With a second kernel: `make test-kernels`.

use crate::common;
use std::fs::{self, File};
use std::path::Path;

use crate::common::look::assert_no_process_left;
use crate::common::refused::restore_is_refused;
use crate::common::{Case, Fixture, fixture, isolated, isolated_as_user, restored};
use ckpt::objects::Snapshot;
use ckpt::snapshot;
use ckpt_image::{Chunk, Reader, Writer, WriterOptions};
use object::{Object, ObjectSymbol};

/// Writes the image anew with another snapshot.
fn change(image: &Path, change: impl FnOnce(&mut Snapshot)) {
    let reader = Reader::open(image).expect("it was just written");
    let mut snapshot = snapshot::read(&reader, image).expect("it was just written");
    change(&mut snapshot);
    let changed = image.with_extension("changed");
    let sink = File::create(&changed).expect("the test's directory is writable");
    let mut writer = Writer::new(sink, reader.header(), WriterOptions::default())
        .expect("the header is that of an image");
    let mut scratch = Vec::new();
    for chunk in 0..reader.chunks().len() {
        let mut data = Vec::new();
        let read = reader.read_chunk(chunk, &mut data, &mut scratch);
        read.expect("it was just written");
        let runs = reader.runs(chunk).collect();
        let written = writer.submit(Chunk { runs, data });
        written.expect("it is as it was");
    }
    let bytes = snapshot::encode(&snapshot);
    let written = writer.section(snapshot::SECTION, snapshot::VERSION, &bytes);
    written.expect("it is a section");
    writer.finish().expect("the test's directory is writable");
    fs::rename(changed, image).expect("the test's directory is writable");
}

/// Fills the vDSO's functions with traps. It is another one then, and a task that executes
/// its old code ends by SIGTRAP.
fn set_traps(vdso: &mut [u8]) {
    let copy = vdso.to_vec();
    let file = object::File::parse(copy.as_slice()).expect("it is an ELF file");
    let functions = file
        .dynamic_symbols()
        .filter(|s| s.kind() == object::SymbolKind::Text);
    let places: Vec<_> = functions.map(|s| (s.address(), s.size())).collect();
    assert!(places.len() >= 5, "vdso(7) has more functions: {places:?}");
    for (at, size) in places {
        vdso[at as usize..(at + size) as usize].fill(0xcc);
    }
}

fn killed_elsewhere(case: &Case, name: &str) -> (Fixture, std::path::PathBuf) {
    let (target, image) = common::fixture::killed(case, name);
    change(&image, |snapshot| set_traps(&mut snapshot.host.vdso));
    (target, image)
}

/// Comes back on "another kernel", is checkpointed there, and comes back once more.
fn moves(case: &Case, name: &str) {
    let (mut target, image) = killed_elsewhere(case, name);
    target.continued_by(restored(case, &image, &[]));
    let image = target.killed_into(case, "second.ckpt");
    target.continued_by(restored(case, &image, &[]));
    target.passes();
}

/// Goes from kernel to kernel: each of the vDSOs leads on to the next one.
fn wanders(case: &Case, name: &str) {
    let (mut target, image) = killed_elsewhere(case, name);
    target.continued_by(restored(case, &image, &[]));
    for _ in 0..2 {
        let image = target.killed_into(case, "again.ckpt");
        change(&image, |snapshot| set_traps(&mut snapshot.host.vdso));
        target.continued_by(restored(case, &image, &[]));
    }
    target.passes();
}

macro_rules! fixtures {
    ($($how:ident: $($name:ident)*;)*) => {$(
        mod $how {
            $(#[test]
            fn $name() {
                let name = concat!(stringify!($how), "::", stringify!($name));
                super::isolated(name, |case| super::$how(case, stringify!($name)));
            })*
        }
    )*};
}

fixtures! {
    moves: vdso threads sleepers timers_posix timers_itimer inhandler restart_nanosleep rseq
        restart_futex tree_deep tree_cow tree_exec mmfields;
    wanders: vdso tree_cow;
}

#[test]
fn as_an_ordinary_user() {
    isolated_as_user("as_an_ordinary_user", |case| moves(case, "vdso"));
}

#[test]
fn without_a_c_library() {
    isolated("without_a_c_library", |case| {
        for name in ["vdso.static", "threads.musl"] {
            if case.fixtures().join(name).exists() {
                moves(case, name);
                fs::remove_dir_all(case.path("run")).expect("it is ours");
            }
        }
    });
}

#[test]
fn an_image_without_the_code_is_refused() {
    isolated("an_image_without_the_code_is_refused", |case| {
        let (_target, image) = common::fixture::killed(case, "counter");
        change(&image, |snapshot| snapshot.host.vdso.clear());
        restore_is_refused(case, &image, &["vDSO", "not in the image", "kernel"]);
        assert_no_process_left();
    });
}

#[test]
fn a_thread_inside_is_refused() {
    isolated("a_thread_inside_is_refused", |case| {
        let (target, image) = killed_elsewhere(case, "threads");
        change(&image, |snapshot| {
            let process = &mut snapshot.processes[0];
            use ckpt::objects::memory::{Backing, KernelMapping};
            let mut mappings = process.memory.mappings.iter();
            let vdso = mappings.find(|m| m.backing == Backing::Kernel(KernelMapping::Vdso));
            process.threads[1].regs.rip = vdso.expect("it has one").start + 0x805;
        });
        let pid = target.pid().to_string();
        restore_is_refused(case, &image, &["thread", &pid, "middle", "vDSO", "kernel"]);
        assert_no_process_left();
    });
}

#[test]
fn a_handler_on_top_is_refused() {
    isolated("a_handler_on_top_is_refused", |case| {
        let mut target = fixture(case, "vdso_handler");
        let image = target.killed_into(case, "job.ckpt");
        let another = case.path("another.ckpt");
        fs::copy(&image, &another).expect("the test's directory is writable");
        change(&another, |snapshot| set_traps(&mut snapshot.host.vdso));
        let pid = target.pid().to_string();
        restore_is_refused(case, &another, &["signal handler", &pid, "vDSO", "kernel"]);
        assert_no_process_left();
        // On the kernel that it comes from nothing is in its way.
        target.continued_by(restored(case, &image, &[]));
        target.passes();
    });
}
