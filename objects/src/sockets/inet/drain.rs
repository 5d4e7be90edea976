//! Brings what one end of a TCP connection has sent, and the other has not received, into the receiver's queue, where it
//! can be peeked at.
//!
//! Such bytes stay in the sender's queue while the receiver's window is closed. A mark for reading (`SO_RCVLOWAT`) above
//! what is queued makes the kernel enlarge the receive buffer (`tcp_set_rcvlowat`, net/ipv4/tcp.c), unless the program has
//! set its size: then the lock (`SO_BUF_LOCK`) is taken off meanwhile. A peek then announces the new window. The mark, the
//! lock and the size are the program's: they are as before at the end, and if ckpt is killed in between, a helper process
//! puts them back.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_sys::helper::Helper;
use ckpt_sys::sockets;
use nix::errno::Errno;

use super::survey::{Live, Table, far, listed, own};
use super::{Address, Protocol};

/// How long nothing may arrive.
const PATIENCE: Duration = Duration::from_secs(3);

/// Result.
#[derive(Default)]
pub(super) struct Drained {
    /// Something was on its way.
    pub(super) any: bool,
    /// Receivers to which bytes are still on their way, by inode, with their number.
    pub(super) stuck: HashMap<u64, usize>,
}

/// A receiver of the job, and how much was sent to it that has not arrived.
struct Receiver<'a> {
    inode: u64,
    socket: &'a OwnedFd,
    /// Inode of the sender; `None` if that is closed.
    sender: Option<&'a OwnedFd>,
    missing: usize,
    ends: (Address, Address),
    before: Options,
}

/// Options of a receiver.
#[derive(Clone, Copy)]
struct Options {
    mark: i32,
    buffer: i32,
    lock: i32,
    clamp: i32,
}

const SO_BUF_LOCK: i32 = 72;
/// `SOCK_RCVBUF_LOCK`.
const LOCKED: i32 = 2;
const TCP_QUICKACK: i32 = 12;

impl Options {
    fn of(socket: &OwnedFd) -> Result<Self, Errno> {
        let clamp = sockets::option_of(libc::IPPROTO_TCP, socket, libc::TCP_WINDOW_CLAMP)?;
        let clamp = clamp.get(..4).and_then(|b| b.try_into().ok());
        Ok(Self {
            mark: sockets::int_option(socket, libc::SO_RCVLOWAT)?,
            buffer: sockets::int_option(socket, libc::SO_RCVBUF)?,
            lock: sockets::int_option(socket, SO_BUF_LOCK)?,
            clamp: clamp.map_or(0, i32::from_ne_bytes),
        })
    }

    /// Sets them as they were. A buffer that the kernel sizes stays as it is.
    fn put_back(self, socket: impl AsFd + Copy) {
        if self.lock & LOCKED != 0 {
            // The kernel doubles what it is given.
            let _ = sockets::set_int_option(socket, libc::SO_RCVBUF, self.buffer / 2);
            let _ = sockets::set_int_option(socket, SO_BUF_LOCK, self.lock);
            let clamp = self.clamp.to_ne_bytes();
            let _ = sockets::set_option(libc::IPPROTO_TCP, socket, libc::TCP_WINDOW_CLAMP, &clamp);
        }
        if sockets::int_option(socket, libc::SO_RCVLOWAT) != Ok(self.mark) {
            let _ = sockets::set_int_option(socket, libc::SO_RCVLOWAT, self.mark);
        }
    }
}

