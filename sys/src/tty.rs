//! Operations on terminals and pseudo-terminals, see ioctl_tty(2).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use serde::{Deserialize, Serialize};

use crate::{Errno, Result};

mod controlling;

pub use controlling::controlling;

/// `struct termios2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// `c_iflag`.
    pub input: u32,
    /// `c_oflag`.
    pub output: u32,
    /// `c_cflag`.
    pub control: u32,
    /// `c_lflag`.
    pub local: u32,
    /// `c_line`, the line discipline.
    pub line: u8,
    /// `c_cc`, special characters.
    pub chars: [u8; 19],
    /// `c_ispeed`, bits a second.
    pub input_speed: u32,
    /// `c_ospeed`, bits a second.
    pub output_speed: u32,
}

impl Modes {
    /// Whether input passes unedited and without effects (`n_tty_set_termios`, n_tty.c).
    pub fn passes_input_on(&self) -> bool {
        let input = libc::ISTRIP
            | libc::IUCLC
            | libc::IGNCR
            | libc::ICRNL
            | libc::INLCR
            | libc::IXON
            | libc::PARMRK;
        let local = libc::ICANON | libc::ISIG | libc::ECHO;
        self.input & input == 0 && self.local & local == 0
    }

    /// Raw mode, as cfmakeraw(3) sets it.
    pub fn raw(self) -> Self {
        use libc::{BRKINT, ECHO, ECHONL, ICANON, ICRNL, IEXTEN, IGNBRK, IGNCR};
        use libc::{INLCR, INPCK, ISIG, ISTRIP, IXANY, IXOFF, IXON, OPOST, PARMRK};
        let mut modes = self;
        let input = IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | INPCK;
        modes.input &= !(input | IXON | IXANY | IXOFF);
        modes.output &= !OPOST;
        modes.local &= !(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
        modes.control = (modes.control & !(libc::CSIZE | libc::PARENB)) | libc::CS8;
        modes.chars[libc::VMIN] = 1;
        modes.chars[libc::VTIME] = 0;
        modes
    }
}

/// `struct winsize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Rows of characters.
    pub rows: u16,
    /// Columns of characters.
    pub columns: u16,
    /// Pixels across, 0 when unknown.
    pub width: u16,
    /// Pixels down, 0 when unknown.
    pub height: u16,
}

/// ioctl(2) with a pointer to a value that the kernel reads or writes.
fn ioctl<T>(fd: &impl AsFd, request: libc::c_ulong, value: &mut T) -> Result<()> {
    // SAFETY: `value` is live; the callers below pair each request with the type that it takes.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, std::ptr::from_mut(value)) };
    Errno::result(r).map(drop)
}

/// ioctl(2) with a number, or without an operand.
fn ioctl_number(fd: &impl AsFd, request: libc::c_ulong, value: i32) -> Result<i32> {
    // SAFETY: called with requests that take no pointer.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, libc::c_long::from(value)) };
    Errno::result(r)
}

fn number(fd: &impl AsFd, request: libc::c_ulong) -> Result<i32> {
    let mut value = 0i32;
    ioctl(fd, request, &mut value)?;
    Ok(value)
}

/// `TCGETS2`.
///
/// # Errors
/// `ENOTTY` for what is not a terminal, `EIO` for one that has hung up; the same for all that follow.
pub fn modes(fd: &impl AsFd) -> Result<Modes> {
    // SAFETY: plain integers, for which zero is valid.
    let mut t: libc::termios2 = unsafe { std::mem::zeroed() };
    ioctl(fd, libc::TCGETS2, &mut t)?;
    Ok(Modes {
        input: t.c_iflag,
        output: t.c_oflag,
        control: t.c_cflag,
        local: t.c_lflag,
        line: t.c_line,
        chars: t.c_cc,
        input_speed: t.c_ispeed,
        output_speed: t.c_ospeed,
    })
}

