//! System V objects: common parts of the three kinds.
//!
//! A kind is a record in a file of its own, which implements [`IpcObject`], a field of [`Ipc`], and a part of
//! [`each_kind`].

use ckpt_image::Reader;
use ckpt_sys::sysv;
use ckpt_tracer::capabilities::Use;
use ckpt_tracer::proc::maps::Vma;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::table::{Row, Type};
use super::{Claim, Ipc, Job, Place};
use crate::Snapshot;
use crate::bounds;
use crate::error::{Error, Obstacle, Result};
use crate::plan::Builder;
use crate::process::Process;
use crate::references::Faults;
use crate::source::{Collector, Source};

/// Common attributes of System V objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Its id.
    #[serde(deserialize_with = "bounds::id")]
    pub id: i32,
    /// Its key, 0 for a private one.
    pub key: i32,
    /// Permission bits.
    #[serde(deserialize_with = "bounds::mode")]
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Its creator's user id.
    pub creator_uid: u32,
    /// Its creator's group id.
    pub creator_gid: u32,
}

/// The IPC namespace of a job being captured: the job, its processes with their mappings, and the objects of one
/// kind.
pub(super) struct Sight<'a> {
    pub(super) job: &'a Job,
    pub(super) processes: &'a [(&'a Source, &'a [Vma])],
    pub(super) rows: &'a [Row],
}

/// The IPC namespace of a restore.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) snapshot: &'a Snapshot,
    /// The existing objects of one kind.
    pub(super) rows: &'a [Row],
    /// Whether it is the namespace in which the job was.
    pub(super) same: bool,
    /// Whether the job is alive and will end.
    pub(super) leaving: bool,
}

/// An object prepared for the job. Changes are undone when it is dropped, unless it was kept.
pub(super) trait Ready {
    /// The job owns it now.
    fn keep(self: Box<Self>);
}

/// A kind of System V object.
pub(super) trait IpcObject: Sized {
    /// Which kind.
    const TYPE: Type;
    /// Whether a job may have some of another program ([`Claim::Possible`]).
    const MAY_BE_OTHERS: bool = true;

    /// Those of a job, mutable.
    fn all(ipc: &mut Ipc) -> &mut Vec<Self>;
    /// Those of a job.
    fn each(ipc: &Ipc) -> &[Self];
    /// Its common attributes.
    fn object(&self) -> &Object;
    /// Why it is attributed to the job.
    fn claim(&self) -> Claim;

    /// Adds those of the job.
    fn capture(sight: &Sight, collector: &mut Collector);
    /// Checks its consistency.
    fn check(&self, faults: &mut Faults);
    /// Removes what a restore changes.
    fn make_comparable(&mut self) {}
    /// Whether it may be restored or created. `index` is its index among all of its kind.
    fn in_the_way(&self, index: usize, site: &Site) -> Result<(), Obstacle>;
    /// Creates it as it was at the checkpoint.
    fn create(&self, image: &Reader, warnings: &mut Vec<String>) -> Result<Box<dyn Ready>>;
    /// Restores the state of the existing one.
    fn put_back(
        &self,
        index: usize,
        row: &Row,
        site: &Site,
        image: &Reader,
    ) -> Result<Option<Box<dyn Ready>>>;
    /// Appends what a process does for these objects before its threads are created.
    fn rebuild(process: &Process, snapshot: &Snapshot, plan: &mut Builder);
    /// The same, after all processes have done that.
    fn finish(_process: &Process, _snapshot: &Snapshot, _plan: &mut Builder) {}

    /// Its name in messages.
    fn title(&self) -> String {
        self.object().title(Self::TYPE)
    }

    /// The obstacle that the existing one is not as the job left it.
    fn changed(&self, reason: String) -> Obstacle {
        let remedy = format!(
            "remove it if no other program needs it (ipcrm {} {}), or restore in an IPC namespace of its own: \
             unshare --ipc restore IMAGE",
            Self::TYPE.ipcrm_option(),
            self.object().id
        );
        Obstacle::new(self.title(), reason, remedy)
    }
}

/// The answers of an expression for each kind, as a type, in the order of their creation.
macro_rules! each_kind {
    ($kind:ident => $answer:expr) => {
        [
            {
                type $kind = $crate::ipc::sysv_shm::Segment;
                $answer
            },
            {
                type $kind = $crate::ipc::sysv_sem::Set;
                $answer
            },
            {
                type $kind = $crate::ipc::sysv_msg::Queue;
                $answer
            },
        ]
    };
}
pub(super) use each_kind;

/// Creates an object of the job, or restores the existing one.
pub(super) fn prepare<T: IpcObject>(
    (index, object): (usize, &T),
    site: &Site,
    image: &Reader,
    warnings: &mut Vec<String>,
) -> Result<Option<Box<dyn Ready>>> {
    let found = match object.claim() {
        Claim::Used => site.find(object).map_err(Error::refuse)?,
        Claim::Possible if site.wants_possible(object, warnings) => Found::Missing,
        Claim::Possible => return Ok(None),
    };
    match found {
        Found::Missing => object.create(image, warnings).map(Some),
        Found::Same(row) => object.put_back(index, row, site, image),
    }
}

impl<'a> Site<'a> {
    pub(super) fn of(snapshot: &'a Snapshot, rows: &'a [Row], leaving: bool) -> Self {
        Self {
            snapshot,
            rows,
            same: snapshot.ipc.place == Place::here(),
            leaving,
        }
    }

