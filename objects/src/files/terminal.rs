//! Terminals: those outside the job, and pseudo-terminals whose master the job has.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use ckpt_sys::tty::{self, Modes, Size};
use ckpt_tracer::proc::{ProcRoot, stat::read_stat, tasks};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{Look, unread};
use crate::Snapshot;
use crate::bounds;
use crate::error::Obstacle;
use crate::index::{DescriptionId, TerminalId};
use crate::plan::Inherited;
use crate::source::{Collector, Source};

mod end;

pub use end::End;

/// A terminal that the job has open, or that is the controlling terminal of one of its sessions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its name.
    pub name: String,
    /// Device number, major and minor.
    pub device: (u32, u32),
    /// Its settings; `None` if the job has no descriptor from which they can be read.
    pub state: Option<State>,
    /// The foreground process group, if it is the controlling terminal of a session of the job.
    #[serde(default, deserialize_with = "bounds::pid")]
    pub foreground: Option<i32>,
    /// State of the pty, when the job has the master.
    pub pair: Option<Pair>,
    /// Owner and mode of the slave, when the job has the master.
    #[serde(default)]
    pub access: Option<Access>,
}

/// Owner and mode of a terminal's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Its owner, and its owner's group.
    pub owner: (u32, u32),
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
}

impl Access {
    fn of(stat: &libc::stat) -> Self {
        Self {
            owner: (stat.st_uid, stat.st_gid),
            mode: stat.st_mode & 0o777,
        }
    }
}

/// Settings of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its modes.
    pub modes: Modes,
    /// Its size.
    pub size: Size,
    /// `TIOCEXCL`.
    pub exclusive: bool,
    /// Locked bits of the modes (`TIOCSLCKTRMIOS`), if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locked: Option<Modes>,
}

/// A pty whose master the job has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Packet mode (`TIOCPKT`).
    pub packet: bool,
    /// The slave cannot be opened (`TIOCSPTLCK`).
    pub locked: bool,
    /// All descriptors of the slave are closed: reads of the master return EIO.
    pub closed: bool,
    /// Output of the slave that is unread at the master.
    #[serde(with = "serde_bytes")]
    pub output: Vec<u8>,
    /// Input from the master that is unread at the slave.
    pub input: Vec<Input>,
    /// Whether the slave's output is stopped.
    #[serde(default)]
    pub flow: Flow,
    /// `TIOCEXCL` of the master.
    #[serde(default)]
    pub master_exclusive: bool,
    /// Writes to the master are stopped, by tcflow(3).
    #[serde(default)]
    pub master_stopped: bool,
    /// Status that a reader in packet mode has not read, `TIOCPKT_*`.
    #[serde(default)]
    pub status: u8,
}

impl Pair {
    /// Whether anything has to be put into a new pty.
    pub fn waits(&self) -> bool {
        !self.output.is_empty()
            || !self.input.is_empty()
            || self.flow != Flow::Running
            || self.master_stopped
            || self.status != 0
    }
}

/// Whether output of a terminal is stopped, and what resumes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Flow {
    /// It is not stopped.
    #[default]
    Running,
    /// Stopped by the stop character (Ctrl-S); the start character resumes it.
    Typed,
    /// Stopped by tcflow(3); only tcflow(3) resumes it.
    Called,
}

/// A piece of unread input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Its bytes.
    pub bytes: ByteBuf,
    /// How it ends.
    pub ending: Ending,
}

/// How a piece of input ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// A line, with its terminating character.
    Line,
    /// Ended by the end-of-file character, which is not part of it.
    EndOfFile,
    /// Incomplete: a line in progress, or noncanonical mode.
    Open,
}

/// Which side of a terminal is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The master of a pty.
    Master,
    /// The terminal (slave) itself.
    Slave,
    /// The terminal itself, opened as `/dev/tty`.
    Controlling,
    /// A terminal that has hung up: operations return EIO, reads end of file.
    HungUp,
}

/// The terminals of the job; filled from all descriptors before their kinds are determined.
pub struct Ends {
    /// Index of the first terminal in the collector.
    first: usize,
    /// By process and number of the descriptor.
    ends: HashMap<(usize, i32), End>,
}

/// `/dev/tty`.
const CONTROLLING: (u32, u32) = (5, 0);
/// What the terminals of a job become at a restore.
pub trait Places {
    /// The source of a description of a terminal.
    ///
    /// # Errors
    /// The obstacles.
    fn rebuild(
        &self,
        end: &End,
        index: DescriptionId,
        flags: u32,
        snapshot: &Snapshot,
    ) -> Result<Inherited, Box<Obstacle>>;

    /// Whether a terminal of the machine becomes another one.
    fn loses(&self, end: &End) -> bool;
}

/// Major numbers of the slaves of ptys.
const PTS: std::ops::RangeInclusive<u32> = 136..=143;

