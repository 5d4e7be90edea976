//! Image files on disk: complete or absent; and errors for files that are not images.
#![allow(missing_docs)]

mod common;

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ckpt_image::{Codec, Error, ImageFile, Reader, Writer, sweep_stale};
use common::*;

fn names(directory: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    names
}

#[test]
fn appears_when_committed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job.ckpt");
    fs::write(&path, "the older one").unwrap();
    let mut writer = Writer::new(
        ImageFile::create(&path).unwrap(),
        &header(),
        options(Codec::Lz4),
    )
    .unwrap();
    fill_small(&mut writer, 0).unwrap();
    let (file, summary) = writer.finish().unwrap();
    assert_eq!(file.path(), path);
    assert_eq!(fs::read(&path).unwrap(), b"the older one");
    file.commit().unwrap();
    assert_eq!(names(directory.path()), ["job.ckpt"]);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(
        (metadata.permissions().mode() & 0o7777, metadata.len()),
        (0o600, summary.bytes)
    );
    let reader = Reader::open(&path).unwrap();
    assert_eq!(reader.verify(&mut |_, _| {}).unwrap().bytes, summary.bytes);
    assert_eq!(reader.path(), path);
}

#[test]
fn leaves_nothing_when_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job.ckpt");
    let mut file = ImageFile::create(&path).unwrap();
    file.write_all(b"half").unwrap();
    assert_eq!(names(directory.path()).len(), 1);
    drop(file);
    // Dropping a writer drops its sink.
    let mut writer = Writer::new(
        ImageFile::create(&path).unwrap(),
        &header(),
        options(Codec::Lz4),
    )
    .unwrap();
    fill_small(&mut writer, 0).unwrap();
    drop(writer);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn sweeps_what_the_dead_left_and_only_that() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job");
    let live = ImageFile::create(&path).unwrap();
    let stale = ".job.tmp.1.0123456789abcdef";
    let others = [
        ".job.tmp.1",
        ".job.tmp.x.0123456789abcdef",
        ".job2.tmp.1.0123456789abcdef",
        ".job.tmp.1.0123",
    ];
    for name in others.iter().chain([&stale]) {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let second = ImageFile::create(&path).unwrap();
    let left = names(directory.path());
    assert_eq!(left.len(), 2 + others.len(), "{left:?}");
    assert!(
        !left.contains(&stale.into()) && others.iter().all(|other| left.contains(&other.into()))
    );
    fs::write(directory.path().join(stale), "").unwrap();
    assert_eq!(sweep_stale(directory.path(), "job").unwrap(), 1);
    live.commit().unwrap();
    second.commit().unwrap();
    assert!(path.exists());
}

#[test]
fn a_process_killed_with_sigkill_leaves_what_the_next_sweeps() {
    // This program runs itself as the process to be killed.
    if let Some(path) = std::env::var_os("CKPT_IMAGE_VICTIM") {
        let mut file = ImageFile::create(path).unwrap();
        file.write_all(b"half an image").unwrap();
        println!("ready");
        std::thread::sleep(std::time::Duration::from_secs(600));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_process_killed_with_sigkill_leaves_what_the_next_sweeps",
            "--nocapture",
        ])
        .env("CKPT_IMAGE_VICTIM", &path)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(child.stdout.take().unwrap());
    let ready = std::io::BufRead::lines(output).any(|line| line.unwrap().ends_with("ready"));
    assert!(ready);
    assert_eq!(
        sweep_stale(directory.path(), "job").unwrap(),
        0,
        "it is alive"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(directory.path()).len(), 1);
    assert_eq!(sweep_stale(directory.path(), "job").unwrap(), 1);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn long_and_odd_names() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["x".repeat(255), "é".repeat(127), "a b\n".into()] {
        let path = directory.path().join(&name);
        ImageFile::create(&path).unwrap().commit().unwrap();
        assert!(path.exists());
    }
    for bad in ["/", "..", "/no/such/place"] {
        assert!(
            matches!(ImageFile::create(bad), Err(Error::Io { .. })),
            "{bad}"
        );
    }
    let link = directory.path().join("link");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    for bad in [directory.path(), Path::new("/dev/null"), &link] {
        assert!(
            matches!(ImageFile::create(bad), Err(Error::NotAFile { .. })),
            "{}",
            bad.display()
        );
    }
}

#[test]
fn what_is_no_image_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("thing");
    assert!(matches!(Reader::open(&path), Err(Error::Missing { .. })));
    fs::write(&path, "").unwrap();
    assert!(matches!(Reader::open(&path), Err(Error::Empty { .. })));
    fs::write(&path, "#!/bin/sh\n").unwrap();
    let error = Reader::open(&path).unwrap_err();
    assert!(matches!(error, Error::NotAnImage { .. }));
    assert!(
        error
            .to_string()
            .starts_with(&format!("{}: ", path.display())),
        "{error}"
    );
    fs::write(&path, &small(Codec::None).0[..5000]).unwrap();
    assert!(matches!(Reader::open(&path), Err(Error::Truncated { .. })));
    for special in [directory.path(), Path::new("/dev/null")] {
        assert!(
            matches!(Reader::open(special), Err(Error::NotAnImage { .. })),
            "{}",
            special.display()
        );
    }
    let fifo = directory.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    assert!(matches!(Reader::open(&fifo), Err(Error::NotAnImage { .. })));
}

#[test]
fn a_file_that_is_cut_while_open() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job");
    fs::write(&path, small(Codec::None).0).unwrap();
    let reader = Reader::open(&path).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(2000)
        .unwrap();
    assert!(matches!(
        reader.page(0, 0x4000),
        Err(Error::Truncated { .. })
    ));
    assert!(matches!(
        reader.verify(&mut |_, _| {}),
        Err(Error::Truncated { .. })
    ));
}
