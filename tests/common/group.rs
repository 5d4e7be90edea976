//! Control groups of a test.

use std::fs;
use std::path::{Path, PathBuf};

use super::isolate::Case;
use super::wait::until;

/// A control group that goes with the test.
pub struct Group(pub PathBuf);

impl Group {
    /// Makes one in the first hierarchy whose groups have these files; skips the test without.
    pub fn with(case: &Case, files: &[&str]) -> Self {
        case.needs_root();
        let hierarchies = fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten();
        let mut places = vec![PathBuf::from("/sys/fs/cgroup")];
        places.extend(
            hierarchies
                .map(|entry| entry.path())
                .filter(|path| path.is_dir()),
        );
        let name = format!("ckpt-test.{}", case.dir().display()).replace('/', ".");
        let made = places.iter().find_map(|place| {
            let group = place.join(&name);
            fs::create_dir(&group).ok()?;
            let fits = files.iter().all(|file| group.join(file).exists());
            // What is no hierarchy stays as it was.
            (fits || fs::remove_dir(&group).is_err()).then_some(group)
        });
        let lacking = || {
            case.skip(&format!(
                "a control group hierarchy with {}",
                files.join(", ")
            ))
        };
        Group(made.unwrap_or_else(lacking))
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What is in a file of it, without the newline.
    pub fn read(&self, name: &str) -> String {
        let text = fs::read_to_string(self.file(name)).expect("it is there");
        text.trim().to_owned()
    }

    /// Writes a file of it.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.file(name);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Moves processes into it.
    pub fn take(&self, pids: &[i32]) {
        pids.iter()
            .for_each(|pid| self.write("cgroup.procs", &pid.to_string()));
    }

    /// Removes it when it is empty.
    pub fn remove(self) {
        until("the group to be empty", || remove_below(&self.0).ok());
    }
}

fn remove_below(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)?.flatten() {
        if entry.path().is_dir() {
            remove_below(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
