//! The first process of a pid namespace that becomes the job's own root: until it executes the job's program it obeys
//! the process that rebuilds the job. That one is its sibling, not its parent: its end must not be reported to the
//! job.

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

/// The building process's end of the connection. It stays open until that process ends: otherwise the first process
/// would end before, killing every process in the namespace without a report.
#[derive(Debug)]
pub struct First(ManuallyDrop<Channel>);

/// The message that precedes the descriptors: the program, the report descriptor, and the target numbers.
#[derive(Debug, Serialize, Deserialize)]
struct ExecRequest {
    name: CString,
    clocks: Clocks,
    numbers: Vec<i32>,
}

impl First {
    pub(super) fn new(channel: Channel) -> Self {
        Self(ManuallyDrop::new(channel))
    }

    /// Tells it to execute this program with these descriptors; it does so after [`go`](Self::go), and ends when we
    /// do.
    ///
    /// # Errors
    /// Its error, or that it was killed.
    pub fn request_exec(
        &self,
        executable: &File,
        descriptors: &[(OwnedFd, i32)],
        report: &OwnedFd,
        name: CString,
        clocks: Clocks,
    ) -> Result<()> {
        let request = ExecRequest {
            name,
            clocks,
            numbers: descriptors.iter().map(|(_, number)| *number).collect(),
        };
        let fds = descriptors.iter().map(|(fd, _)| fd.as_fd());
        let fds = [executable.as_fd(), report.as_fd()].into_iter().chain(fds);
        let fds: Vec<BorrowedFd<'_>> = fds.collect();
        let told = self.0.send_with(&request, &fds);
        let answer: channel::Result<Option<String>> = told.and_then(|()| self.0.receive());
        match answer {
            Ok(None) => Ok(()),
            Ok(Some(text)) => Err(Error::Reported(text)),
            Err(error) => Err(Error::object(
                "the first process of the job's pid namespace",
                "asked to execute the program",
                error,
            )),
        }
    }

    /// A byte here permits the exec.
    pub fn go(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Main function of the first process.
pub(super) fn serve(channel: Channel) -> ! {
    match execute_requested(&channel) {
        Ok(()) => {}
        Err(Error::File { .. }) => leave(1),
        Err(error) => {
            let _ = channel.send(&Some(error.to_string()));
        }
    }
    // Until the building process has ended.
    channel.wait_for_hangup();
    leave(1)
}

fn execute_requested(channel: &Channel) -> Result<()> {
    let gone = Error::file("receive from", "the process that rebuilds the job");
    // Its limit of descriptors must be ours.
    crate::objects::limits::raise_descriptor_limit();
    let (request, mut fds): (ExecRequest, _) = channel.receive_with().map_err(&gone)?;
    if fds.len() != request.numbers.len() + 2 {
        return Err(gone(channel::Error::Malformed(
            "a request to execute".into(),
        )));
    }
    request.clocks.join()?;
    let descriptors: Vec<(OwnedFd, i32)> = fds.drain(2..).zip(request.numbers).collect();
    let program = Program::prepare(&fds[0], descriptors, channel, &fds[1]);
    let program = program.map_err(cannot_place)?;
    drop(fds);
    channel.send(&None::<String>).map_err(&gone)?;
    program.execute(&request.name, None)
}

/// The error when a new process cannot have all its descriptors.
pub(crate) fn cannot_place(errno: Errno) -> Error {
    let reason = format!("{}; raise the limit with ulimit -n", errno.desc());
    Error::step("place descriptors", reason)
}
