//! The few system calls on System V objects and POSIX message queues that a restore, and seldom a
//! capture, makes itself.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

type Result<T> = std::result::Result<T, Errno>;

/// A segment attached to this process, readable or writable; detached in the end.
#[derive(Debug)]
pub struct Attached {
    at: *mut u8,
    len: usize,
}

// SAFETY: the address belongs to the process, not to a thread.
unsafe impl Send for Attached {}

impl Attached {
    /// Attaches a segment of that size.
    pub fn new(id: i32, size: u64, writable: bool) -> Result<Self> {
        let flags = if writable { 0 } else { libc::SHM_RDONLY };
        // SAFETY: the kernel chooses the place.
        let at = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        if at as isize == -1 {
            return Err(Errno::last());
        }
        Ok(Self {
            at: at.cast(),
            len: size as usize,
        })
    }

    /// Copies bytes out; what lies behind the end reads as zeros.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let offset = (offset as usize).min(self.len);
        let len = into.len().min(self.len - offset);
        // SAFETY: `offset + len` lies inside of the attached segment, whose pages exist as long as
        // it is attached; others may write to it, so that it is copied and never borrowed.
        unsafe { std::ptr::copy(self.at.add(offset), into.as_mut_ptr(), len) };
        into[len..].fill(0);
    }

    /// Copies bytes in, as far as the segment reaches.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let offset = (offset as usize).min(self.len);
        let len = bytes.len().min(self.len - offset);
        // SAFETY: as above; it was attached for writing by the only caller.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.at.add(offset), len) };
    }

    /// Makes everything zero, and a hole if the kernel can.
    pub fn clear(&self) {
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
pub fn shmget(key: i32, size: u64, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::shmget(key, size as usize, flags) })
}

/// semget(2).
pub fn semget(key: i32, count: i32, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::semget(key, count, flags) })
}

/// msgget(2).
pub fn msgget(key: i32, flags: i32) -> Result<i32> {
    // SAFETY: a call without pointers.
    Errno::result(unsafe { libc::msgget(key, flags) })
}

/// Whose an object is and who may use it, for `IPC_SET`.
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
pub fn shm_control(id: i32, command: i32) -> Result<()> {
    // SAFETY: only called with commands that take no structure.
    Errno::result(unsafe { libc::shmctl(id, command, std::ptr::null_mut()) }).map(drop)
}

/// `IPC_SET` of a semaphore set.
pub fn sem_set(id: i32, access: Access) -> Result<()> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    ds.sem_perm.uid = access.uid;
    ds.sem_perm.gid = access.gid;
    ds.sem_perm.mode = access.mode as _;
    // SAFETY: the kernel reads one structure.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_SET, &mut ds) }).map(drop)
}

/// `GETALL`: the values of a set of that many semaphores.
pub fn sem_values(id: i32, count: usize) -> Result<Vec<u16>> {
    let mut values = vec![0u16; count];
    // SAFETY: the kernel writes as many values as the set has; a set never changes its size, and
    // its id does not come back soon.
    Errno::result(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// `GETPID`, `GETNCNT` or `GETZCNT` of a semaphore.
pub fn sem_get(id: i32, number: usize, command: i32) -> Result<i32> {
    // SAFETY: only called with commands that take no argument.
    Errno::result(unsafe { libc::semctl(id, number as i32, command) })
}

/// `IPC_RMID` of a semaphore set.
pub fn sem_remove(id: i32) {
    // SAFETY: a call without pointers.
    unsafe { libc::semctl(id, 0, libc::IPC_RMID) };
}

/// semop(2), all or nothing and without waiting.
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

/// `IPC_STAT` of a message queue: the most bytes it takes (`msg_qbytes`).
pub fn msg_capacity(id: i32) -> Result<u64> {
    // SAFETY: plain integers, for which zero is valid.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one structure.
    Errno::result(unsafe { libc::msgctl(id, libc::IPC_STAT, &mut ds) })?;
    Ok(ds.msg_qbytes)
}

/// `IPC_SET` of a message queue.
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

/// A message: a type and bytes, behind each other as the kernel takes and gives them.
fn message_buffer(kind: i64, len: usize) -> Vec<u8> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.resize(8 + len, 0);
    buffer
}

/// Copies the message at that place of a queue, which stays there (`MSG_COPY`); `None` behind the
/// last.
pub fn msg_copy(id: i32, index: usize, most: usize) -> Result<Option<(i64, Vec<u8>)>> {
    const MSG_COPY: i32 = 0o40000;
    msg_take(id, index as i64, most, MSG_COPY)
}

/// Takes the first message out of a queue.
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

/// Puts a message into a queue.
pub fn msg_send(id: i32, kind: i64, bytes: &[u8]) -> Result<()> {
    let mut buffer = message_buffer(kind, 0);
    buffer.extend_from_slice(bytes);
    // SAFETY: a type and that many bytes.
    let r = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT) };
    Errno::result(r).map(drop)
}

