//! An open file description of a terminal.

use std::fs::File;
use std::path::Path;

use nix::unistd::AccessFlags;
use serde::{Deserialize, Serialize};

use super::{PTS, Side};
use crate::Snapshot;
use crate::access::may;
use crate::error::Obstacle;
use crate::files::device::device;
use crate::files::kind::{Captured, OpenFile, Opened, Place, Sight};
use crate::index::{DescriptionId, TerminalId};
use crate::open::Handle;
use crate::plan::Builder;
use crate::references::{Faults, require};
use crate::source::Collector;

/// One open file description of a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The terminal.
    pub terminal: TerminalId,
    /// The name that the kernel shows for it.
    pub name: String,
    /// Which side.
    pub side: Side,
    /// The device number of the file that was opened, major and minor: `/dev/console` and `/dev/tty0` refer to
    /// another terminal.
    #[serde(default)]
    pub node: Option<(u32, u32)>,
}

impl End {
    /// Whether it is a terminal of the machine, not a pty.
    pub fn is_of_machine(&self) -> bool {
        self.side == Side::Slave && self.node.is_some_and(|(major, _)| !PTS.contains(&major))
    }

    /// Looks up its name, which must lead to the device that was opened.
    fn find(&self) -> Result<Handle, String> {
        let node = self.node.unwrap_or_default();
        device(Path::new(&self.name), node)
    }

    /// Opens it, as a terminal of the machine.
    ///
    /// # Errors
    /// When it does not exist any more, or may not be opened.
    pub fn reopened(&self, flags: u32) -> crate::Result<File> {
        // Without waiting; further flags are set later.
        let flags = flags as i32 & libc::O_ACCMODE | libc::O_NOCTTY | libc::O_NONBLOCK;
        let found = self.find().map_err(std::io::Error::other);
        let opened = found.and_then(|found| found.open(flags));
        opened.map_err(crate::Error::file("open", &self.name))
    }

    /// Whether its name refers to the device that was opened, and may be opened with this access.
    pub fn can_be_opened(&self, flags: u32) -> bool {
        let access = match flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => AccessFlags::R_OK,
            libc::O_WRONLY => AccessFlags::W_OK,
            _ => AccessFlags::R_OK | AccessFlags::W_OK,
        };
        self.find()
            .is_ok_and(|found| may(&found.link(), access).is_ok())
    }
}

impl OpenFile for End {
    fn capture(sight: &Sight, collector: &mut Collector) -> Captured {
        let end = sight.terminals.get(sight.look)?;
        let terminal = &collector.terminals[end.terminal];
        let other_discipline = terminal
            .state
            .as_ref()
            .filter(|state| state.modes.line != 0);
        Some(match other_discipline {
            Some(state) if end.side != Side::HungUp => Err(Box::new(Obstacle::new(
                sight.look.object(sight.source),
                format!(
                    "is the terminal {} with line discipline {}, which is not supported",
                    terminal.name, state.modes.line
                ),
                "close it before the checkpoint",
            ))),
            _ => Ok(end.into()),
        })
    }

    fn class(&self) -> &'static str {
        match self.side {
            Side::Master => "pty",
            _ => "terminal",
        }
    }

    fn label(&self) -> String {
        self.name.clone()
    }

    fn check(&self, number: DescriptionId, snapshot: &Snapshot, faults: &mut Faults) {
        require!(
            faults,
            self.terminal.find(&snapshot.terminals).is_some(),
            "description {number} refers to terminal {}, which does not exist",
            self.terminal
        );
    }

    /// A pty gets another number, which is the minor number of its slave.
    fn make_comparable(&mut self, _: &mut u32) {
        self.name.clear();
        self.node = self.node.map(|(major, _)| (major, 0));
    }

    fn opened(&self) -> Opened {
        Opened::Unknown
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let what = place
            .terminals
            .rebuild(self, place.index, place.flags, place.snapshot)
            .map_err(|obstacle| vec![*obstacle])?;
        plan.inherit(place.at, what);
        if place.terminals.loses(self) {
            plan.warn(format!(
                "the terminal {} that the job had open is another one now",
                self.name
            ));
        }
        Ok(())
    }
}
