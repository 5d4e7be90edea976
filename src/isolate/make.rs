//! The making of the namespaces, see unshare(2), user_namespaces(7), pid_namespaces(7).

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

/// What is made: a pid namespace, with a mount namespace whose `/proc` fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// All in a user namespace, with these ids.
    pub ids: Option<IdMaps>,
    /// Who makes and has it, if not we.
    pub owner: Option<Owner>,
    /// What else the job has to itself.
    pub others: Namespaces,
    /// A network namespace, with nothing in it.
    pub network: bool,
    /// The job's root is the first process, and what rebuilds it has this pid meanwhile.
    pub builder: Option<i32>,
}

impl Spec {
    /// For whoever we are: the user remains the user.
    pub fn own() -> Self {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let ids = || IdMaps::one((uid, uid), (gid, gid));
        Self {
            ids: (!may_without_user_namespace()).then(ids),
            ..Self::default()
        }
    }
}

/// Makes the namespaces; `body` is the work of the first process, whose child the job's root is, or of
/// the builder.
///
/// To be called while this process has one thread.
///
/// # Errors
/// When the namespaces cannot be made. Nothing is left of them.
pub fn start(spec: &Spec, body: impl Body) -> Result<Init> {
    // The first process becomes ours when the one in the middle ends.
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
    // Without the link, those who wait for us end.
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

/// Whether we may make a pid namespace without a user namespace around it. Other users than root
/// have capabilities only until the next exec, so that they are better off with one.
fn may_without_user_namespace() -> bool {
    geteuid().is_root() && Held::now().allows(Use::PidNamespace)
}

fn cannot(what: &str) -> impl Fn(io::Error) -> Error {
    let text = format!("cannot {what} a pid namespace");
    move |error| Error::Restore(format!("{text}: {error}"))
}

fn lost() -> Error {
    cannot("make")(io::Error::other("the process that makes it was killed"))
}

/// The outer part of the making: the ids are mapped from here, where there is a right to it.
fn arrange(link: &Link, ids: Option<&IdMaps>, middle: i32) -> Result<(i32, Option<i32>)> {
    match link.hear().map_err(|_| lost())? {
        Event::Made => {}
        Event::Failed(text) => return Err(Error::Restore(text)),
        _ => return Err(lost()),
    }
    if let Some(ids) = ids {
        ids.write(middle).map_err(cannot("map ids in"))?;
    }
    link.go().map_err(|_| lost())?;
    match link.hear().map_err(|_| lost())? {
        Event::Born { first, builder } => Ok((first, builder)),
        Event::Failed(text) => Err(Error::Restore(text)),
        _ => Err(lost()),
    }
}

/// A process of its own makes the namespaces, since only its children are in the new pid namespace
/// and it would itself stay in the new user namespace.
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

/// Who somebody is after a birth.
enum Born {
    /// The one that does the work.
    Worker(Option<First>),
    /// The one in the middle.
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

/// The first process waits for the builder, and ends if that one is not born.
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

/// Namespaces of which a job has only some to itself.
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
    if let Some(Names { host, domain }) = &spec.others.uts {
        set_names(host.as_ref(), domain.as_ref())?;
    }
    // What is mounted outside later is seen inside, and not the other way round.
    Ok(follow_the_outer()?)
}