/// `TCSETS2`: at once, without waiting for output and without discarding input. From a background process group too,
/// without SIGTTOU.
///
/// # Errors
/// As for [`modes`].
pub fn set_modes(fd: &impl AsFd, modes: &Modes) -> Result<()> {
    let mut t = libc::termios2 {
        c_iflag: modes.input,
        c_oflag: modes.output,
        c_cflag: modes.control,
        c_lflag: modes.local,
        c_line: modes.line,
        c_cc: modes.chars,
        c_ispeed: modes.input_speed,
        c_ospeed: modes.output_speed,
    };
    unless_stopped(|| ioctl(fd, libc::TCSETS2, &mut t))
}

/// `TIOCGETD`: the line discipline; `N_TTY` (0) by default.
pub fn discipline(fd: &impl AsFd) -> i32 {
    number(fd, libc::TIOCGETD).unwrap_or(0)
}

/// `struct termios` of the kernel (asm-generic/termbits.h), which has no speeds.
#[repr(C)]
#[derive(Default)]
struct Termios {
    flags: [u32; 4],
    line: u8,
    chars: [u8; 19],
}

/// `TIOCGLCKTRMIOS`: the locked bits of the modes; `None` if no bit is locked. Speeds cannot be locked.
pub fn locked_modes(fd: &impl AsFd) -> Option<Modes> {
    let mut locked = Termios::default();
    ioctl(fd, libc::TIOCGLCKTRMIOS, &mut locked).ok()?;
    let [input, output, control, local] = locked.flags;
    let modes = Modes {
        input,
        output,
        control,
        local,
        line: locked.line,
        chars: locked.chars,
        input_speed: 0,
        output_speed: 0,
    };
    let some = locked.flags.iter().any(|bits| *bits != 0) || locked.chars != [0; 19];
    (some || locked.line != 0).then_some(modes)
}

/// `TIOCSLCKTRMIOS`.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN in the initial user namespace.
pub fn lock_modes(fd: &impl AsFd, locked: &Modes) -> Result<()> {
    let mut bits = Termios {
        flags: [locked.input, locked.output, locked.control, locked.local],
        line: locked.line,
        chars: locked.chars,
    };
    ioctl(fd, libc::TIOCSLCKTRMIOS, &mut bits)
}

/// `TIOCGWINSZ`.
///
/// # Errors
/// As for [`modes`].
pub fn size(fd: &impl AsFd) -> Result<Size> {
    let mut words = [0u16; 4];
    ioctl(fd, libc::TIOCGWINSZ, &mut words)?;
    let [rows, columns, width, height] = words;
    Ok(Size {
        rows,
        columns,
        width,
        height,
    })
}

/// `TIOCSWINSZ`; sends SIGWINCH to the foreground process group when the size changes.
///
/// # Errors
/// As for [`modes`].
pub fn set_size(fd: &impl AsFd, size: Size) -> Result<()> {
    let mut words = [size.rows, size.columns, size.width, size.height];
    ioctl(fd, libc::TIOCSWINSZ, &mut words)
}

/// `TIOCGPGRP`: the foreground process group; for a pty's master, that of the slave.
pub fn foreground(fd: &impl AsFd) -> Option<i32> {
    let group = number(fd, libc::TIOCGPGRP).ok()?;
    (group > 0).then_some(group)
}

/// `TIOCSPGRP`, from a background process group too, without SIGTTOU.
///
/// # Errors
/// `EPERM` for a group of another session, `ENOTTY` when it is not our controlling terminal.
pub fn set_foreground(fd: &impl AsFd, group: i32) -> Result<()> {
    let mut group = group;
    unless_stopped(|| ioctl(fd, libc::TIOCSPGRP, &mut group))
}

/// Blocks SIGTTOU during a call: the kernel sends it to a background process group.
fn unless_stopped(call: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: the sets are plain integers and live.
    unsafe {
        let mut block: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut block);
        libc::sigaddset(&mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &block, &mut before);
        let result = call();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}

/// `TIOCGDEV`: major and minor number of the terminal behind `/dev/tty`, `/dev/console` or a pty's master.
///
/// # Errors
/// As for [`modes`].
pub fn device(fd: &impl AsFd) -> Result<(u32, u32)> {
    const TIOCGDEV: libc::c_ulong = 0x8004_5432;
    let number = number(fd, TIOCGDEV)? as u32;
    Ok((
        (number >> 8) & 0xfff,
        (number & 0xff) | ((number >> 12) & 0xf_ff00),
    ))
}

