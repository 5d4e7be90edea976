//! A kind of open file for tests only. Record, capture and restore are in this file; the rest of the program knows it
//! by one line in the list of the parent module.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::need::Need;
use crate::plan::Builder;
use crate::references::{Faults, require};
use crate::source::Collector;

/// A file that counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toy {
    #[serde(deserialize_with = "bounds::count")]
    count: u64,
    path: PathBuf,
}

impl OpenFile for Toy {
    fn capture(_: &Sight, _: &mut Collector) -> Captured {
        None
    }

    fn anon_inode() -> Option<&'static str> {
        Some("toy")
    }

    fn class(&self) -> &'static str {
        "toy"
    }

    fn shown(&self) -> String {
        format!("toy:{}", self.count)
    }

    fn needs(&self, _: u32, _: &Snapshot) -> Vec<Need> {
        vec![Need::new("toy", "box", "to play")]
    }

    fn check(&self, number: DescriptionId, _: &Snapshot, faults: &mut Faults) {
        require!(
            faults,
            self.count < 9,
            "the toy in description {number} counts to {}",
            self.count
        );
    }

    fn each_path(&mut self, f: &mut dyn FnMut(&mut PathBuf)) {
        f(&mut self.path);
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let object = || "a toy".to_owned();
        plan.expect(libc::SYS_eventfd2, &[self.count, 0], 0, object);
        super::place(0, place.at, plan, object);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Staging, kind, open_descriptions};
    use super::*;
    use crate::files::terminal::{End, Places};
    use crate::fixture;
    use crate::options::Options;
    use crate::plan::{HostState, Inherited};
    use crate::references;

    struct NoTerminals;

    impl Places for NoTerminals {
        fn rebuild(
            &self,
            end: &End,
            _: DescriptionId,
            _: u32,
            _: &Snapshot,
        ) -> Result<Inherited, Box<Obstacle>> {
            panic!("there is no terminal {}", end.name)
        }

        fn loses(&self, _: &End) -> bool {
            false
        }
    }

    /// A job with a toy in place of its device.
    fn job(count: u64) -> Snapshot {
        let mut snapshot = fixture::snapshot();
        let path = "/box".into();
        snapshot.descriptions[0].kind = Toy { count, path }.into();
        snapshot
    }

    #[test]
    fn a_kind_is_known_everywhere_by_its_file_and_a_line() {
        let mut snapshot = job(7);
        // It is stored, shown, needed, moved …
        let kind = &snapshot.descriptions[0].kind;
        let stored = serde_json::to_string(kind).unwrap();
        assert_eq!(serde_json::from_str::<Kind>(&stored).unwrap(), *kind);
        assert_eq!((kind.file().class(), kind.label().as_str()), ("toy", "toy"));
        assert_eq!(kind.file().shown(), "toy:7");
        assert_eq!(kind.file().needs(0, &snapshot)[0].name, "box");
        assert!(Kind::has_anon_inode("toy") && !Kind::has_anon_inode("doll"));
        let file = snapshot.descriptions[0].kind.file_mut();
        file.each_path(&mut |path| *path = "/attic/box".into());
        let toy = <Toy as kind::Record>::of(&snapshot.descriptions[0].kind);
        assert_eq!(toy.unwrap().path, PathBuf::from("/attic/box"));
        // … checked …
        let faults = |count| references::check(&job(count), &fixture::good_image());
        assert_eq!(faults(7), [""; 0]);
        assert_eq!(faults(9), ["the toy in description 0 counts to 9"]);
        // … and restored.
        let mut plan = Builder::new(0, HostState::default());
        let (options, staging) = (Options::default(), Staging::beside(&snapshot));
        open_descriptions(&snapshot, &options, &NoTerminals, staging, &mut plan).unwrap();
        let text = plan.finish().to_text();
        assert!(text.contains("eventfd2(7)"), "{text}");
    }
}
