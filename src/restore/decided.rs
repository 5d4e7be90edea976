//! Everything of a restore that can be decided before anything is created, decided once and for all: everything that
//! stands in its way is found at once.

use std::fmt;

use ckpt_image::Reader;

use super::Request;
use super::adapted::Adapted;
use super::decide::{host, pids, surroundings};
use super::files::put::{self, Put};
use super::placed::Placed;
use super::plan::Job;
use crate::error::{Error, Obstacle, Result};
use crate::objects::clock::Clocks;
use crate::objects::files::changed::Cut;
use crate::objects::findings::Findings;
use crate::objects::plan::Inherit;
use crate::objects::{credentials, ipc, rights};
use crate::text::Shown;

/// What a job is restored from.
pub(super) struct Decided<'p> {
    pub(super) request: &'p Request<'p>,
    pub(super) image: &'p Reader,
    pub(super) snapshot: &'p Adapted,
    /// Its pids and where it has them.
    pub(super) placed: &'p Placed<'p>,
    /// Its clocks.
    pub(super) clocks: Clocks,
    /// What all plans are made from.
    pub(super) job: Job<'p>,
    /// What the root needs from us.
    pub(super) inherit: Vec<Inherit>,
    /// Files that are put back.
    pub(super) puts: Vec<Put<'p>>,
    /// Files that are cut.
    pub(super) cuts: Vec<Cut>,
}

/// What was found of a restore that is not to be made.
pub struct Looked<'p> {
    /// Nothing if something stands in the way.
    decided: Option<Decided<'p>>,
    /// What does, the pids aside.
    findings: Findings,
    /// What stands in the way of the job's pids.
    of_pids: Vec<Obstacle>,
}

impl<'p> Decided<'p> {
    /// Looks at everything, and touches nothing.
    pub(super) fn of(placed: &'p mut Placed<'_>, with_first: bool) -> Result<Self> {
        let pids = pids::in_the_way(placed, with_first);
        match decide(placed)? {
            (Some(decided), _) if pids.is_empty() => Ok(decided),
            (_, mut findings) => {
                findings.extend(pids);
                Err(Error::Refused(findings.obstacles))
            }
        }
    }

    /// Whether ids that are not the next ones are no reason to wait for them: they are not far.
    pub(super) fn is_not_waited_for(&self) -> bool {
        pids::awaited(self.snapshot, self.placed.means).is_none()
    }

    /// Whether nothing has come in the way of the job's pids meanwhile.
    pub(super) fn look_again(&self) -> Result<()> {
        let obstacles = pids::in_the_way_now(self.placed);
        match obstacles.is_empty() {
            true => Ok(()),
            false => Err(Error::Refused(obstacles)),
        }
    }

    /// The plans as text, one operation a line.
    fn tell(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) -> Result<()> {
        let nothing_put = put::warning(self.request.put_files, self.snapshot);
        for warning in self.placed.opened.findings.notes.iter().chain(&nothing_put) {
            line(format_args!("# warning: {warning}"));
        }
        for path in &self.snapshot.given {
            line(format_args!("# take {} from the image", path.shown()));
        }
        for put in &self.puts {
            line(format_args!("# {}", put.describe()));
        }
        for cut in &self.cuts {
            line(format_args!("# {}", cut.describe()));
        }
        for index in self.job.owners() {
            let planned = self.job.plan(index, &[], None).map_err(Error::Refused)?;
            if self.snapshot.processes.len() > 1 {
                let pid = self.snapshot.processes[index].pid;
                line(format_args!("# process {pid}"));
            }
            for warning in &planned.plan.warnings {
                line(format_args!("# warning: {warning}"));
            }
            planned.plan.tell(line);
        }
        Ok(())
    }
}

impl<'p> Looked<'p> {
    pub(super) fn at(placed: &'p mut Placed<'_>) -> Result<Self> {
        let of_pids = placed.against.obstacles.clone();
        let (decided, findings) = decide(placed)?;
        Ok(Self {
            decided,
            findings,
            of_pids,
        })
    }

    /// Everything that stands in the way; empty when there is nothing.
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let mut all = self.findings.clone();
        all.extend(self.of_pids.iter().cloned());
        all.obstacles
    }

    /// The plans as text, one operation a line; what is against the job's pids is told by the restore.
    ///
    /// # Errors
    /// [`Error::Refused`] names all else that stands in the way.
    pub fn dry_run(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) -> Result<()> {
        match &self.decided {
            Some(decided) => decided.tell(line),
            None => Err(Error::Refused(self.findings.obstacles.clone())),
        }
    }
}

/// Decides all that does not depend on which ids are taken; nothing if there are obstacles.
fn decide<'p>(placed: &'p mut Placed<'_>) -> Result<(Option<Decided<'p>>, Findings)> {
    let opened = &mut placed.opened;
    let mut findings = Findings::from(opened.findings.obstacles.clone());
    let clocks = opened
        .snapshot
        .decide_clocks(opened.request.clock, &opened.probed);
    let clocks = findings.collect(clocks)?;
    let placed = &*placed;
    let (opened, snapshot) = (&placed.opened, placed.snapshot());
    let (request, image, probed) = (opened.request, &opened.image, placed.probed());
    let leaving = !request.objects.leaving.is_empty();
    findings.extend(surroundings::in_the_way(snapshot, &probed.kernel, leaving));
    let ours = (&placed.groups_there[..], placed.means, leaving);
    let host = host::state(snapshot, probed, ours);
    findings.extend(host.switches.obstacle());
    let job = match Job::new(
        snapshot,
        image,
        request,
        host,
        (&probed.kernel, opened.room),
    ) {
        Ok(job) => Some(job),
        Err(more) => {
            findings.extend(more);
            None
        }
    };
    let mut inherit = Vec::new();
    // First plans find what stands in their way.
    if let Some(job) = &job {
        for index in job.owners() {
            match job.draft(index) {
                Ok(needed) if index == 0 => inherit = needed,
                Ok(_) => {}
                Err(more) => findings.extend(more),
            }
        }
    }
    let puts = put::decide(snapshot, image, request.put_files);
    let puts = findings.collect(puts)?;
    let rights = job.as_ref().and_then(|job| job.host.rights.as_ref());
    let cuts = rights::with(rights, || Cut::all(snapshot, &request.objects));
    let cuts = findings.collect(cuts.map_err(Error::Refused))?;
    // In a namespace of its own everything is missing, and may be created.
    if placed.inside || !snapshot.namespaces.ipc {
        findings.collect(ipc::refuse(snapshot, &request.objects))?;
    }
    if let Some(job) = &job {
        let (now, held) = (&job.host.credentials, job.host.held);
        // What ids there are, and what may be done with them, shows inside.
        findings.extend(match placed.inside || snapshot.namespaces.user.is_none() {
            true => credentials::obstacles(snapshot, now, held, &placed.groups),
            false => credentials::foreign_groups(snapshot, &placed.groups),
        });
    }
    let decided = job.filter(|_| findings.is_clear()).map(|job| Decided {
        request,
        image,
        snapshot,
        placed,
        clocks,
        job,
        inherit,
        puts,
        cuts,
    });
    Ok((decided, findings))
}
