//! Creates pseudo-terminals, in the restoring process; the new processes inherit them.

use std::fs::{OpenOptions, Permissions};
use std::io::IsTerminal;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

use ckpt_sys::tty::{self, Modes};
use ckpt_tracer::capabilities::Use;

use crate::error::{Error, Result};
use crate::objects::Snapshot;
use crate::objects::files::terminal::{Access, End, Pair, Side, Terminal};
use crate::objects::files::unread::{self, Waiting};
use crate::objects::index::TerminalId;
use crate::restore::decide::terminals::{Place, Terminals};

/// Most ptys that are created to reach a number.
const PATIENCE: u32 = 1024;

/// The new ptys, by terminal of the snapshot.
#[derive(Default)]
pub struct Ptys {
    ptys: Vec<Option<Pty>>,
    /// For each of the snapshot's terminals.
    access: Vec<Option<Access>>,
    /// Differences, one sentence each.
    pub warnings: Vec<String>,
}

struct Pty {
    master: OwnedFd,
    /// Open until everything is set, if it was ever opened.
    slave: Option<OwnedFd>,
}

fn failed(what: &str, terminal: &str) -> impl Fn(std::io::Error) -> Error {
    let step = format!("{what} a pty in place of {terminal}");
    move |e| Error::step(&step, e)
}

impl Ptys {
    /// Creates every pty that the job needs.
    pub fn make(snapshot: &Snapshot, terminals: &Terminals) -> Result<Self> {
        let mut made = Self::default();
        made.ptys.resize_with(snapshot.terminals.len(), || None);
        made.access = snapshot.terminals.iter().map(|t| t.access).collect();
        // The lowest free number is assigned first, and the job's own ptys have priority.
        let mut pairs: Vec<_> = TerminalId::each(&snapshot.terminals)
            .filter(|(id, _)| terminals.place(*id) == Place::Pair)
            .collect();
        pairs.sort_by_key(|(_, terminal)| terminal.device);
        let mut spare = Vec::new();
        for (id, terminal) in pairs {
            let master = made.numbered(terminal, &mut spare)?;
            if let Err(e) = terminal
                .access
                .map_or(Ok(()), |access| give(&master, access))
            {
                made.warnings.push(format!(
                    "the job's terminal {} does not have its old owner and mode: {e}",
                    terminal.name
                ));
            }
            let pty = Pty::of(master, id, terminal, snapshot, terminals)?;
            made.lock_modes(terminal, &pty.master);
            made.ptys[id.0] = Some(pty);
        }
        drop(spare);
        if let Some(id) = terminals.fresh() {
            let terminal = &snapshot.terminals[id];
            let master = tty::new_pty(0).map_err(failed("make", &terminal.name))?;
            made.ptys[id.0] = Some(Pty::of(master, id, terminal, snapshot, terminals)?);
        }
        Ok(made)
    }

    /// Locks modes, with the modes as they were.
    fn lock_modes(&mut self, terminal: &Terminal, master: &OwnedFd) {
        let locked = terminal.state.and_then(|state| state.locked);
        let Some(Err(e)) = locked.map(|locked| tty::lock_modes(master, &locked)) else {
            return;
        };
        self.warnings.push(format!(
            "the modes of the job's terminal {} are no longer locked (TIOCSLCKTRMIOS): {}; it may need {}",
            terminal.name,
            e.desc(),
            Use::LockedModes
        ));
    }

    /// A pty with its old number, if that is free.
    fn numbered(&mut self, terminal: &Terminal, spare: &mut Vec<OwnedFd>) -> Result<OwnedFd> {
        let wanted = terminal.device.1;
        let make = || tty::new_pty(0).map_err(failed("make", &terminal.name));
        let mut master = make()?;
        let mut number = tty::index(&master).unwrap_or(u32::MAX);
        let known = spare.iter().position(|m| tty::index(m) == Ok(wanted));
        if let Some(at) = known {
            return Ok(spare.swap_remove(at));
        }
        while number < wanted && wanted - number <= PATIENCE {
            spare.push(std::mem::replace(&mut master, make()?));
            number = tty::index(&master).unwrap_or(u32::MAX);
        }
        if number != wanted {
            self.warnings.push(format!(
                "the job's terminal {} is in use by others and is now /dev/pts/{number}",
                terminal.name
            ));
        }
        Ok(master)
    }