/// Runs `create` with these effective ids, which then are the creator's. For a thread alone: the
/// C library would change those of all.
pub fn as_creator<T: Send>(
    uid: u32,
    gid: u32,
    create: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
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
                const KEEP: i64 = -1;
                // SAFETY: calls without pointers, which change this thread alone. Where an id is
                // unknown in our user namespace it stays ours.
                unsafe {
                    libc::syscall(libc::SYS_setresgid, KEEP, i64::from(gid), KEEP);
                    libc::syscall(libc::SYS_setresuid, KEEP, i64::from(uid), KEEP);
                }
                create()
            })
            .join()
    });
    thread.unwrap_or(Err(Errno::EIO))
}

/// `struct mq_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAttributes {
    /// `O_NONBLOCK` or 0.
    pub flags: i64,
    /// Messages that it takes.
    pub most: i64,
    /// Bytes of the longest one.
    pub size: i64,
    /// Messages in it.
    pub held: i64,
    reserved: [i64; 4],
}

/// `mq_getattr(3)`.
pub fn queue_attributes(queue: &OwnedFd) -> Result<QueueAttributes> {
    let mut attributes = QueueAttributes::default();
    // SAFETY: the kernel writes one structure.
    let r = unsafe {
        let none = std::ptr::null::<QueueAttributes>();
        libc::syscall(
            libc::SYS_mq_getsetattr,
            queue.as_raw_fd(),
            none,
            &mut attributes,
        )
    };
    Errno::result(r).map(|_| attributes)
}

/// `mq_open(3)` of a queue that exists; the name is without its slash.
pub fn open_queue(name: &[u8], access: i32) -> Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let flags = access | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a C string; the last operands are not used without O_CREAT.
    let fd = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The names of all queues of our IPC namespace, without their slashes: its file system is opened
/// without being mounted anywhere (fsopen(2), fsmount(2)).
pub fn queue_names() -> Result<Vec<Vec<u8>>> {
    const FSCONFIG_CMD_CREATE: i32 = 6;
    const FSOPEN_CLOEXEC: i32 = 1;
    let owned = |fd: libc::c_long| {
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: a C string, and calls without pointers.
    let mounted = unsafe {
        let context = owned(libc::syscall(
            libc::SYS_fsopen,
            c"mqueue".as_ptr(),
            FSOPEN_CLOEXEC,
        ))?;
        let fd = context.as_raw_fd();
        let create = FSCONFIG_CMD_CREATE;
        Errno::result(libc::syscall(libc::SYS_fsconfig, fd, create, null, null, 0))?;
        owned(libc::syscall(libc::SYS_fsmount, fd, FSOPEN_CLOEXEC, 0))?
    };
    let path = format!("/proc/self/fd/{}", mounted.as_raw_fd());
    let entries = std::fs::read_dir(path);
    let entries = entries.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().into_encoded_bytes());
    Ok(names.collect())
}

/// `mq_open(3)` that creates a queue for that many messages of that size.
pub fn create_queue(name: &[u8], most: i64, size: i64) -> Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    let attributes = QueueAttributes {
        most,
        size,
        ..QueueAttributes::default()
    };
    // SAFETY: a C string and one structure.
    let fd = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, &attributes) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// mq_send(3), without waiting for room.
pub fn send(queue: &OwnedFd, message: &[u8]) -> Result<()> {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let (at, len) = (message.as_ptr(), message.len());
    // SAFETY: live bytes of that length and one live structure.
    let sent =
        unsafe { libc::syscall(libc::SYS_mq_timedsend, queue.as_raw_fd(), at, len, 0, &now) };
    Errno::result(sent).map(drop)
}

/// mq_notify(3), with a `struct sigevent` in which an address is one of ours.
pub fn notify(queue: &OwnedFd, event: &[u8; 64]) -> Result<()> {
    // SAFETY: the kernel reads one structure, and 32 bytes of what it points to, if those are mapped.
    let r = unsafe { libc::syscall(libc::SYS_mq_notify, queue.as_raw_fd(), event.as_ptr()) };
    Errno::result(r).map(drop)
}

/// `mq_unlink(3)`.
pub fn unlink_queue(name: &[u8]) {
    if let Ok(name) = CString::new(name) {
        // SAFETY: a C string.
        unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    }
}
