//! Files in unread messages (SCM_RIGHTS) that a restore could not send.

use super::Description;
use super::epoll::Epoll;
use super::kind::OpenFile;
use super::left::Left;
use super::signalfd::SignalFd;
use crate::error::Obstacle;
use crate::index::DescriptionId;
use crate::sockets::unix::UnixSocket;

/// The descriptions of a job.
pub(super) struct Flight<'a> {
    /// All of them.
    pub(super) descriptions: &'a [Description],
    /// From here on, only messages hold them.
    pub(super) carried_only: usize,
    /// The pid of the job's first process.
    pub(super) root: i32,
}

impl Flight<'_> {
    /// The obstacles. Messages are sent before any process but the first exists.
    pub(super) fn obstacles(&self) -> Vec<Obstacle> {
        let messages = self.descriptions.iter().filter_map(|description| {
            let socket = description.kind.get::<UnixSocket>()?;
            let mut rights = socket.queue.iter().flat_map(|message| &message.rights);
            let what = rights.find_map(|index| self.not_yet(*index))?;
            Some(Obstacle::new(
                format!("the {}", socket.label()),
                format!("has an unread message with {what}, which is not supported"),
                "let the program receive it before the checkpoint",
            ))
        });
        let sets = self.descriptions.iter().skip(self.carried_only);
        let sets = sets.filter_map(|description| {
            let set = description.kind.get::<Epoll>()?;
            let bound = set.entries.iter().find(|entry| {
                let watched = entry.description.find(self.descriptions).map(|d| &d.kind);
                watched.is_some_and(|kind| kind.get::<SignalFd>().is_some())
                    || self.not_yet(entry.description).is_some()
            })?;
            Some(Obstacle::new(
                "an epoll set that is in flight between sockets",
                format!(
                    "watches what was added as fd {}, a signalfd or a handle of a process, for which a process must have the set",
                    bound.fd
                ),
                "let the program receive it before the checkpoint",
            ))
        });
        messages.chain(sets).collect()
    }

    /// Why a description does not exist when messages are sent.
    fn not_yet(&self, index: DescriptionId) -> Option<String> {
        let kind = &index.find(self.descriptions)?.kind;
        if let Some(left) = kind.get::<Left>().filter(|left| left.instead.is_none()) {
            return Some(format!("what is also fd {} and was to be dropped", left.fd));
        }
        kind.file().is_late(Some(self.root)).then(|| {
            format!(
                "{}, which can be opened only when all processes are there",
                kind.label()
            )
        })
    }
}
