//! The first process of a pid namespace that is to be the job's own root: until it executes the
//! job's program it waits for the process that rebuilds the job, and does what that one says. That one
//! is created beside it and not above it: its end must not be told to the job.

use std::ffi::CString;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ckpt_sys::Errno;
use ckpt_sys::channel::{self, Channel};
use ckpt_sys::exec::Program;
use ckpt_sys::process::leave;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::objects::clock::Clocks;

/// The end of whoever rebuilds the job. It is open until that one ends: the first process would end
/// before, and with it everybody in the namespace, who then could not say why.
#[derive(Debug)]
pub struct First(ManuallyDrop<Channel>);

/// What comes before the descriptors: the program, where to report to, and these numbers.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    name: CString,
    clocks: Clocks,
    numbers: Vec<i32>,
}

impl First {
    pub(super) fn new(channel: Channel) -> Self {
        Self(ManuallyDrop::new(channel))
    }

    /// Tells it to become a process with these descriptors that executes this program; it does so
    /// when it is let [`go`](Self::go), and ends when we do.
    ///
    /// # Errors
    /// Its answer, or that it was killed.
    pub fn order(
        &self,
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
        let fds = descriptors.iter().map(|(fd, _)| fd.as_fd());
        let fds = [executable.as_fd(), report.as_fd()].into_iter().chain(fds);
        let fds: Vec<BorrowedFd<'_>> = fds.collect();
        let told = self.0.send_with(&order, &fds);
        let answer: channel::Result<Option<String>> = told.and_then(|()| self.0.receive());
        match answer {
            Ok(None) => Ok(()),
            Ok(Some(text)) => Err(Error::Restore(text)),
            Err(error) => Err(Error::Restore(format!(
                "the first process of the job's pid namespace cannot be told what to do: {error}"
            ))),
        }
    }

    /// A byte here lets it go on.
    pub fn go(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the first process does.
pub(super) fn serve(channel: Channel) -> ! {
    match obey(&channel) {
        Ok(()) => {}
        Err(Error::File { .. }) => leave(1),
        Err(error) => {
            let _ = channel.send(&Some(error.to_string()));
        }
    }
    // Whoever was told ends first.
    channel.wait_for_hangup();
    leave(1)
}

fn obey(channel: &Channel) -> Result<()> {
    let gone = |error: channel::Error| Error::File {
        what: "hear from",
        path: "whoever rebuilds the job".into(),
        source: error.into(),
    };
    // It can have no more than we may.
    crate::objects::limits::raise_descriptor_limit();
    let (order, mut fds): (Order, _) = channel.receive_with().map_err(gone)?;
    if fds.len() != order.numbers.len() + 2 {
        return Err(gone(channel::Error::Malformed("an order".into())));
    }
    order.clocks.join()?;
    let descriptors: Vec<(OwnedFd, i32)> = fds.drain(2..).zip(order.numbers).collect();
    let program = Program::prepare(&fds[0], descriptors, channel, &fds[1]);
    let program = program.map_err(cannot_place)?;
    drop(fds);
    channel.send(&None::<String>).map_err(gone)?;
    program.execute(&order.name, None)
}

/// The error that a new process cannot have all its descriptors.
pub(crate) fn cannot_place(errno: Errno) -> Error {
    Error::Restore(format!(
        "cannot place descriptors: {}; raise the limit with ulimit -n",
        errno.desc()
    ))
}