    /// The existing object with the id or key of an object.
    pub(super) fn find<T: IpcObject>(&self, of: &T) -> Result<Found<'a>, Obstacle> {
        let (object, kind) = (of.object(), T::TYPE);
        let remedy = format!(
            "remove that one if it is not needed (ipcrm {} ID), or restore in an IPC namespace of its own: \
             unshare --ipc restore IMAGE",
            kind.ipcrm_option()
        );
        if let Some(row) = self.rows.iter().find(|row| row.id() == object.id) {
            let same = self.same
                && row.key() == object.key
                && row.get("cuid") as u32 == object.creator_uid;
            return match same {
                true => Ok(Found::Same(row)),
                false => Err(Obstacle::new(
                    of.title(),
                    "does not exist any more, and another object has its id",
                    remedy,
                )),
            };
        }
        let mut rows = self.rows.iter();
        match rows.find(|row| object.key != 0 && row.key() == object.key) {
            None => Ok(Found::Missing),
            Some(row) => Err(Obstacle::new(
                of.title(),
                format!(
                    "does not exist any more, and {} has its key",
                    Object::of(row).id
                ),
                remedy,
            )),
        }
    }

    /// The obstacle for an object of the job: it may not be created, or the existing one may not be changed, which
    /// `changeable` decides.
    pub(super) fn one_in_the_way<T: IpcObject>(
        &self,
        of: &T,
        changeable: impl FnOnce(&Row) -> Result<(), Obstacle>,
    ) -> Result<(), Obstacle> {
        if of.claim() == Claim::Possible {
            return Ok(());
        }
        match self.find(of)? {
            Found::Missing => may_create(of),
            Found::Same(row) => changeable(row),
        }
    }

    /// Whether to create an object that may be another program's; if it does not exist any more a warning says what
    /// becomes of it. One with a key is not created: other programs would find it.
    pub(super) fn wants_possible<T: IpcObject>(&self, of: &T, warnings: &mut Vec<String>) -> bool {
        let reason = match self.find(of) {
            Ok(Found::Same(_)) => return false,
            Ok(Found::Missing) if of.object().key == 0 => match may_create(of) {
                Ok(()) => return true,
                Err(obstacle) => obstacle.reason,
            },
            Ok(Found::Missing) => "does not exist any more".into(),
            Err(obstacle) => obstacle.reason,
        };
        warnings.push(format!(
            "{} was made by the job's user while the job ran, but not used by it so far; it {reason} and \
             is left so",
            of.title(),
        ));
        false
    }
}

impl Object {
    pub(super) fn of(row: &Row) -> Self {
        Self {
            id: row.id(),
            key: row.key(),
            mode: row.get("perms") as u32 & 0o777,
            uid: row.get("uid") as u32,
            gid: row.get("gid") as u32,
            creator_uid: row.get("cuid") as u32,
            creator_gid: row.get("cgid") as u32,
        }
    }

    /// Its name in messages.
    pub(super) fn title(&self, kind: Type) -> String {
        match self.key {
            0 => format!("{} {}", kind.label(), self.id),
            key => format!("{} {} (key {key:#010x})", kind.label(), self.id),
        }
    }

    pub(super) fn access(&self) -> sysv::Access {
        sysv::Access {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
        }
    }
}

/// Whether an object still exists.
pub(super) enum Found<'a> {
    Same(&'a Row),
    Missing,
}

/// The obstacle if a missing object may not be created under its id.
pub(super) fn may_create<T: IpcObject>(of: &T) -> Result<(), Obstacle> {
    match std::fs::OpenOptions::new()
        .write(true)
        .open(next_id(T::TYPE))
    {
        Ok(_) => Ok(()),
        Err(e) => Err(Obstacle::new(
            of.title(),
            format!(
                "does not exist any more, and you may not create one under that id, which needs {} ({})",
                Use::ChooseIpcIds,
                e.kind()
            ),
            "run restore as root, or in an IPC namespace of its own: \
             unshare --map-root-user --ipc restore IMAGE",
        )),
    }
}

/// The sysctl for the id of the next object of a kind.
fn next_id(kind: Type) -> String {
    format!("/proc/sys/kernel/{}_next_id", kind.name())
}

/// Creates an object under its id. `create` creates it, `remove` removes one that got another id.
pub(super) fn create<T: IpcObject>(
    of: &T,
    create: impl FnOnce() -> Result<i32, Errno> + Send,
    remove: impl FnOnce(i32),
) -> Result<()> {
    let (object, path) = (of.object(), next_id(T::TYPE));
    std::fs::write(&path, object.id.to_string()).map_err(Error::file("choose an id with", path))?;
    let made = as_creator(object.creator_uid, object.creator_gid, create);
    match made {
        Ok(id) if id == object.id => Ok(()),
        Ok(other) => {
            remove(other);
            Err(Error::refuse(Obstacle::new(
                of.title(),
                format!(
                    "does not exist any more, and its place in the kernel's table is taken: a new \
                     one got the id {other}"
                ),
                "restore in an IPC namespace of its own: unshare --ipc restore IMAGE",
            )))
        }
        Err(errno) => Err(failed(of, "created", errno)),
    }
}

pub(super) fn failed<T: IpcObject>(of: &T, what: &str, errno: Errno) -> Error {
    Error::object(format!("the {}", of.title()), what, errno.desc())
}

/// Runs `create` with these effective ids, which become the creator's. In a thread of its own: the C library would
/// change those of all threads.
fn as_creator<T: Send>(
    uid: u32,
    gid: u32,
    create: impl FnOnce() -> Result<T, Errno> + Send,
) -> Result<T, Errno> {
    let me = (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    );
    if me == (uid, gid) || me.0 != 0 {
        return create();
    }
    let thread = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                ckpt_sys::credentials::set_effective(uid, gid);
                create()
            })
            .join()
    });
    thread.unwrap_or(Err(Errno::EIO))
}
