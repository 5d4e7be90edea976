//! The way of a restore, looked at as a whole before anything is created: everything that stands in
//! it is found at once.

use std::path::PathBuf;

use ckpt_image::{Arch, Reader};
use ckpt_tracer::features::KernelFeatures;

use super::clock::ClockPolicy;
use super::plan::Inherit;
use super::planner::Job;
use super::put::{self, Put};
use super::{Request, bundle, paths, pids, surroundings};
use crate::error::{Error, Obstacle, Result};
use crate::inspect::references;
use crate::objects::files::changed::Cut;
use crate::objects::vdso::{self, Replaced};
use crate::objects::{Host, Snapshot, ipc, processor};
use crate::snapshot;

/// An image that can be believed.
pub(super) struct Opened {
    pub(super) image: Reader,
    /// With the paths that its files have now.
    pub(super) snapshot: Snapshot,
    kernel: KernelFeatures,
    vdso: Replaced,
    /// What has come up already.
    obstacles: Vec<Obstacle>,
    /// What the job has to do without, one sentence each.
    pub(super) warnings: Vec<String>,
    /// Bundled files that are not as they were here.
    pub(super) given: Vec<PathBuf>,
}

impl Opened {
    /// Why the job cannot have its ids.
    pub(super) fn pids_in_the_way(&self, job: &Job<'_>) -> Vec<Obstacle> {
        let ids = pids::ids(&self.snapshot, &job.births);
        let mut obstacles = pids::taken(&ids);
        obstacles.extend(pids::not_to_be_had(&self.snapshot, &ids, &self.kernel));
        obstacles
    }
}

/// What a job is restored from.
pub(super) struct Way<'a> {
    pub(super) job: Job<'a>,
    /// What the root needs from us.
    pub(super) inherit: Vec<Inherit>,
    pub(super) puts: Vec<Put<'a>>,
    pub(super) cuts: Vec<Cut>,
}

/// Opens an image for a restore; `clock` decides about its clocks.
///
/// # Errors
/// [`Error::Image`] and [`Error::Metadata`]. What is in the way is only noted.
pub(super) fn open(
    request: &Request<'_>,
    clock: fn(ClockPolicy, &mut Host) -> Result<()>,
) -> Result<Opened> {
    let image = Reader::open(request.image)?;
    image.require_arch(Arch::native())?;
    let mut snapshot = snapshot::read(&image, request.image)?;
    if let Some(what) = references::check(&snapshot, &image).into_iter().next() {
        let path = request.image.to_owned();
        return Err(Error::Metadata { path, what });
    }
    let kernel = KernelFeatures::probe();
    let verdict = processor::judge(&snapshot, &kernel.cpu);
    let warnings = verdict.warning().into_iter().collect();
    let mut obstacles = verdict.obstacles;
    obstacles.extend(
        paths::apply(&request.map_paths, &mut snapshot)
            .err()
            .into_iter()
            .flatten(),
    );
    refused_or(clock(request.clock, &mut snapshot.host), &mut obstacles)?;
    put::forget(request.put_files, &mut snapshot);
    let vdso = vdso::adapt(&mut snapshot).map_err(Error::Refused);
    let vdso = refused_or(vdso, &mut obstacles)?;
    let given = bundle::choose(&mut snapshot, request);
    Ok(Opened {
        image,
        snapshot,
        kernel,
        vdso,
        obstacles,
        warnings,
        given,
    })
}

/// Looks at everything, and touches nothing.
///
/// # Errors
/// [`Error::Refused`] names all that is in the way. Other errors are those of looking.
pub(super) fn look<'a>(opened: &'a Opened, request: &'a Request<'a>) -> Result<Way<'a>> {
    let (image, snapshot) = (&opened.image, &opened.snapshot);
    let mut obstacles = opened.obstacles.clone();
    obstacles.extend(surroundings::in_the_way(snapshot, &opened.kernel));
    let mut inherit = Vec::new();
    let job = match Job::new(snapshot, image, request, super::host_state()?, &opened.vdso) {
        Ok(job) => Some(job),
        Err(more) => {
            obstacles.extend(more);
            None
        }
    };
    // First plans find what stands in their way.
    if let Some(job) = &job {
        for index in job.owners() {
            match job.draft(index) {
                Ok(plan) if index == 0 => inherit = plan.inherit,
                Ok(_) => {}
                Err(more) => obstacles.extend(more),
            }
        }
    }
    let puts = put::decide(snapshot, image, request.put_files);
    let puts = refused_or(puts, &mut obstacles)?;
    let cuts = Cut::all(snapshot, request).map_err(Error::Refused);
    let cuts = refused_or(cuts, &mut obstacles)?;
    refused_or(ipc::refuse(snapshot, request), &mut obstacles)?;
    match job {
        Some(job) if obstacles.is_empty() => Ok(Way {
            job,
            inherit,
            puts,
            cuts,
        }),
        job => {
            obstacles.extend(job.iter().flat_map(|job| opened.pids_in_the_way(job)));
            Err(Error::Refused(each_once(obstacles)))
        }
    }
}

/// Collects a refusal with the others.
fn refused_or<T: Default>(result: Result<T>, obstacles: &mut Vec<Obstacle>) -> Result<T> {
    match result {
        Err(Error::Refused(more)) => {
            obstacles.extend(more);
            Ok(T::default())
        }
        other => other,
    }
}

/// Several processes may meet the same.
fn each_once(obstacles: Vec<Obstacle>) -> Vec<Obstacle> {
    let mut once: Vec<Obstacle> = Vec::with_capacity(obstacles.len());
    for obstacle in obstacles {
        if !once.contains(&obstacle) {
            once.push(obstacle);
        }
    }
    once
}
