//! `--bundle`: programs, libraries and files that are only read are in the image, and need not be
//! where it is restored.

use crate::common;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::fixture::start_in;
use crate::common::look::assert_let_go;
use crate::common::refused::restore_is_refused;
use crate::common::tool::{CKPT, leftovers, source};
use crate::common::{
    Case, Ended, Fixture, ckpt, isolated, isolated_as_user, restore_cmd, restored, run, start,
    until,
};
use ckpt::objects::Snapshot;
use ckpt_image::Reader;
use nix::sys::signal::Signal;

/// `tests/programs/packed.c` with its library and its files, in a directory of their own.
struct Packed {
    target: Fixture,
    dir: PathBuf,
}

impl Packed {
    fn start(case: &Case) -> Self {
        let dir = case.path("packed");
        fs::create_dir(&dir).expect("the test's directory is writable");
        let gcc = |args: &[&str], last: &[&str]| {
            let mut gcc = Command::new("gcc");
            gcc.args(["-O1", "-g", "-pthread"]).args(args);
            gcc.arg(source("packed.c")).args(last).current_dir(&dir);
            run(case, &mut gcc).ok();
        };
        gcc(
            &["-shared", "-fPIC", "-DLIBRARY", "-o", "libpacked.so"],
            &[],
        );
        gcc(
            &["-o", "packed"],
            &["-L.", "-lpacked", "-Wl,-rpath,$ORIGIN"],
        );
        let mut mapped = vec![0; 4096];
        mapped.extend(b"second page\0");
        for (name, bytes) in [
            ("data", b"halfrest".as_slice()),
            ("twin", b"halfrest"),
            ("mapped", &mapped),
        ] {
            fs::write(dir.join(name), bytes).expect("the test's directory is writable");
        }
        let mut command = Command::new(dir.join("packed"));
        command.env("PACKED_DATA", &dir);
        let target = start_in(case, "packed", "run", command);
        Self { target, dir }
    }

