//! Creates the namespaces, see unshare(2), user_namespaces(7), pid_namespaces(7).

use std::io;

use ckpt_sys::channel::Channel;
use ckpt_sys::mounts::follow_the_outer;
use ckpt_sys::namespaces::{set_names, unshare};
use ckpt_sys::process::{self, Fork, leave};
use ckpt_tracer::capabilities::{Held, Use};
use nix::unistd::{getegid, geteuid};

use super::first::{self, First};
use super::idmap::IdMaps;
use super::link::{Event, Link};
use super::outside::Init;
use super::owner::Owner;
use super::work::{Body, keep_capabilities, work};
use crate::error::{Error, Result};
use crate::objects::namespaces::{Names, Namespaces};

/// The namespaces to create: a pid namespace, and a mount namespace with its `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// Within a user namespace with these id mappings.
    pub ids: Option<IdMaps>,
    /// The user who creates and owns it, if not us.
    pub owner: Option<Owner>,
    /// The job's other own namespaces.
    pub others: Namespaces,
    /// An empty network namespace.
    pub network: bool,
    /// The job's root is the first process, and the building process has this pid meanwhile.
    pub builder: Option<i32>,
}

impl Spec {
    /// For the calling user, who stays the same inside.
    pub fn own() -> Self {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let ids = || IdMaps::one((uid, uid), (gid, gid));
        Self {
            ids: (!may_without_user_namespace()).then(ids),
            ..Self::default()
        }
    }
}

/// Creates the namespaces; `body` runs in the first process, whose child the job's root is, or in the building
/// process.
///
/// Must be called while this process is single-threaded.
///
/// # Errors
/// When the namespaces cannot be created. Nothing is left of them.
pub fn start(spec: &Spec, body: impl Body) -> Result<Init> {
    // The first process becomes our child when the intermediate process ends.
    ckpt_sys::prctl::adopt_orphans();
    let (link, inner) = Link::pair().map_err(|e| cannot("prepare")(e.into()))?;
    let middle = match process::fork().map_err(|e| cannot("prepare")(e.into()))? {
        Fork::Child => {
            drop(link);
            in_the_middle(spec, inner, body)
        }
        Fork::Parent(child) => {
            drop(inner);
            child
        }
    };
    let born = arrange(&link, spec.ids.as_ref(), middle);
    // Closing the link ends the processes that wait for us.
    let link = born.is_ok().then_some(link);
    let _ = process::end_of(middle);
    let ((first, builder), link) = (born?, link.ok_or_else(lost)?);
    let gone = link.go().is_err();
    let init = Init::new(first, builder, link);
    match gone {
        true => Err(init.failed(lost())),
        false => Ok(init),
    }
}

/// Whether we may create a pid namespace without a user namespace. Users other than root lose capabilities at an
/// exec, so for them a user namespace is better.
fn may_without_user_namespace() -> bool {
    geteuid().is_root() && Held::now().allows(Use::PidNamespace)
}

fn cannot(what: &str) -> impl Fn(io::Error) -> Error {
    let step = format!("{what} a pid namespace");
    move |error| Error::step(&step, error)
}

fn lost() -> Error {
    cannot("make")(io::Error::other("the process that makes it was killed"))
}

/// The outer part: maps the ids, which is permitted here.
fn arrange(link: &Link, ids: Option<&IdMaps>, middle: i32) -> Result<(i32, Option<i32>)> {
    match link.hear().map_err(|_| lost())? {
        Event::Made => {}
        Event::Failed(text) => return Err(Error::Reported(text)),
        _ => return Err(lost()),
    }
    if let Some(ids) = ids {
        ids.write(middle).map_err(cannot("map ids in"))?;
    }
    link.go().map_err(|_| lost())?;
    match link.hear().map_err(|_| lost())? {
        Event::Born { first, builder } => Ok((first, builder)),
        Event::Failed(text) => Err(Error::Reported(text)),
        _ => Err(lost()),
    }
}

/// An intermediate process creates the namespaces, since only its children are in the new pid namespace and it stays
/// in the new user namespace itself.
fn in_the_middle(spec: &Spec, link: Link, body: impl Body) -> ! {
    let made = spec.owner.as_ref().map_or(Ok(()), Owner::take_over);
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let made = made.and_then(|()| make(spec)).and_then(|()| {
        link.tell(&Event::Made)?;
        link.wait()?;
        spec.ids
            .as_ref()
            .map_or(Ok(()), |ids| ids.settle(uid, gid))?;
        keep_capabilities()?;
        match spec.builder {
            None => first_alone(),
            Some(pid) => first_and_builder(pid),
        }
    });
    match made {
        Ok(Born::Worker(first)) => work(link, first, body),
        Ok(Born::Others { first, builder }) => {
            let _ = link.tell(&Event::Born { first, builder });
            leave(0)
        }
        Err(error) => {
            let text = format!("cannot make a {} namespace: {error}", kinds(spec));
            let _ = link.tell(&Event::Failed(text));
            leave(1)
        }
    }
}

/// The processes after the forks.
enum Born {
    /// The one that runs the work.
    Worker(Option<First>),
    /// The intermediate one.
    Others { first: i32, builder: Option<i32> },
}

fn first_alone() -> io::Result<Born> {
    Ok(match process::fork()? {
        Fork::Child => Born::Worker(None),
        Fork::Parent(first) => Born::Others {
            first,
            builder: None,
        },
    })
}

/// The first process waits for the building process, and ends if that cannot be created.
fn first_and_builder(pid: i32) -> io::Result<Born> {
    let (ours, theirs) = Channel::pair()?;
    let first = match process::fork()? {
        Fork::Child => {
            drop(ours);
            first::serve(theirs)
        }
        Fork::Parent(child) => child,
    };
    drop(theirs);
    Ok(match process::fork_under(pid)? {
        Fork::Child => Born::Worker(Some(First::new(ours))),
        Fork::Parent(builder) => Born::Others {
            first,
            builder: Some(builder),
        },
    })
}

fn kinds(spec: &Spec) -> &'static str {
    match spec.ids {
        Some(_) => "user and pid",
        None => "pid",
    }
}

/// Namespaces that only some jobs have of their own.
pub(super) fn optional(namespaces: &Namespaces) -> libc::c_int {
    let flag = |has: bool, flag| if has { flag } else { 0 };
    flag(namespaces.user.is_some(), libc::CLONE_NEWUSER)
        | flag(namespaces.uts.is_some(), libc::CLONE_NEWUTS)
        | flag(namespaces.ipc, libc::CLONE_NEWIPC)
        | flag(namespaces.cgroup, libc::CLONE_NEWCGROUP)
}

fn make(spec: &Spec) -> io::Result<()> {
    let user = spec.ids.as_ref().map_or(0, |_| libc::CLONE_NEWUSER);
    let network = if spec.network { libc::CLONE_NEWNET } else { 0 };
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS | network | optional(&spec.others);
    unshare(user | kinds)?;
    if spec.network {
        ckpt_sys::sockets::bring_up_loopback()?;
    }
    if let Some(Names { host, domain }) = &spec.others.uts {
        set_names(host.as_ref(), domain.as_ref())?;
    }
    // Mounts made later outside propagate inside, and not the other way round.
    Ok(follow_the_outer()?)
}
