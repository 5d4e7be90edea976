//! Where a job is restored: in our pid namespace, or in a new one.

use std::os::fd::OwnedFd;

use super::exit::{Failure, complain};
use crate::error::Error;
use crate::isolate::{self, First, Link};
use crate::restore::env::{HandOver, Prepared};
use crate::restore::{self, Opened, Pids, Place, Placed};
use crate::supervise::foreground::Foreground;
use crate::supervise::{Child, Supervised};

/// A restored, running job.
pub(super) struct Launched {
    /// Its root, in our pid namespace.
    pub pid: i32,
    /// Differences from the checkpointed state.
    pub warnings: Vec<String>,
    /// The job has our terminal until this is dropped.
    pub terminal: Option<Foreground>,
    /// The master of the job's terminal, if that is a new one.
    pub master: Option<OwnedFd>,
    /// The job to wait for.
    pub job: Box<dyn Supervised>,
}

/// Restores where the pids can be assigned. A choice that was not requested is reported, unless `quiet`.
pub(super) fn launch(
    opened: Opened<'_>,
    wanted: Pids,
    values: &[(String, String)],
    quiet: bool,
) -> Result<Launched, Failure> {
    let values = HandOver::of(&opened, values)?;
    let mut placed = opened.place(wanted)?;
    match placed.place().clone() {
        Place::Here => {
            if let Some(note) = restore::note_of_waiting(&placed).filter(|_| !quiet) {
                complain(&note);
            }
            here(&mut placed, values)
        }
        Place::Namespace(why) => {
            if let Some(why) = why.as_ref().filter(|_| !quiet) {
                complain(&format!("{why}: restoring in a pid namespace of its own"));
                if let Some(pid) = restore::still_runs(&placed) {
                    complain(&format!(
                        "warning: the job still runs, as process {pid}: from now on both write to the same \
                         files"
                    ));
                }
            }
            in_namespace(&mut placed, values).map_err(|error| match why {
                Some(why) => Failure::Message(format!("{error} ({why})")),
                None => error.into(),
            })
        }
    }
}

fn here(placed: &mut Placed<'_>, values: Option<HandOver>) -> Result<Launched, Failure> {
    placed.restored_here();
    let mut terminal = None;
    let mut prepared = values.map(|values| values.prepare()).transpose()?;
    let mut published = Ok(());
    let mut restored = restore::restore(placed, &mut |foreground| {
        terminal = foreground.and_then(Foreground::lend);
        published = prepared.take().map_or(Ok(()), Prepared::publish);
    })?;
    let unpublished = published.err().map(|error| error.to_string());
    restored.warnings.extend(unpublished);
    terminal.iter().for_each(Foreground::redraw);
    Ok(Launched {
        pid: restored.pid,
        warnings: restored.warnings,
        terminal,
        master: restored.master,
        job: Box::new(Child(restored.pid)),
    })
}

fn in_namespace(placed: &mut Placed<'_>, values: Option<HandOver>) -> Result<Launched, Error> {
    let spec = placed.namespaces()?;
    let mut init = isolate::start(&spec, |link: &Link, first: Option<First>| {
        inside(placed, values, link, first)
    })?;
    let running = init.until_it_runs()?;
    Ok(Launched {
        pid: running.pid,
        warnings: running.warnings,
        terminal: running.terminal,
        master: running.master,
        job: Box::new(init),
    })
}

/// The work of a process in the namespace.
fn inside(
    placed: &mut Placed<'_>,
    values: Option<HandOver>,
    link: &Link,
    first: Option<First>,
) -> Result<i32, String> {
    let told = placed.restored_inside(first);
    told.map_err(|error| error.to_string())?;
    if let Some(values) = values {
        values.mount().map_err(|error| error.to_string())?;
    }
    let restored = restore::restore(placed, &mut |foreground| {
        // Without the process outside we are killed here.
        let _ = link.ready(foreground);
    });
    let restored = restored.map_err(|error| error.to_string())?;
    let _ = link.running(restored.pid, restored.warnings, restored.master);
    Ok(restored.pid)
}
