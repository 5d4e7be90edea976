//! Linux AIO contexts, io_setup(2).
//!
//! A context is a ring of events that the kernel maps into the program; its handle is the address. The program may
//! consume events without a system call, by moving the head. A request in flight is not visible anywhere; [`settle`]
//! proves that there is none before anything is captured. So a context consists of the address of its ring, head and
//! tail, and the events in between.

use ckpt_tracer::RemoteAddr;
use ckpt_tracer::proc::maps::{Vma, VmaName};
use serde::{Deserialize, Serialize};

use crate::error::Obstacle;
use crate::source::{Collector, Source};

mod needs;
mod rebuild;
mod settle;
mod turn;

pub use needs::{in_the_way, wanted};
pub use rebuild::{rebuild, reserve};
pub use settle::{hides_requests, settle};

/// Bytes of an event, and of the ring's header (`struct io_event` in linux/aio_abi.h, `struct aio_ring` in fs/aio.c).
const EVENT: u64 = 32;
/// Bytes of the largest ring (`ioctx_alloc`).
const LARGEST: u64 = 0x1000_0000 + 4096;
/// `AIO_RING_MAGIC`
const MAGIC: u32 = 0xa10a_10a1;
/// Offset of the number of events in the ring's header.
const NR: u64 = 4;
/// Offset of the head.
const HEAD: u64 = 8;
/// Offset of the tail.
const TAIL: u64 = 12;

/// The ring of a context. Its number of events follows from the size of its mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Its index in the kernel's table.
    pub id: u32,
    /// Index of the first unread event.
    pub head: u32,
    /// Index of the first free place.
    pub tail: u32,
    /// The events from head to tail, in this order.
    #[serde(with = "serde_bytes")]
    pub unread: Vec<u8>,
}

/// Number of events of a ring of that many bytes; one place always stays free.
pub fn places(len: u64) -> u64 {
    (len / EVENT).saturating_sub(1)
}

/// Requests that an empty context accepts from one CPU until it returns EAGAIN. Free places are given to CPUs in
/// batches, and a remainder smaller than a batch is not used (`ioctx_alloc`, `__get_reqs_available`).
fn capacity(places: u64, cpus: u64) -> u64 {
    let free = places.saturating_sub(1);
    let batch = (free / (cpus * 4)).max(1);
    free - free % batch
}

impl Ring {
    /// Number of unread events in a ring with that many places.
    pub fn waiting(&self, places: u64) -> u64 {
        distance(self.head, self.tail, places)
    }

    /// Why a record is invalid for a ring of that many bytes.
    pub fn fault(&self, len: u64) -> Option<String> {
        if len > LARGEST {
            return Some(format!("is an AIO ring of {len} bytes, larger than any"));
        }
        let places = places(len);
        let (head, tail) = (u64::from(self.head), u64::from(self.tail));
        if head >= places || tail >= places {
            return Some(format!(
                "has a ring of {places} events, and its head at {head} and its tail at {tail}"
            ));
        }
        let (waiting, bytes) = (self.waiting(places), self.unread.len() as u64);
        (waiting * EVENT != bytes)
            .then(|| format!("has {waiting} unread AIO events, and {bytes} bytes of them"))
    }
}

/// Places from one index to the other, in a ring of that size.
fn distance(from: u32, to: u32, places: u64) -> u64 {
    (u64::from(to) + places - u64::from(from)) % places
}

/// Whether a mapping is an AIO ring.
pub fn is_ring(vma: &Vma) -> bool {
    matches!(&vma.name, VmaName::File { path, .. } if path.as_os_str() == "/[aio]")
}

/// A snapshot of the bytes of a whole ring.
#[derive(Clone, Debug)]
struct Seen {
    bytes: Vec<u8>,
}

impl Seen {
    fn word(&self, at: u64) -> u32 {
        let word = self.bytes[at as usize..].first_chunk();
        word.map_or(0, |w| u32::from_le_bytes(*w))
    }

    fn places(&self) -> u64 {
        places(self.bytes.len() as u64)
    }

    fn event(&self, place: u64) -> &[u8] {
        let at = ((place + 1) * EVENT) as usize;
        &self.bytes[at..at + EVENT as usize]
    }

    /// `len` places from `from` on as ranges of the ring's bytes; two if they wrap around.
    fn stretches(&self, from: u64, len: u64) -> Vec<(u64, u64)> {
        let places = self.places();
        let first = len.min(places - from);
        let both = [(from, first), (0, len - first)];
        let some = both.into_iter().filter(|(_, len)| *len > 0);
        some.map(|(from, len)| ((from + 1) * EVENT, len * EVENT))
            .collect()
    }

