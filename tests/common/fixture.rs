//! A fixture at work; its protocol stands at the top of `fixtures/fixture.h`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::isolate::Case;
use super::job::{Ended, Job, start};
use super::tool::attach;
use super::wait::until;

/// What looks different after a restore, and may: beginnings of names of looks, by fixture.
const EXCEPTIONS: &[(&str, &[&str])] = &[
    // A one-shot entry that has fired watches nothing; added again it watches ERR and HUP, always.
    ("epoll", &["fd 3"]),
    // A removed node of null: opened by another one of the same device.
    ("fd_chardev", &["fd 8"]),
    // Opened with O_TMPFILE, which says how a file came to be and not what it is.
    ("fd_deleted", &["fd 5"]),
    // Its name is gone and another one leads to it: it is opened by that one.
    ("fd_hardlink", &["fd 3"]),
    // Likewise.
    ("fd_tmpfile", &["fd 3", "fd 4"]),
    ("fifo", &["fd 11", "fd 12"]),
    // What has no name is another file; a temporary one was made so.
    ("inotify_nameless", &["fd 5", "fd 6", "fd 7"]),
    // The name that sem_open(3) made it under is gone; it is mapped by the one that it has.
    ("sem_posix", &["maps"]),
    // Opened with O_NOFOLLOW by a name that is gone, which says how the name was looked up.
    ("shm_posix", &["fd 3", "fd 4"]),
    // The table only grows, and a restore has the descriptors at other numbers meanwhile.
    ("fd_many", &["status FDSize"]),
    ("sock_options", &["status FDSize"]),
    ("tcp_blocked", &["status FDSize"]),
    ("tcp_connecting", &["status FDSize"]),
    ("tcp_halfclosed", &["status FDSize"]),
    ("tcp_options", &["status FDSize"]),
    ("tcp_pair", &["status FDSize"]),
    ("tcp_queues", &["status FDSize"]),
    // A one-shot entry that has fired, as in the fixture epoll.
    ("tcp_shared", &["status FDSize", "fd 11"]),
    ("udp", &["status FDSize"]),
    // Which thread or process they were for; those have ended.
    ("timers_ended", &["timers"]),
];

/// What a fixture changes itself, all the time.
const CHANGING: &[(&str, &[&str])] = &[
    // The position of what it appends to.
    ("fd_appended", &["fd 3"]),
    ("maps_changing", &["maps"]),
    // Transfers go on when receive buffers grow, and their threads end.
    ("tcp_blocked", &["task", "status Threads"]),
    ("tcp_queues", &["task", "status Threads"]),
];

/// See [`EXCEPTIONS`]; with what changes anyway.
pub fn exceptions(name: &str) -> Vec<&'static str> {
    [of(EXCEPTIONS, name), of(CHANGING, name)].concat()
}

/// See [`CHANGING`].
pub fn changing(name: &str) -> &'static [&'static str] {
    of(CHANGING, name)
}

fn of(list: &[(&str, &'static [&'static str])], name: &str) -> &'static [&'static str] {
    let found = list.iter().find(|(fixture, _)| *fixture == name);
    found.map_or(&[], |(_, names)| names)
}

/// The run of one fixture.
pub struct Fixture {
    pub job: Job,
    dir: PathBuf,
}

/// Starts the fixture `name` in the directory `run` of the test and waits until it is set up.
/// Skips the test when it says that the machine lacks something.
pub fn fixture(case: &Case, name: &str) -> Fixture {
    start_in(case, name, "run", Command::new(case.fixtures().join(name)))
}

/// Likewise with a command of one's own, which is given the fixture's directory, `DIR/where`.
pub fn start_in(case: &Case, name: &str, place: &str, mut command: Command) -> Fixture {
    let dir = case.path(place);
    fs::create_dir(&dir).expect("the test's directory is writable");
    super::isolate::open_to_all(&dir);
    command.arg(&dir).current_dir(case.dir());
    let job = start(&mut command, &case.path(&format!("{name}.log")));
    let mut fixture = Fixture { job, dir };
    let what = format!("{name} to be ready");
    until(&what, || {
        if let Some(verdict) = fixture.verdict_if_there() {
            if let Some(lacking) = verdict.strip_prefix("SKIP: ") {
                case.skip(lacking);
            }
            panic!("{name} did not set itself up: {verdict}");
        }
        if let Some(ended) = fixture.job.ended() {
            panic!("{name} ended before it was ready: {ended:?}");
        }
        fixture.dir.join("ready").exists().then_some(())
    });
    fixture
}

/// Starts a fixture, takes a checkpoint and kills it: the fixture, whose life may go on, and the
/// image.
pub fn killed(case: &Case, name: &str) -> (Fixture, PathBuf) {
    let mut target = fixture(case, name);
    let image = target.killed_into(case, "job.ckpt");
    (target, image)
}

impl Fixture {
    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.job.pid
    }

    /// Lets it check itself.
    pub fn go(&self) {
        fs::write(self.dir.join("go"), "").expect("the test's directory is writable");
    }

    fn verdict_if_there(&self) -> Option<String> {
        fs::read_to_string(self.dir.join("verdict")).ok()
    }

    /// Lets it check itself, and demands that it passes and exits with `Exited(0)`.
    pub fn passes(mut self) {
        self.go();
        let what = format!("the end of the fixture {}", self.pid());
        let ended = until(&what, || self.job.ended());
        let verdict = self
            .verdict_if_there()
            .unwrap_or_else(|| "no verdict".into());
        assert_eq!(verdict.trim(), "PASS", "and {ended:?}");
        assert_eq!(ended, Ended::Exited(0));
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes a checkpoint and kills it; the image.
    pub fn killed_into(&mut self, case: &Case, image: &str) -> PathBuf {
        let (image, _) = attach(case, self.pid(), image, &["--kill"]);
        let ended = until("its end after attach --kill", || self.job.ended());
        assert_eq!(ended, Ended::Killed(9));
        super::job::reap_orphans(&super::tool::descendants_in(case, &image));
        image
    }

    /// The process has become another; the run goes on.
    pub fn continued_by(&mut self, job: Job) {
        self.job = job;
    }
}
