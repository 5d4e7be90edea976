//! System V shared memory, semaphores and message queues: sysvipc(7). `EIDRM` and `EINVAL` mean that no object has
//! that id, `EACCES` and `EPERM` that permission is denied.
#![allow(unsafe_code)]

use crate::{Errno, Result};

/// A segment attached to this process, readable or writable; detached when dropped.
#[derive(Debug)]
pub struct Attached {
    at: *mut u8,
    len: usize,
    writable: bool,
}

// SAFETY: the address belongs to the process, not to a thread.
unsafe impl Send for Attached {}

impl Attached {
    /// Attaches a segment. `size` is the number of bytes to use, at most the size of the segment.
    ///
    /// # Errors
    /// Those of shmat(2).
    pub fn new(id: i32, size: u64, writable: bool) -> Result<Self> {
        let flags = if writable { 0 } else { libc::SHM_RDONLY };
        // SAFETY: the kernel chooses the place.
        let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        if at as isize == -1 {
            return Err(Errno::last());
        }
        let mut attached = Self {
            at: at.cast(),
            len: 0,
            writable,
        };
        // SAFETY: plain integers, for which zero is valid.
        let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one structure. While it is attached, the id keeps its meaning.
        Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) })?;
        attached.len = ds.shm_segsz.min(size as usize);
        Ok(attached)
    }

    /// Copies bytes out; bytes past the end read as zeros.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let offset = (offset as usize).min(self.len);
        let len = into.len().min(self.len - offset);
        // SAFETY: `offset + len` lies inside the attached segment, whose pages exist as long as it is attached; other
        // processes may write to it, so it is copied and never borrowed.
        unsafe { std::ptr::copy(self.at.add(offset), into.as_mut_ptr(), len) };
        into[len..].fill(0);
    }

    /// Copies bytes in, up to the end of the segment.
    ///
    /// # Panics
    /// When it was not attached for writing, as [`clear`](Self::clear).
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(self.writable, "it is attached for reading");
        let offset = (offset as usize).min(self.len);
        let len = bytes.len().min(self.len - offset);
        // SAFETY: as above; it may be written to.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.at.add(offset), len) };
    }

    /// Zeroes everything, by punching a hole if the kernel can.
    ///
    /// # Panics
    /// When it was not attached for writing.
    pub fn clear(&self) {
        assert!(self.writable, "it is attached for reading");
        let len = self.len.next_multiple_of(4096);
        // SAFETY: whole pages of the attached segment, which nothing borrows from.
        unsafe {
            if libc::madvise(self.at.cast(), len, libc::MADV_REMOVE) != 0 {
                std::ptr::write_bytes(self.at, 0, self.len);
            }
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by `new`, and nothing borrows from it.
        unsafe { libc::shmdt(self.at.cast()) };
    }
}

/// shmget(2).
///
/// # Errors
/// `EEXIST`, `ENOENT`, `ENOSPC` and others of shmget(2).
pub fn shmget(key: i32, size: u64, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::shmget(key, size as usize, flags) })
}

/// semget(2).
///
/// # Errors
/// As for [`shmget`].
pub fn semget(key: i32, count: i32, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::semget(key, count, flags) })
}

/// msgget(2).
///
/// # Errors
/// As for [`shmget`].
pub fn msgget(key: i32, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::msgget(key, flags) })
}

/// Owner, group and mode, for `IPC_SET`.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// `IPC_SET` of a segment.
///
/// # Errors
/// `EPERM` for one of another user.
pub fn shm_set(id: i32, access: Access) -> Result<()> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    ds.shm_perm.uid = access.uid;
    ds.shm_perm.gid = access.gid;
    ds.shm_perm.mode = access.mode as _;
    // SAFETY: the kernel reads one structure.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &mut ds) }).map(drop)
}

/// `IPC_RMID` or `SHM_LOCK` of a segment.
///
/// # Errors
/// `EPERM` for one of another user.
pub fn shm_control(id: i32, command: i32) -> Result<()> {
    // SAFETY: a command that needs a structure gets none (`EFAULT`).
    Errno::result(unsafe { libc::shmctl(id, command, std::ptr::null_mut()) }).map(drop)
}

/// `IPC_SET` of a semaphore set.
///
/// # Errors
/// `EPERM` for one of another user.
pub fn sem_set(id: i32, access: Access) -> Result<()> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    ds.sem_perm.uid = access.uid;
    ds.sem_perm.gid = access.gid;
    ds.sem_perm.mode = access.mode as _;
    // SAFETY: the kernel reads one structure.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_SET, &mut ds) }).map(drop)
}

/// `GETALL`: the values of a set of `count` semaphores.
///
/// # Errors
/// `EACCES` without read permission.
pub fn sem_values(id: i32, count: usize) -> Result<Vec<u16>> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one structure.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut ds) })?;
    let mut values = vec![0u16; count.max(ds.sem_nsems as usize)];
    // SAFETY: the kernel writes as many values as the set has; a set never changes its size, and its id is not reused
    // soon.
    Errno::result(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    values.truncate(count);
    Ok(values)
}

/// `GETPID`, `GETNCNT` or `GETZCNT` of a semaphore.
///
/// # Errors
/// `EACCES` without read permission.
pub fn sem_get(id: i32, number: usize, command: i32) -> Result<i32> {
    if ![libc::GETPID, libc::GETNCNT, libc::GETZCNT].contains(&command) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: a command that takes no argument.
    Errno::result(unsafe { libc::semctl(id, number as i32, command) })
}

/// `IPC_RMID` of a semaphore set.
pub fn sem_remove(id: i32) {
    // SAFETY: a call without pointers.
    unsafe { libc::semctl(id, 0, libc::IPC_RMID) };
}

