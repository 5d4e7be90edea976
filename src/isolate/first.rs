//! The first process of a pid namespace that is to be the job's own root: until it executes the
//! job's program it waits for the process that rebuilds the job, and does what that one says. That one
//! is created beside it and not above it: its end must not be told to the job.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use ckpt_sys::Errno;
use ckpt_sys::exec::Program;
use ckpt_sys::process::leave;
use serde::{Deserialize, Serialize};

use super::link::{hear, tell};
use super::rights;
use crate::error::{Error, Result};
use crate::objects::clock::Clocks;

/// The end of whoever rebuilds the job. It is open until that one ends: the first process would end
/// before, and with it everybody in the namespace, who then could not say why.
#[derive(Debug)]
pub struct First(ManuallyDrop<UnixStream>);

/// What comes before the descriptors: the program, where to report to, and these numbers.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    name: CString,
    clocks: Clocks,
    numbers: Vec<i32>,
}

impl First {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(ManuallyDrop::new(socket))
    }

    /// Tells it to become a process with these descriptors that executes this program; it does so
    /// when it is let [`go`](Self::go), and ends when we do.
    ///
    /// # Errors
    /// Its answer, or that it was killed.
    pub fn order(
        &mut self,
        executable: &File,
        descriptors: &[(OwnedFd, i32)],
        report: &OwnedFd,
        name: CString,
        clocks: Clocks,
    ) -> Result<()> {
        let order = Order {
            name,
            clocks,
            numbers: descriptors.iter().map(|(_, number)| *number).collect(),
        };
        let fds = descriptors.iter().map(|(fd, _)| fd.as_raw_fd());
        let fds = [executable.as_raw_fd(), report.as_raw_fd()]
            .into_iter()
            .chain(fds);
        let answer = self.send(&order, &fds.collect::<Vec<_>>());
        match answer {
            Ok(None) => Ok(()),
            Ok(Some(text)) => Err(Error::Restore(text)),
            Err(error) => Err(Error::Restore(format!(
                "the first process of the job's pid namespace cannot be told what to do: {error}"
            ))),
        }
    }

    fn send(&mut self, order: &Order, fds: &[RawFd]) -> io::Result<Option<String>> {
        tell(&mut *self.0, order)?;
        for some in fds.chunks(rights::MOST) {
            rights::send(&self.0, some)?;
            // The kernel counts those on their way.
            self.0.read_exact(&mut [0])?;
        }
        hear(&mut *self.0)
    }

    /// A byte lets it go on.
    pub fn go(&self) -> impl Write + '_ {
        &*self.0
    }
}

/// What the first process does.
pub(super) fn serve(mut socket: UnixStream) -> ! {
    match obey(&mut socket) {
        Ok(()) => {}
        Err(Error::File { .. }) => leave(1),
        Err(error) => {
            let _ = tell(&mut socket, &Some(error.to_string()));
        }
    }
    // Whoever was told ends first.
    let _ = socket.read_exact(&mut [0]);
    leave(1)
}

fn obey(socket: &mut UnixStream) -> Result<()> {
    let gone = |source| Error::File {
        what: "hear from",
        path: "whoever rebuilds the job".into(),
        source,
    };
    let order: Order = hear(socket).map_err(gone)?;
    let mut fds = Vec::new();
    while fds.len() < order.numbers.len() + 2 {
        fds.extend(rights::receive(socket).map_err(gone)?);
        socket.write_all(&[0]).map_err(gone)?;
    }
    crate::objects::limits::raise_descriptor_limit();
    order.clocks.join()?;
    let descriptors: Vec<(OwnedFd, i32)> = fds.drain(2..).zip(order.numbers).collect();
    let program = Program::prepare(&fds[0], descriptors, &*socket, &fds[1]);
    let program = program.map_err(cannot_place)?;
    drop(fds);
    tell(socket, &None::<String>).map_err(gone)?;
    program.execute(&order.name, None)
}

/// The error that a new process cannot have all its descriptors.
pub(crate) fn cannot_place(errno: Errno) -> Error {
    Error::Restore(format!(
        "cannot place descriptors: {}; raise the limit with ulimit -n",
        errno.desc()
    ))
}