    fn ring(&self) -> Ring {
        let mut ring = Ring {
            id: self.word(0),
            head: self.word(HEAD),
            tail: self.word(TAIL),
            unread: Vec::new(),
        };
        let waiting = ring.waiting(self.places());
        for (at, len) in self.stretches(ring.head.into(), waiting) {
            ring.unread
                .extend_from_slice(&self.bytes[at as usize..(at + len) as usize]);
        }
        ring
    }

    /// Reads a ring. The head is read first, so every event before the tail is complete.
    fn read(source: &Source, vma: &Vma) -> Result<Self, Box<Obstacle>> {
        let refuse = |reason: &str, remedy| Box::new(refused(source, vma, reason, remedy));
        let mut bytes = vec![0; vma.len() as usize];
        let at = RemoteAddr(vma.start);
        let (head, events) = bytes.split_at_mut(EVENT as usize);
        let read = source.mem.read(at, head);
        if read
            .and_then(|()| source.mem.read(at + EVENT, events))
            .is_err()
        {
            return Err(refuse(
                "cannot be read: its context is gone, and only the mapping is left",
                "let the program unmap it",
            ));
        }
        let seen = Self { bytes };
        let whole =
            vma.offset == 0 && vma.read && vma.write && seen.places() == u64::from(seen.word(NR));
        if seen.word(16) != MAGIC || !whole {
            return Err(refuse(
                "is not as the kernel has made it: protected, cut, or written over",
                "let the program leave the ring alone, or io_destroy it before the checkpoint",
            ));
        }
        let (head, tail) = (seen.word(HEAD), seen.word(TAIL));
        if u64::from(head.max(tail)) >= seen.places() {
            let reason = format!("has its head at {head} and its tail at {tail}, beyond its end");
            return Err(refuse(
                &reason,
                "let the program write no other head into the ring",
            ));
        }
        Ok(seen)
    }
}

fn refused(source: &Source, vma: &Vma, reason: &str, remedy: &str) -> Obstacle {
    let object = format!("the AIO context {:#x} of {}", vma.start, source.title());
    Obstacle::new(object, reason, remedy)
}

/// Captures a ring. In a frozen job [`settle`] has run before.
pub fn capture(
    source: &Source,
    vma: &Vma,
    collector: &mut Collector,
) -> Result<Ring, Box<Obstacle>> {
    // A fork inherits the mapping, but not the context (`mm_init_aio`, fs/aio.c).
    let known = collector
        .aio_rings
        .iter()
        .find(|(inode, _)| *inode == vma.inode);
    if let Some((_, owner)) = known {
        let reason =
            format!("is one of process {owner}, and only its mapping came over with the fork");
        let remedy =
            "let the program unmap it in the child, or mark it with MADV_DONTFORK before the fork";
        return Err(Box::new(refused(source, vma, &reason, remedy)));
    }
    collector.aio_rings.push((vma.inode, source.pid));
    Ok(Seen::read(source, vma)?.ring())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(head: u32, tail: u32) -> Seen {
        let mut bytes: Vec<u8> = (0..128).flat_map(|n| [n as u8; 32]).collect();
        bytes[8..12].copy_from_slice(&head.to_le_bytes());
        bytes[12..16].copy_from_slice(&tail.to_le_bytes());
        Seen { bytes }
    }

    #[test]
    fn events_are_read_around_the_end() {
        let ring = seen(125, 1).ring();
        assert_eq!(ring.waiting(127), 3);
        let firsts: Vec<u8> = ring.unread.chunks(32).map(|e| e[0]).collect();
        assert_eq!(firsts, [126, 127, 1]);
        assert!(seen(4, 4).ring().unread.is_empty());
    }

    #[test]
    fn a_record_must_fit_its_ring() {
        let good = seen(125, 1).ring();
        assert_eq!(good.fault(4096), None);
        assert!(
            Ring {
                head: 127,
                ..good.clone()
            }
            .fault(4096)
            .is_some()
        );
        assert!(
            Ring {
                tail: 127,
                ..good.clone()
            }
            .fault(4096)
            .is_some()
        );
        assert!(
            Ring {
                tail: 2,
                ..good.clone()
            }
            .fault(4096)
            .is_some()
        );
        assert!(good.fault(0).is_some());
    }

    #[test]
    fn what_is_less_than_a_batch_stays() {
        assert_eq!(capacity(127, 2), 120);
        assert_eq!(capacity(127, 64), 126);
        assert_eq!(capacity(383, 2), 376);
        assert_eq!(capacity(0, 2), 0);
    }
}