impl Ends {
    /// Finds the terminals among all descriptors.
    pub fn of(sources: &[&Source], looks: &[Look], collector: &mut Collector) -> Self {
        let mut ends = Self {
            first: collector.terminals.len(),
            ends: HashMap::new(),
        };
        let mut known: HashMap<(u64, u64), TerminalId> = HashMap::new();
        let devices = looks
            .iter()
            .filter(|l| l.file_type() == libc::S_IFCHR && !l.is_path());
        let devices: Vec<&Look> = devices.collect();
        let object = |look: &Look| look.object(sources[look.process]);
        collector.findings.obstacles.extend(
            devices
                .iter()
                .filter_map(|look| other_discipline(object(look), look)),
        );
        for look in &devices {
            if let Ok(index) = tty::index(&look.copy) {
                ends.enter_master(sources, look, index, &mut known, collector);
            }
        }
        for look in &devices {
            let number = (
                libc::major(look.stat.st_rdev),
                libc::minor(look.stat.st_rdev),
            );
            if number != CONTROLLING {
                ends.enter_slave(look, number, &mut known, collector);
            }
        }
        for look in &devices {
            let number = (
                libc::major(look.stat.st_rdev),
                libc::minor(look.stat.st_rdev),
            );
            if number == CONTROLLING {
                ends.enter_controlling(look, collector);
            }
        }
        if collector.frozen() {
            ends.look_inside(sources, looks, collector);
        }
        ends
    }

    /// Captures the contents of the ptys of a frozen job.
    fn look_inside(&self, sources: &[&Source], looks: &[Look], collector: &mut Collector) {
        let with = |terminal: TerminalId, wanted: &[Side]| {
            let mut found = looks.iter().filter(|look| {
                self.get(look)
                    .is_some_and(|end| end.terminal == terminal && wanted.contains(&end.side))
            });
            found.next()
        };
        for terminal in (self.first..collector.terminals.len()).map(TerminalId) {
            let Some(master) = with(terminal, &[Side::Master]) else {
                continue;
            };
            let slave = with(terminal, &[Side::Slave, Side::Controlling]);
            let Some(pair) = &mut collector.terminals[terminal].pair else {
                continue;
            };
            let ends = looks
                .iter()
                .filter(|look| self.get(look).is_some_and(|end| end.terminal == terminal));
            let asked = ends.filter(|look| look.info.flags as i32 & libc::O_ASYNC != 0);
            let asked: Vec<&OwnedFd> = asked.map(|look| &look.copy).collect();
            match unread::look(&master.copy, slave.map(|look| &look.copy), &asked) {
                Ok(waiting) => {
                    pair.output = waiting.output;
                    pair.input = waiting.input;
                    pair.flow = waiting.flow;
                    pair.master_stopped = waiting.master_stopped;
                    pair.status = waiting.status;
                }
                Err(trouble) => {
                    let object = master.object(sources[master.process]);
                    collector.findings.obstacles.push(trouble.obstacle(object));
                }
            }
        }
    }

    fn insert(&mut self, look: &Look, terminal: TerminalId, side: Side) {
        let name = look.name();
        let node = look.stat.st_rdev;
        let end = End {
            terminal,
            name,
            side,
            node: Some((libc::major(node), libc::minor(node))),
        };
        self.ends.insert((look.process, look.fd), end);
    }

    /// The end that a description is open on.
    pub fn get(&self, look: &Look) -> Option<End> {
        self.ends.get(&(look.process, look.fd)).cloned()
    }

    fn enter_master(
        &mut self,
        sources: &[&Source],
        look: &Look,
        index: u32,
        known: &mut HashMap<(u64, u64), TerminalId>,
        collector: &mut Collector,
    ) {
        let mut refuse = |reason: String, remedy: &str| {
            let object = look.object(sources[look.process]);
            collector.refuse(Obstacle::new(object, reason, remedy));
        };
        let Ok(device) = tty::device(&look.copy) else {
            return refuse(
                format!("is the master of pty {index}, whose state cannot be read"),
                "try again in a moment",
            );
        };
        // Older file systems (no devpts) have no name for it.
        let path = tty::peer(&look.copy, libc::O_PATH);
        let stat = path
            .as_ref()
            .ok()
            .and_then(|p| ckpt_sys::files::fstat(p).ok());
        if let Some(other) = holder_outside(device, sources) {
            return refuse(
                format!(
                    "is the master of pty {index}, which is the terminal of process {other} outside the job"
                ),
                "end that process first, or checkpoint a process that both descend from",
            );
        }
        let closed = ckpt_sys::events::poll_now(&look.copy, libc::POLLIN) & libc::POLLHUP != 0;
        let pair = Pair {
            packet: tty::packet_mode(&look.copy),
            locked: tty::is_locked(&look.copy),
            closed,
            master_exclusive: tty::is_exclusive(&look.copy),
            ..Pair::default()
        };
        let terminal = Terminal {
            name: format!("/dev/pts/{index}"),
            device,
            // Each side has its own exclusive use.
            state: state(look).map(|state| State {
                exclusive: false,
                ..state
            }),
            foreground: None,
            pair: Some(pair),
            access: stat.as_ref().map(Access::of),
        };
        let id = TerminalId::push(&mut collector.terminals, terminal);
        if let Some(stat) = stat {
            known.insert((stat.st_dev, stat.st_rdev), id);
        }
        self.insert(look, id, Side::Master);
    }