    /// A bundled checkpoint, after which it is killed.
    fn killed_into(&mut self, case: &Case, image: &str) -> PathBuf {
        let pid = self.target.pid();
        let (image, _) = common::attach(case, pid, image, &["--bundle", "--kill"]);
        let ended = until("its end", || self.target.job.ended());
        assert_eq!(ended, Ended::Killed(9));
        image
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

const FILES: [&str; 5] = ["packed", "libpacked.so", "data", "twin", "mapped"];

fn snapshot(image: &Path) -> Snapshot {
    let reader = Reader::open(image).expect("it was just written");
    ckpt::snapshot::read(&reader, image).expect("likewise")
}

#[test]
fn bundled_files_may_be_gone() {
    isolated("bundled_files_may_be_gone", gone);
}

#[test]
fn bundled_files_may_be_gone_for_a_user() {
    isolated_as_user("bundled_files_may_be_gone_for_a_user", gone);
}

fn gone(case: &Case) {
    let mut packed = Packed::start(case);
    let image = packed.killed_into(case, "job.ckpt");
    ckpt(case, ["verify".as_ref(), image.as_os_str()]).ok();
    fs::remove_dir_all(&packed.dir).expect("it is ours");
    let words = ["check".as_ref(), image.as_os_str()];
    assert!(ckpt(case, words).ok().contains("can be restored here"));
    let dry = run(case, &mut restore_cmd(&image, &["--dry-run"]));
    for name in FILES {
        let line = format!("# take {} from the image", packed.path(name));
        assert!(dry.ok().lines().any(|l| l == line), "no {line} in {dry:#?}");
    }
    packed.target.continued_by(restored(case, &image, &[]));
    // From there on, without asking for it again.
    let again = packed.target.killed_into(case, "again.ckpt");
    packed.target.continued_by(restored(case, &again, &[]));
    packed.target.passes();
    assert!(!packed.dir.exists());
}

/// What is there and is another file is left alone, and not used.
#[test]
fn bundled_files_may_be_other_ones() {
    isolated("bundled_files_may_be_other_ones", |case| {
        let mut packed = Packed::start(case);
        let image = packed.killed_into(case, "job.ckpt");
        for name in FILES {
            let path = packed.dir.join(name);
            fs::remove_file(&path).expect("it is ours");
            fs::write(&path, "something else").expect("it is ours");
        }
        packed.target.continued_by(restored(case, &image, &[]));
        packed.target.passes();
        for name in FILES {
            let there = fs::read(packed.dir.join(name)).expect("it is there");
            assert_eq!(there, b"something else");
        }
    });
}

/// A copy is the same file by its contents, whatever its time; without a bundle it would not be.
#[test]
fn copies_are_known_by_their_contents() {
    isolated("copies_are_known_by_their_contents", |case| {
        let mut packed = Packed::start(case);
        let image = packed.killed_into(case, "job.ckpt");
        for name in FILES {
            let path = packed.dir.join(name);
            let bytes = fs::read(&path).expect("it is there");
            fs::remove_file(&path).expect("it is ours");
            fs::write(&path, bytes).expect("it is ours");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        packed.target.continued_by(restored(case, &image, &[]));
        let exe = fs::read_link(format!("/proc/{}/exe", packed.target.pid())).expect("it runs");
        assert_eq!(exe, packed.dir.join("packed"));
        let maps = fs::read_to_string(format!("/proc/{}/maps", packed.target.pid()));
        assert!(!maps.expect("it runs").contains("(deleted)"));
        packed.target.passes();
    });
}

#[test]
fn equal_contents_are_stored_once() {
    isolated("equal_contents_are_stored_once", |case| {
        let mut packed = Packed::start(case);
        let image = packed.killed_into(case, "job.ckpt");
        let snapshot = snapshot(&image);
        let of = |name: &str| {
            let inode = std::os::unix::fs::MetadataExt::ino(
                &fs::metadata(packed.dir.join(name)).expect("it is there"),
            );
            let found = snapshot.bundle.iter().find(|b| b.inode == inode);
            found.unwrap_or_else(|| panic!("{name} is not bundled"))
        };
        let (data, twin) = (of("data"), of("twin"));
        assert_eq!((&data.digest, data.contents), (&twin.digest, twin.contents));
        let bytes = fs::read(packed.dir.join("packed")).expect("it is there");
        assert_eq!(of("packed").digest, blake3::hash(&bytes).as_bytes());
        // What it writes is not bundled: nothing but its own files and the system's libraries.
        assert!(snapshot.bundle.len() < 12, "{:#?}", snapshot.bundle);
        let needs = ckpt(
            case,
            ["inspect", "--needs", "--json", &image.display().to_string()],
        );
        let needs: serde_json::Value = serde_json::from_str(needs.ok()).expect("it is JSON");
        let needs = needs["needs"].as_array().expect("a list");
        for name in FILES {
            let need = needs.iter().find(|n| n["name"] == packed.path(name));
            assert_eq!(need.expect(name)["bundled"], true);
        }
        packed.target.continued_by(restored(case, &image, &[]));
        packed.target.passes();
    });
}

/// Without a bundle the same is refused.
#[test]
fn without_a_bundle_files_are_needed() {
    isolated("without_a_bundle_files_are_needed", |case| {
        let mut packed = Packed::start(case);
        let image = packed.target.killed_into(case, "job.ckpt");
        assert_eq!(snapshot(&image).bundle, []);
        let aside = case.path("aside");
        fs::rename(&packed.dir, &aside).expect("it is ours");
        restore_is_refused(
            case,
            &image,
            &[&packed.path("libpacked.so"), "No such file"],
        );
        fs::rename(&aside, &packed.dir).expect("it is ours");
        packed.target.continued_by(restored(case, &image, &[]));
        packed.target.passes();
    });
}

/// Files are read when the job goes on again; one that is written then is not stored half old, half
/// new.
#[test]
fn a_file_that_changes_while_it_is_bundled_ends_the_checkpoint() {
    isolated(
        "a_file_that_changes_while_it_is_bundled_ends_the_checkpoint",
        |case| {
            let packed = Packed::start(case);
            let here = case.path("here");
            let mut attach = Command::new(CKPT);
            attach
                .args(["attach", &packed.target.pid().to_string(), "--bundle", "-o"])
                .arg(case.path("job.ckpt"))
                .env("CKPT_FAULT", format!("release:wait={}", here.display()));
            let log = case.path("attach.log");
            let attach = start(&mut attach, &log);
            until("it to stop itself at the release", || {
                let stat = fs::read_to_string(format!("/proc/{}/stat", attach.pid));
                (here.exists() && stat.is_ok_and(|stat| stat.contains(") T "))).then_some(())
            });
            fs::write(packed.dir.join("data"), "halfREST").expect("it is ours");
            attach.signal(Signal::SIGCONT);
            assert_eq!(attach.wait(), Ended::Exited(1));
            let told = fs::read_to_string(&log).expect("it is there");
            let line = format!("{} was changed while", packed.path("data"));
            assert!(told.contains(&line), "{told}");
            assert_eq!(leftovers(case.dir()), [""; 0]);
            assert_let_go(packed.target.pid());
            fs::write(packed.dir.join("data"), "halfrest").expect("it is ours");
            packed.target.passes();
        },
    );
}

/// The interpreter, the packages and the script are gone.
#[test]
fn a_virtual_environment_may_be_gone() {
    isolated("a_virtual_environment_may_be_gone", |case| {
        case.needs_program("python3", "python3");
        let (venv, place) = (case.path("venv"), case.path("place"));
        let mut make = Command::new("python3");
        make.args(["-m", "venv", "--copies", "--without-pip"])
            .arg(&venv);
        if run(case, &mut make).code() != 0 {
            case.skip("python3 -m venv (python3-venv)");
        }
        fs::create_dir(&place).expect("the test's directory is writable");
        let library = fs::read_dir(venv.join("lib")).expect("it was just made");
        let library = library.flatten().next().expect("it has one").path();
        let module = "def joined(a, b):\n    return (a + b).decode()\n";
        fs::write(library.join("site-packages/venv_module.py"), module).expect("it is ours");
        fs::copy(source("venv.py"), venv.join("script.py")).expect("there is room");
        fs::write(venv.join("data"), "begin and end").expect("it is ours");
        let python = venv.join("bin/python3");
        let mut command = Command::new(&python);
        command
            .arg(venv.join("script.py"))
            .arg(&place)
            .arg(venv.join("data"));
        command.current_dir(case.dir());
        let job = start(&mut command, &case.path("venv.log"));
        until("the script", || place.join("ready").exists().then_some(()));
        let (image, _) = common::attach(case, job.pid, "job.ckpt", &["--bundle", "--kill"]);
        assert_eq!(job.wait(), Ended::Killed(9));
        fs::remove_dir_all(&venv).expect("it is ours");
        let job = restored(case, &image, &[]);
        fs::write(place.join("go"), "").expect("the test's directory is writable");
        assert_eq!(job.wait(), Ended::Exited(0));
        let result = fs::read_to_string(place.join("result")).expect("it has a result");
        assert_eq!(result, "begin and end\n");
    });
}

#[test]
fn run_bundles_too() {
    isolated("run_bundles_too", |case| {
        let mut command = Command::new(CKPT);
        command.args([
            "run",
            "--bundle",
            "--interval",
            "1s",
            "--name",
            "job",
            "--dir",
        ]);
        command.arg(case.dir()).args(["--", "sleep", "1000"]);
        let job = start(&mut command, &case.path("run.log"));
        let image = case.path("job.1.ckpt");
        until("a checkpoint", || image.exists().then_some(()));
        assert!(!snapshot(&image).bundle.is_empty());
        job.signal(Signal::SIGTERM);
        assert!(matches!(job.wait(), Ended::Exited(143) | Ended::Killed(_)));
    });
}

/// A file that is put back into its place is that file for all who have it, mapped or open.
#[test]
fn what_is_put_back_is_not_taken_from_the_bundle() {
    isolated("what_is_put_back_is_not_taken_from_the_bundle", |case| {
        let mut packed = Packed::start(case);
        let pid = packed.target.pid();
        let args = ["--bundle", "--save-files", "twin", "--kill"];
        let (image, _) = common::attach(case, pid, "job.ckpt", &args);
        let ended = until("its end", || packed.target.job.ended());
        assert_eq!(ended, Ended::Killed(9));
        for name in ["data", "twin"] {
            fs::remove_file(packed.dir.join(name)).expect("it is ours");
        }
        let dry = run(
            case,
            &mut restore_cmd(&image, &["--dry-run", "--put-files"]),
        );
        assert!(
            dry.ok()
                .contains(&format!("# create {}", packed.path("twin")))
        );
        assert!(
            !dry.stdout
                .contains(&format!("# take {}", packed.path("twin")))
        );
        packed
            .target
            .continued_by(restored(case, &image, &["--put-files"]));
        let maps = fs::read_to_string(format!("/proc/{}/maps", packed.target.pid()));
        let (maps, twin) = (maps.expect("it runs"), packed.path("twin"));
        assert!(maps.lines().any(|line| line.ends_with(&twin)), "{maps}");
        packed.target.passes();
        assert!(packed.dir.join("twin").exists() && !packed.dir.join("data").exists());
    });
}