/// `TIOCGPTN`: the number of a pty, by its master.
///
/// # Errors
/// `ENOTTY` for anything but the master of a pty.
pub fn index(master: &impl AsFd) -> Result<u32> {
    number(master, libc::TIOCGPTN).map(|n| n as u32)
}

/// `TIOCGPKT`: packet mode of a pty's master.
pub fn packet_mode(master: &impl AsFd) -> bool {
    const TIOCGPKT: libc::c_ulong = 0x8004_5438;
    number(master, TIOCGPKT).is_ok_and(|on| on != 0)
}

/// tcflush(3).
///
/// # Errors
/// As for [`modes`].
pub fn flush(fd: &impl AsFd, queue: i32) -> Result<()> {
    // SAFETY: a call without pointers.
    let r = unsafe { libc::tcflush(fd.as_fd().as_raw_fd(), queue) };
    Errno::result(r).map(drop)
}

/// tcflow(3): `TCOOFF` suspends output and `TCOON` resumes it.
///
/// # Errors
/// `EIO` for one that has hung up.
pub fn flow(fd: &impl AsFd, action: i32) -> Result<()> {
    ioctl_number(fd, libc::TCXONC, action).map(drop)
}

/// `TIOCPKT`.
///
/// # Errors
/// As for [`index`].
pub fn set_packet_mode(master: &impl AsFd, on: bool) -> Result<()> {
    ioctl(master, libc::TIOCPKT, &mut i32::from(on))
}

/// `TIOCGPTLCK`: whether the slave cannot be opened.
pub fn is_locked(master: &impl AsFd) -> bool {
    const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;
    number(master, TIOCGPTLCK).is_ok_and(|on| on != 0)
}

/// `TIOCSPTLCK`.
///
/// # Errors
/// As for [`index`].
pub fn set_locked(master: &impl AsFd, on: bool) -> Result<()> {
    ioctl(master, libc::TIOCSPTLCK, &mut i32::from(on))
}

/// `TIOCGEXCL`: exclusive mode.
pub fn is_exclusive(fd: &impl AsFd) -> bool {
    const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
    number(fd, TIOCGEXCL).is_ok_and(|on| on != 0)
}

/// `TIOCEXCL`.
///
/// # Errors
/// As for [`modes`].
pub fn set_exclusive(fd: &impl AsFd) -> Result<()> {
    ioctl_number(fd, libc::TIOCEXCL, 0).map(drop)
}

/// `FIONREAD`: bytes that a read would return; an incomplete line does not count.
pub fn unread(fd: &impl AsFd) -> usize {
    number(fd, libc::FIONREAD).map_or(0, |n| n.max(0) as usize)
}

/// `TIOCGPTPEER`: opens the slave of a pty by its master. With `O_PATH` nothing is opened.
///
/// # Errors
/// `EIO` when it is locked, `EBUSY` in exclusive use, `EINVAL` before Linux 4.13.
pub fn peer(master: &impl AsFd, flags: i32) -> Result<OwnedFd> {
    const TIOCGPTPEER: libc::c_ulong = 0x5441;
    let fd = ioctl_number(master, TIOCGPTPEER, flags)?;
    // SAFETY: the kernel just gave us this descriptor. With O_CLOEXEC in the call, its description would show that
    // flag forever.
    Ok(unsafe {
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        OwnedFd::from_raw_fd(fd)
    })
}

/// A new pty's master, unlocked.
///
/// # Errors
/// Those of open(2); `ENOSPC` above the limit of ptys.
pub fn new_pty(flags: i32) -> std::io::Result<OwnedFd> {
    let open = |path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags | libc::O_NOCTTY)
            .open(path)
    };
    let master = open("/dev/ptmx").or_else(|_| open("/dev/pts/ptmx"))?;
    set_locked(&master, false)?;
    Ok(master.into())
}

/// Our controlling terminal.
pub fn ours() -> Option<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open("/dev/tty").ok()
}