    fn enter_slave(
        &mut self,
        look: &Look,
        device: (u32, u32),
        known: &mut HashMap<(u64, u64), TerminalId>,
        collector: &mut Collector,
    ) {
        let state = match tty::modes(&look.copy) {
            Ok(_) if self.get(look).is_some() => return,
            Ok(_) => state(look),
            Err(Errno::EIO) if PTS.contains(&device.0) => None,
            Err(_) => return,
        };
        let side = match state {
            Some(_) => Side::Slave,
            None => Side::HungUp,
        };
        // For a pty, the master provides it.
        let access = (side == Side::HungUp).then(|| Access::of(&look.stat));
        let key = (look.stat.st_dev, look.stat.st_rdev);
        let device = tty::device(&look.copy).unwrap_or(device);
        let terminal = *known.entry(key).or_insert_with(|| {
            let terminal = Terminal {
                name: look.name(),
                device,
                state: None,
                foreground: None,
                pair: None,
                access,
            };
            TerminalId::push(&mut collector.terminals, terminal)
        });
        let entry = &mut collector.terminals[terminal];
        // Read from the slave, even after the master.
        entry.state = state.or(entry.state);
        self.insert(look, terminal, side);
    }

    fn enter_controlling(&mut self, look: &Look, collector: &mut Collector) {
        let Ok(device) = tty::device(&look.copy) else {
            let device = CONTROLLING;
            let terminal = self.by_device(device, collector);
            return self.insert(look, terminal, Side::HungUp);
        };
        let terminal = self.by_device(device, collector);
        let entry = &mut collector.terminals[terminal];
        entry.state = state(look).or(entry.state);
        self.insert(look, terminal, Side::Controlling);
    }

    /// The terminal with that number; added if no descriptor refers to it.
    fn by_device(&self, device: (u32, u32), collector: &mut Collector) -> TerminalId {
        let mut known = collector.terminals[self.first..].iter();
        if let Some(at) = known.position(|t| t.device == device) {
            return TerminalId(self.first + at);
        }
        let terminal = Terminal {
            name: name_of(device),
            device,
            state: None,
            foreground: None,
            pair: None,
            access: None,
        };
        TerminalId::push(&mut collector.terminals, terminal)
    }

    /// The controlling terminal of a process.
    pub fn controlling(
        &self,
        process: usize,
        source: &Source,
        collector: &mut Collector,
    ) -> Option<TerminalId> {
        let device = source.stat.tty()?;
        // Numbers are unique only within one devpts; the process's own terminals come first.
        let mut own = self.ends.iter().filter(|((p, _), end)| {
            *p == process && end.side != Side::HungUp && end.side != Side::Master
        });
        let own = own.find(|(_, end)| collector.terminals[end.terminal].device == device);
        let terminal = match own {
            Some((_, end)) => end.terminal,
            None => self.by_device(device, collector),
        };
        let foreground = source.stat.tpgid;
        let entry = &mut collector.terminals[terminal];
        entry.foreground = (foreground > 0).then_some(foreground).or(entry.foreground);
        Some(terminal)
    }
}

/// The obstacle of a line discipline other than `N_TTY`, which another driver implements. Each side of a pty has its
/// own.
fn other_discipline(object: String, look: &Look) -> Option<Obstacle> {
    let discipline = tty::discipline(&look.copy);
    (discipline != 0).then(|| {
        Obstacle::new(
            object,
            format!("is a terminal with the line discipline {discipline} (TIOCSETD), which is not supported"),
            "let the program set it back to N_TTY (0)",
        )
    })
}

fn state(look: &Look) -> Option<State> {
    Some(State {
        modes: tty::modes(&look.copy).ok()?,
        size: tty::size(&look.copy).unwrap_or_default(),
        exclusive: tty::is_exclusive(&look.copy),
        locked: tty::locked_modes(&look.copy),
    })
}

fn name_of((major, minor): (u32, u32)) -> String {
    if (major, minor) == CONTROLLING {
        return "/dev/tty".into();
    }
    if PTS.contains(&major) {
        return format!("/dev/pts/{}", ((major - PTS.start()) << 20) + minor);
    }
    std::fs::read_link(format!("/sys/dev/char/{major}:{minor}"))
        .ok()
        .and_then(|link| Some(format!("/dev/{}", link.file_name()?.to_str()?)))
        .unwrap_or_else(|| format!("terminal {major}:{minor}"))
}

/// A process outside the job with this controlling terminal.
fn holder_outside(device: (u32, u32), sources: &[&Source]) -> Option<i32> {
    let pids = tasks::list_processes(&ProcRoot::default()).unwrap_or_default();
    let mut others = pids
        .iter()
        .filter(|pid| sources.iter().all(|s| s.pid != **pid));
    let holder = others.find(|pid| {
        let stat = read_stat(**pid);
        stat.is_ok_and(|stat| stat.tty() == Some(device) && !stat.state.has_ended())
    });
    holder.map(|pid| pid.raw())
}