    fn get(&self, terminal: TerminalId) -> Result<&Pty> {
        self.ptys
            .get(terminal.0)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::Bug(format!("terminal {terminal} was not made")))
    }

    /// One description of a terminal.
    pub fn open(&self, end: &End, flags: u32) -> Result<OwnedFd> {
        let how = open_flags(flags);
        if end.side == Side::HungUp {
            let access = self.access.get(end.terminal.0).copied().flatten();
            return hung_up(how, access).map_err(failed("make", &end.name));
        }
        let pty = self.get(end.terminal)?;
        match (end.side, &pty.slave) {
            (Side::Controlling, Some(slave)) => tty::controlling(slave, how),
            (Side::Master, _) => pty.master.try_clone(),
            _ => tty::peer(&pty.master, how).map_err(Into::into),
        }
        .map_err(failed("open", &end.name))
    }

    /// A descriptor of the slave.
    pub fn slave(&self, terminal: TerminalId) -> Result<OwnedFd> {
        let pty = self.get(terminal)?;
        let slave = tty::peer(&pty.master, libc::O_RDWR | libc::O_NOCTTY);
        slave.map_err(|e| failed("open", "the job's terminal")(e.into()))
    }

    /// When every descriptor is open: sets what would have interfered. Returns the master of the pty that is new to
    /// the job.
    pub fn finish(self, snapshot: &Snapshot) -> Result<Option<OwnedFd>> {
        let mut ours = None;
        for (pty, terminal) in self.ptys.into_iter().zip(&snapshot.terminals) {
            let Some(pty) = pty else { continue };
            let error = |e: nix::errno::Errno| failed("set", &terminal.name)(e.into());
            let exclusive = terminal.state.is_some_and(|s| s.exclusive);
            if let Some(slave) = &pty.slave
                && exclusive
            {
                tty::set_exclusive(slave).map_err(error)?;
            }
            let Some(pair) = &terminal.pair else {
                ours = Some(pty.master);
                continue;
            };
            tty::set_packet_mode(&pty.master, pair.packet).map_err(error)?;
            tty::set_locked(&pty.master, pair.locked).map_err(error)?;
            if pair.master_exclusive {
                tty::set_exclusive(&pty.master).map_err(error)?;
            }
        }
        Ok(ours)
    }
}

impl Pty {
    fn of(
        master: OwnedFd,
        id: TerminalId,
        terminal: &Terminal,
        snapshot: &Snapshot,
        terminals: &Terminals,
    ) -> Result<Self> {
        let error = |e: nix::errno::Errno| failed("set", &terminal.name)(e.into());
        let ends = snapshot.descriptions.iter();
        let ends = ends.filter_map(|d| d.kind.get::<End>());
        let mut ends = ends.filter(|end| end.terminal == id);
        let open = ends.any(|end| matches!(end.side, Side::Slave | Side::Controlling))
            || terminal.pair.as_ref().is_none_or(|p| p.closed || p.waits())
            || terminals.is_led(id, snapshot);
        let slave = match open {
            true => Some(
                tty::peer(&master, libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK)
                    .map_err(error)?,
            ),
            false => None,
        };
        if let Some(state) = &terminal.state {
            tty::set_size(&master, state.size).map_err(error)?;
            tty::set_modes(&master, &state.modes).map_err(error)?;
            if let (Some(slave), Some(pair)) = (&slave, &terminal.pair) {
                refill(&master, slave, &state.modes, pair).map_err(error)?;
            }
        }
        Ok(Self { master, slave })
    }
}

/// Sets owner and mode of the slave.
fn give(master: &OwnedFd, access: Access) -> std::io::Result<()> {
    let slave = tty::peer(master, libc::O_PATH)?;
    let path = format!("/proc/self/fd/{}", slave.as_raw_fd());
    let meta = std::fs::metadata(&path)?;
    let (uid, gid) = access.owner;
    if (meta.uid(), meta.gid()) != access.owner {
        std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
    }
    match meta.mode() & 0o777 == access.mode & 0o777 {
        true => Ok(()),
        false => std::fs::set_permissions(&path, Permissions::from_mode(access.mode & 0o777)),
    }
}

/// Puts back unread data.
fn refill(
    master: &OwnedFd,
    slave: &OwnedFd,
    modes: &Modes,
    pair: &Pair,
) -> Result<(), nix::errno::Errno> {
    if !pair.waits() {
        return Ok(());
    }
    let waiting = Waiting {
        output: pair.output.clone(),
        input: pair.input.clone(),
        flow: pair.flow,
        master_stopped: pair.master_stopped,
        status: pair.status,
    };
    unread::put(master, slave, *modes, &waiting)
}

/// A terminal whose other side is closed. It belongs to its previous owner if we may give it away (limits.md).
fn hung_up(flags: i32, access: Option<Access>) -> std::io::Result<OwnedFd> {
    let master = tty::new_pty(0)?;
    let slave = tty::peer(&master, flags)?;
    let _ = access.map(|access| give(&master, access));
    Ok(slave)
}

fn open_flags(flags: u32) -> i32 {
    let kept = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND;
    (flags as i32 & kept) | libc::O_NOCTTY
}

/// Our own terminal, with a new description.
pub fn own_terminal(controlling: bool, flags: u32) -> Option<OwnedFd> {
    let open = |path: &str| {
        let access = flags as i32 & libc::O_ACCMODE;
        let file = OpenOptions::new()
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .custom_flags(libc::O_NOCTTY)
            .open(path);
        file.ok().map(OwnedFd::from)
    };
    let terminals = [
        std::io::stdin().is_terminal(),
        std::io::stdout().is_terminal(),
        std::io::stderr().is_terminal(),
    ];
    let standard = || {
        let mut ours = (0..3).filter(|fd| terminals[*fd]);
        ours.find_map(|fd| open(&format!("/proc/self/fd/{fd}")))
    };
    match controlling {
        true => open("/dev/tty"),
        false => standard().or_else(|| open("/dev/tty")),
    }
}

/// A duplicate of a descriptor of ours; for a terminal a new description if possible, so that the job's flags do not
/// affect our parent's.
pub fn reopened(fd: &OwnedFd) -> Option<OwnedFd> {
    tty::modes(fd).ok()?;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open(path).ok().map(OwnedFd::from)
}
