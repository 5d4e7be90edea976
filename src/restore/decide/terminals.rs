//! What each terminal of a job becomes: again a pty between processes of the job, our own terminal, or a new pty.

use crate::error::Obstacle;
use crate::objects::Snapshot;
use crate::objects::files::named;
use crate::objects::files::terminal::{End, Places, Side, Terminal};
use crate::objects::index::{DescriptionId, TerminalId};
use crate::objects::plan::Inherited;
use crate::restore::Request;
use crate::supervise::foreground::JobTerminal;

/// What a terminal becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pty whose master the job has.
    Pair,
    /// Ours. The job is in our session.
    Ours,
    /// A new pty whose master we have: the controlling terminal of a session that the job leads.
    Fresh,
    /// The same device of the machine: it is not the controlling terminal of a session of the job.
    Device,
    /// Nothing: all its descriptors had hung up or are replaced by other files.
    Nothing,
}

/// What all terminals of the job become.
#[derive(Clone, Debug, Default)]
pub struct Terminals {
    places: Vec<Place>,
    /// The root of the job newly leads a session: that of a new pty.
    pub root_leads: bool,
}

impl Terminals {
    /// Decides for all.
    ///
    /// # Errors
    /// When there are several terminals outside the job, of which only one can be shown.
    pub fn decide(snapshot: &Snapshot, request: &Request<'_>) -> Result<Self, Vec<Obstacle>> {
        let mut places = Vec::with_capacity(snapshot.terminals.len());
        for (id, terminal) in TerminalId::each(&snapshot.terminals) {
            let ends = DescriptionId::each(&snapshot.descriptions);
            let ends = ends.filter_map(|(at, description)| {
                let end = description.kind.get::<End>()?;
                let counts = end.terminal == id
                    && end.side != Side::HungUp
                    && named(at, snapshot, &request.objects).is_none();
                counts.then_some((end, description.flags))
            });
            let ends: Vec<(&End, u32)> = ends.collect();
            let used = !ends.is_empty();
            let controls = snapshot.processes.iter().any(|p| p.terminal == Some(id));
            let again =
                |(end, flags): &(&End, u32)| end.is_of_machine() && end.can_be_opened(*flags);
            let leads =
                |p: &crate::objects::process::Process| p.terminal == Some(id) && p.session == p.pid;
            let led = snapshot.processes.iter().any(leads);
            places.push(match terminal.pair {
                Some(_) => Place::Pair,
                None if used && !controls && ends.iter().all(again) => Place::Device,
                None if led || (used && !request.foreground) => Place::Fresh,
                None if used => Place::Ours,
                None => Place::Nothing,
            });
        }
        let fresh = snapshot.terminals.iter().zip(&places);
        let fresh = fresh.filter(|(_, place)| **place == Place::Fresh);
        let others: Vec<Obstacle> = fresh.skip(1).map(|(t, _)| too_many(t)).collect();
        if !others.is_empty() {
            return Err(others);
        }
        let root = &snapshot.processes[0];
        let root_leads =
            root.session != root.pid && root.terminal.is_some_and(|t| places[t.0] == Place::Fresh);
        Ok(Self { places, root_leads })
    }

    /// What a terminal becomes.
    pub fn place(&self, terminal: TerminalId) -> Place {
        self.places
            .get(terminal.0)
            .copied()
            .unwrap_or(Place::Nothing)
    }

    /// The terminal that becomes a new pty.
    pub fn fresh(&self) -> Option<TerminalId> {
        let at = self.places.iter().position(|p| *p == Place::Fresh);
        at.map(TerminalId)
    }

    /// The terminal that becomes ours.
    pub fn ours(&self) -> Option<TerminalId> {
        let at = self.places.iter().position(|p| *p == Place::Ours);
        at.map(TerminalId)
    }

    /// Whether a process of the job leads the session of this controlling terminal.
    pub fn is_led(&self, terminal: TerminalId, snapshot: &Snapshot) -> bool {
        let leads = |(index, p): (usize, &crate::objects::process::Process)| {
            self.leads(index, snapshot) && p.terminal == Some(terminal)
        };
        let new = matches!(self.place(terminal), Place::Pair | Place::Fresh);
        new && snapshot.processes.iter().enumerate().any(leads)
    }

    /// Whether a process leads its session, as before or newly.
    pub fn leads(&self, index: usize, snapshot: &Snapshot) -> bool {
        let process = &snapshot.processes[index];
        process.session == process.pid || (index == 0 && self.root_leads)
    }

    /// The job's request for our terminal.
    pub fn wanted(&self, snapshot: &Snapshot) -> JobTerminal {
        let root = &snapshot.processes[0];
        let terminal = self.ours().or(root.terminal);
        let record = terminal.map(|t| &snapshot.terminals[t]);
        let member = |group: &i32| {
            let mut processes = snapshot.processes.iter();
            processes.any(|p| p.group == *group && p.session == root.session)
        };
        let foreground = record.and_then(|t| t.foreground).filter(member);
        let group = foreground.unwrap_or(root.group);
        // A group without its leader in the job becomes ours.
        let own = group != root.group || group == root.pid;
        JobTerminal {
            root: root.pid,
            group: own.then_some(group),
            shown: self.ours().is_some(),
            modes: self.ours().and(record).and_then(|t| Some(t.state?.modes)),
        }
    }
}

impl Places for Terminals {
    fn loses(&self, end: &End) -> bool {
        let other = matches!(self.place(end.terminal), Place::Ours | Place::Fresh);
        end.is_of_machine() && other
    }

    fn rebuild(
        &self,
        end: &End,
        index: DescriptionId,
        flags: u32,
        snapshot: &Snapshot,
    ) -> Result<Inherited, Box<Obstacle>> {
        if self.place(end.terminal) == Place::Device && end.is_of_machine() {
            return Ok(Inherited::MachineTerminal(index));
        }
        if end.side == Side::HungUp || self.place(end.terminal) != Place::Ours {
            return Ok(Inherited::Terminal(index));
        }
        let numbers = snapshot.processes.iter().flat_map(|p| &p.fds);
        let numbers: Vec<i32> = numbers
            .filter(|e| e.description == index)
            .map(|e| e.fd)
            .collect();
        if end.side == Side::Slave
            && let Some(fd) = numbers.iter().find(|fd| **fd <= 2)
        {
            return Ok(Inherited::Own(*fd));
        }
        let controlling = end.side == Side::Controlling;
        if crate::restore::files::pty::own_terminal(controlling, flags).is_some() {
            return Ok(Inherited::OwnTerminal(controlling, flags));
        }
        let fd = numbers.first().copied().unwrap_or_default();
        let obstacle = Obstacle::new(
            format!("fd {fd} of the job"),
            format!("was a terminal ({}), and restore has none", end.name),
            format!(
                "run restore in a terminal, or with --detach, or say what it shall be with --fd {fd}=PATH"
            ),
        );
        Err(Box::new(obstacle.by_option()))
    }
}

fn too_many(terminal: &Terminal) -> Obstacle {
    Obstacle::new(
        format!("the terminal {}", terminal.name),
        "is the second one outside the job, which cannot be shown together with the first",
        "say what its descriptors shall be with --fd N=PATH",
    )
    .by_option()
}