/// Waits until all that was sent between sockets of the job has arrived. The job is frozen.
pub(super) fn drain(live: &[Live<'_>], table: &Table) -> Drained {
    let mut receivers = receivers(live, table);
    receivers.retain_mut(Receiver::is_owed);
    let mut drained = Drained {
        any: !receivers.is_empty(),
        ..Drained::default()
    };
    if receivers.is_empty() {
        return drained;
    }
    let guard = Guard::over(&receivers);
    if guard.is_some() {
        receivers.iter().for_each(Receiver::make_room);
        let mut last = Instant::now();
        while !receivers.is_empty() && last.elapsed() < PATIENCE {
            let before: usize = receivers.iter().map(|r| r.missing).sum();
            receivers.retain_mut(|receiver| {
                let _ = sockets::peek(receiver.socket, &mut [0]);
                receiver.is_owed()
            });
            let now: usize = receivers.iter().map(|r| r.missing).sum();
            if now < before {
                last = Instant::now();
            } else {
                // No descriptor becomes ready when a segment is acknowledged.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    drop(guard);
    let stuck = receivers.iter().map(|r| (r.inode, r.missing));
    drained.stuck = stuck.collect();
    drained
}

/// All connected sockets whose other end is in the job or closed, and whose sender has something that was not
/// acknowledged.
fn receivers<'a>(live: &'a [Live<'_>], table: &Table) -> Vec<Receiver<'a>> {
    let by_inode: HashMap<u64, &Live> = live.iter().map(|l| (l.inode, l)).collect();
    let receivers = live.iter().filter(|l| l.protocol == Protocol::Tcp);
    let receivers = receivers.filter_map(|receiver| {
        let listed = table.of(receiver.inode).filter(|l| l.remote.1 != 0)?;
        let ends = (own(listed), far(listed));
        let other = table.other_end(ends.0, ends.1)?;
        if other.unsent == 0 {
            return None;
        }
        let sender = match other.inode {
            0 => None,
            inode => Some(by_inode.get(&inode.into())?.copy),
        };
        Some(Receiver {
            inode: receiver.inode,
            socket: receiver.copy,
            sender,
            missing: other.unsent as usize,
            ends,
            before: Options::of(receiver.copy).ok()?,
        })
    });
    receivers.collect()
}

impl Receiver<'_> {
    /// Whether bytes are still on their way; acknowledges at once what has arrived.
    fn is_owed(&mut self) -> bool {
        let now = 1i32.to_ne_bytes();
        let _ = sockets::set_option(libc::IPPROTO_TCP, self.socket, TCP_QUICKACK, &now);
        self.missing = match self.sender {
            Some(sender) => sockets::unsent(sender),
            None => self.left_by_a_closed_end(),
        };
        self.missing > 0
    }

    /// What a closed sender still has, from the kernel's list.
    fn left_by_a_closed_end(&self) -> usize {
        let wanted = (self.ends.1.plain(), self.ends.0.plain());
        let all = listed(Protocol::Tcp).unwrap_or_default();
        let mut all = all.iter();
        let found = all.find(|s| (own(s).plain(), far(s).plain()) == wanted);
        found.map_or(0, |found| found.unsent as usize)
    }

    fn make_room(&self) {
        if self.before.lock & LOCKED != 0 {
            let without = self.before.lock & !LOCKED;
            let _ = sockets::set_int_option(self.socket, SO_BUF_LOCK, without);
        }
        let queued = ckpt_sys::files::unread(self.socket);
        // Some more, since the kernel rounds windows down.
        let wanted = 2 * (queued + self.missing) + (512 << 10);
        let wanted = i32::try_from(wanted).unwrap_or(i32::MAX);
        let _ = sockets::set_int_option(self.socket, libc::SO_RCVLOWAT, wanted);
        let _ = sockets::set_int_option(self.socket, libc::SO_RCVLOWAT, self.before.mark);
    }
}

/// Puts the options back when dropped, or when we die.
struct Guard {
    all: Vec<(OwnedFd, Options)>,
    helper: Option<(Helper, OwnedFd)>,
}

impl Guard {
    fn over(receivers: &[Receiver<'_>]) -> Option<Self> {
        let all = receivers.iter();
        let all = all.map(|r| Some((r.socket.try_clone().ok()?, r.before)));
        let all: Vec<(OwnedFd, Options)> = all.collect::<Option<_>>()?;
        let (read, write) = ckpt_sys::pipes::pipe().ok()?;
        let mut kept = vec![read.as_fd()];
        kept.extend(all.iter().map(|(socket, _)| socket.as_fd()));
        let helper = Helper::start_with(&kept, || {
            ckpt_sys::events::poll_for(&read, libc::POLLIN, -1);
            for (socket, before) in &all {
                before.put_back(socket);
            }
            0
        });
        Some(Self {
            helper: Some((helper.ok()?, write)),
            all,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        for (socket, before) in &self.all {
            before.put_back(socket);
        }
        if let Some((helper, write)) = self.helper.take() {
            drop(write);
            let _ = helper.wait();
        }
    }
}
