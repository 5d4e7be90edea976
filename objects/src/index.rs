//! References inside a snapshot: an index of one of its lists is of a type of its own.

use std::fmt;
use std::ops::{Index, IndexMut};

use serde::{Deserialize, Serialize};

use crate::files::Description;
use crate::files::removed::Removed;
use crate::files::terminal::Terminal;
use crate::ipc::sysv_sem::Set;
use crate::ipc::sysv_shm::Segment;
use crate::memory::{MappedFile, SharedMemory};

macro_rules! indices {
    ($($(#[$doc:meta])* $id:ident: $element:ty,)+) => {$(
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $id(pub usize);

        impl $id {
            /// The elements of a list with their references.
            pub fn each(list: &[$element]) -> impl DoubleEndedIterator<Item = (Self, &$element)> + ExactSizeIterator {
                list.iter().enumerate().map(|(index, element)| (Self(index), element))
            }

            /// The first element for which that holds.
            pub fn position(list: &[$element], is: impl FnMut(&$element) -> bool) -> Option<Self> {
                list.iter().position(is).map(Self)
            }

            /// Appends an element.
            pub fn push(list: &mut Vec<$element>, element: $element) -> Self {
                list.push(element);
                Self(list.len() - 1)
            }

            /// What it refers to, if that exists.
            pub fn find(self, list: &[$element]) -> Option<&$element> {
                list.get(self.0)
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl Index<$id> for Vec<$element> {
            type Output = $element;

            fn index(&self, id: $id) -> &$element {
                &self[id.0]
            }
        }

        impl IndexMut<$id> for Vec<$element> {
            fn index_mut(&mut self, id: $id) -> &mut $element {
                &mut self[id.0]
            }
        }
    )+};
}

indices! {
    /// An open file description, in [`Snapshot::descriptions`](crate::Snapshot).
    DescriptionId: Description,
    /// A mapped file, in [`Snapshot::mapped_files`](crate::Snapshot).
    FileId: MappedFile,
    /// A removed directory or the like, in [`Snapshot::removed`](crate::Snapshot).
    RemovedId: Removed,
    /// A segment of System V shared memory, in [`Ipc::segments`](crate::ipc::Ipc).
    SegmentId: Segment,
    /// A set of System V semaphores, in [`Ipc::semaphores`](crate::ipc::Ipc).
    SetId: Set,
    /// Shared anonymous memory, in [`Snapshot::shared_memory`](crate::Snapshot).
    SharedId: SharedMemory,
    /// A terminal, in [`Snapshot::terminals`](crate::Snapshot).
    TerminalId: Terminal,
}
