//! All decisions of a restore, made once, before anything is created. All obstacles are found together.

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
use crate::objects::sockets::inet;
use crate::objects::{credentials, ipc, rights};
use crate::text::Shown;

/// The decisions of a restore without obstacles. Immutable.
pub(super) struct Decided<'p> {
    pub(super) request: &'p Request<'p>,
    pub(super) image: &'p Reader,
    pub(super) snapshot: &'p Adapted,
    /// The pid namespace of the job.
    pub(super) placed: &'p Placed<'p>,
    /// The clocks of the job.
    pub(super) clocks: Clocks,
    /// The common part of all plans.
    pub(super) job: Job<'p>,
    /// Descriptors that the root inherits from us.
    pub(super) inherit: Vec<Inherit>,
    /// Files to be put back.
    pub(super) puts: Vec<Put<'p>>,
    /// Files to be truncated.
    pub(super) cuts: Vec<Cut>,
}

/// The decisions of a restore that is only examined.
pub struct Looked<'p> {
    /// `None` if there are obstacles.
    decided: Option<Decided<'p>>,
    /// Obstacles and notes, except those about pids.
    findings: Findings,
    /// Obstacles to the pids of the job.
    of_pids: Vec<Obstacle>,
}

impl<'p> Decided<'p> {
    /// Makes all remaining decisions, without side effects. `with_first`: the first process of our pid namespace becomes the root.
    ///
    /// # Errors
    /// [`Error::Refused`] with all obstacles; other errors if this machine cannot be examined.
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

    /// Whether an id that another process was given can be aimed at again at once, without waiting for many others.
    pub(super) fn is_not_waited_for(&self) -> bool {
        pids::awaited(self.snapshot, self.placed.pid_method).is_none()
    }

    /// Checks again that the ids of the job are free.
    ///
    /// # Errors
    /// [`Error::Refused`] if they are not.
    pub(super) fn look_again(&self) -> Result<()> {
        let obstacles = pids::in_the_way_now(self.placed);
        match obstacles.is_empty() {
            true => Ok(()),
            false => Err(Error::Refused(obstacles)),
        }
    }

    /// Writes the plans as text, one operation a line.
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

    /// All obstacles.
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let mut all = self.findings.clone();
        all.extend(self.of_pids.iter().cloned());
        all.obstacles
    }

    /// Writes the plans as text, one operation a line, whether or not the pids of the job are free.
    ///
    /// # Errors
    /// [`Error::Refused`] with all other obstacles.
    pub fn dry_run(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) -> Result<()> {
        match &self.decided {
            Some(decided) => decided.tell(line),
            None => Err(Error::Refused(self.findings.obstacles.clone())),
        }
    }
}

/// Makes all decisions that do not depend on which ids are free; `None` if there are obstacles.
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
    let ours = (&placed.groups_there[..], placed.pid_method, leaving);
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
    // Draft plans find the obstacles to them.
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
    // A new IPC namespace is empty.
    if placed.inside || !snapshot.namespaces.ipc {
        findings.collect(ipc::refuse(snapshot, &request.objects))?;
    }
    if let Some(job) = &job {
        let (now, held) = (&job.host.credentials, job.host.held);
        findings.extend(inet::in_the_way(snapshot, held, leaving));
        // Which ids are mapped and may be set is only visible inside the user namespace.
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