/// semop(2), nonblocking: all operations or none.
///
/// # Errors
/// `EAGAIN` when it would wait, `ERANGE` for a value out of range.
pub fn sem_operate(id: i32, changes: &[(u16, i16)]) -> Result<()> {
    let mut list: Vec<libc::sembuf> = changes
        .iter()
        .map(|&(num, op)| libc::sembuf {
            sem_num: num,
            sem_op: op,
            sem_flg: libc::IPC_NOWAIT as i16,
        })
        .collect();
    // SAFETY: a list of that many operations.
    Errno::result(unsafe { libc::semop(id, list.as_mut_ptr(), list.len()) }).map(drop)
}

/// `IPC_STAT` of a message queue: its capacity in bytes (`msg_qbytes`).
///
/// # Errors
/// `EACCES` without read permission.
pub fn msg_capacity(id: i32) -> Result<u64> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one structure.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_STAT, &mut ds) })?;
    Ok(ds.msg_qbytes)
}

/// `IPC_SET` of a message queue.
///
/// # Errors
/// `EPERM` for one of another user, and for a size above the limit.
pub fn msg_set(id: i32, access: Access, capacity: u64) -> Result<()> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    ds.msg_perm.uid = access.uid;
    ds.msg_perm.gid = access.gid;
    ds.msg_perm.mode = access.mode as _;
    ds.msg_qbytes = capacity;
    // SAFETY: the kernel reads one structure.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_SET, &mut ds) }).map(drop)
}

/// `IPC_RMID` of a message queue.
pub fn msg_remove(id: i32) {
    // SAFETY: the command takes no structure.
    unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
}

/// `struct msgbuf`: a type, followed by the bytes.
fn message_buffer(kind: i64, len: usize) -> Vec<u8> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.resize(8 + len, 0);
    buffer
}

/// Copies the message at that index of a queue without consuming it (`MSG_COPY`); `None` past the last.
///
/// # Errors
/// `ENOSYS` where the kernel has no `MSG_COPY`, `E2BIG` for a message of more than `most` bytes.
pub fn msg_copy(id: i32, index: usize, most: usize) -> Result<Option<(i64, Vec<u8>)>> {
    const MSG_COPY: i32 = 0o40000;
    msg_take(id, index as i64, most, MSG_COPY)
}

/// Consumes the first message of a queue.
///
/// # Errors
/// `E2BIG` for a message of more than `most` bytes.
pub fn msg_receive(id: i32, most: usize) -> Result<Option<(i64, Vec<u8>)>> {
    msg_take(id, 0, most, 0)
}

fn msg_take(id: i32, which: i64, most: usize, flags: i32) -> Result<Option<(i64, Vec<u8>)>> {
    let mut buffer = message_buffer(0, most);
    // SAFETY: room for the type and `most` bytes.
    let got = unsafe {
        let flags = flags | libc::IPC_NOWAIT;
        libc::msgrcv(id, buffer.as_mut_ptr().cast(), most, which, flags)
    };
    if got < 0 {
        return match Errno::last() {
            Errno::ENOMSG => Ok(None),
            errno => Err(errno),
        };
    }
    buffer.truncate(8 + got as usize);
    let bytes = buffer.split_off(8);
    let kind = i64::from_ne_bytes(buffer.try_into().unwrap_or_default());
    Ok(Some((kind, bytes)))
}

/// Sends a message, nonblocking.
///
/// # Errors
/// `EAGAIN` when there is no room.
pub fn msg_send(id: i32, kind: i64, bytes: &[u8]) -> Result<()> {
    let mut buffer = message_buffer(kind, 0);
    buffer.extend_from_slice(bytes);
    // SAFETY: a type and that many bytes.
    let r = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT) };
    Errno::result(r).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object that is removed when dropped.
    struct Id(i32);

    impl Drop for Id {
        fn drop(&mut self) {
            let _ = shm_control(self.0, libc::IPC_RMID);
        }
    }

    #[test]
    fn a_segment_ends_where_it_ends() {
        let id = Id(shmget(libc::IPC_PRIVATE, 5000, 0o600).unwrap());
        let segment = Attached::new(id.0, 1 << 30, true).unwrap();
        segment.write(4990, &[7; 100]);
        let mut read = [1; 100];
        segment.read(4990, &mut read);
        assert_eq!((&read[..10], &read[10..]), (&[7; 10][..], &[0; 90][..]));
        segment.read(1 << 29, &mut read);
        assert_eq!(read, [0; 100]);
        let reader = Attached::new(id.0, 4995, false).unwrap();
        reader.read(4990, &mut read);
        assert_eq!((&read[..5], &read[5..]), (&[7; 5][..], &[0; 95][..]));
        segment.clear();
        reader.read(4990, &mut read);
        assert_eq!(read, [0; 100]);
        let denied =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reader.write(0, &[1])));
        assert!(denied.is_err());
    }

    #[test]
    fn values_of_a_set_are_those_asked_for() {
        let set = semget(libc::IPC_PRIVATE, 5, 0o600).unwrap();
        let changed = sem_operate(set, &[(0, 3), (4, 2)]);
        let all = (sem_values(set, 5), sem_values(set, 2), sem_values(set, 9));
        let pid = sem_get(set, 0, libc::GETPID);
        let other = sem_get(set, 0, libc::IPC_STAT);
        sem_remove(set);
        assert_eq!(changed, Ok(()));
        let values = |len: usize| Ok([3, 0, 0, 0, 2, 0, 0, 0, 0][..len].to_vec());
        assert_eq!(all, (values(5), values(2), values(9)));
        assert_eq!(pid, Ok(std::process::id() as i32));
        assert_eq!(other, Err(Errno::EINVAL));
    }
}
