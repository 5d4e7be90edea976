//! A pseudo-terminal with a program, and its master, which types and reads.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::job::{Job, spawn};
use super::wait::until;

/// A terminal; what runs in it leads its session.
pub struct Screen {
    master: File,
    /// The program.
    pub job: Job,
    /// Everything that was printed.
    text: String,
    /// Up to where it has been looked at.
    seen: usize,
}

impl Screen {
    /// Starts a program in a new terminal of 24 rows and 80 columns.
    pub fn start(command: &mut Command) -> Self {
        Self::sized(command, 24, 80)
    }

    /// The same in one of that size.
    pub fn sized(command: &mut Command, rows: u16, columns: u16) -> Self {
        // SAFETY: calls on values and on arrays of the sizes that the kernel reads.
        let (master, slave) = unsafe {
            let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
            assert!(master >= 0, "no pty: {}", std::io::Error::last_os_error());
            assert_eq!(libc::unlockpt(master), 0);
            let size = [rows, columns, 0, 0];
            assert_eq!(libc::ioctl(master, libc::TIOCSWINSZ, size.as_ptr()), 0);
            let flags = libc::O_RDWR | libc::O_NOCTTY;
            let slave = libc::ioctl(master, 0x5441, flags);
            assert!(slave >= 0, "no slave: {}", std::io::Error::last_os_error());
            libc::fcntl(master, libc::F_SETFL, libc::O_NONBLOCK);
            (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
        };
        let copy = || slave.try_clone().expect("a descriptor is free");
        command
            .env("TERM", "xterm")
            .env("SHELL", "/bin/sh")
            .env("PS1", "$ ")
            .env("HISTFILE", "/dev/null");
        command.stdin(copy()).stdout(copy()).stderr(copy());
        let fd = slave.as_raw_fd();
        // SAFETY: system calls only, between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                libc::ioctl(fd, libc::TIOCSCTTY, 0);
                libc::close(fd);
                Ok(())
            });
        }
        Self {
            master,
            job: spawn(command),
            text: String::new(),
            seen: 0,
        }
    }

    /// An interactive shell.
    pub fn shell() -> Self {
        let mut screen = Self::start(Command::new("bash").args(["--norc", "--noprofile", "-i"]));
        screen.expect("$ ");
        screen
    }

    /// Types.
    pub fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("it is open");
    }

    /// Types a line of a shell, and waits for what it prints; the echo of the line itself has
    /// the text in quotes.
    pub fn runs(&mut self, line: &str, printed: &str) {
        self.types(&format!("{line}\n"));
        self.expect(printed);
    }

    /// Waits until this is printed behind what was expected last.
    pub fn expect(&mut self, what: &str) {
        self.insist("", what);
    }

    /// The same, and types keys now and then until it is: for what takes the terminal over at a
    /// time that cannot be seen.
    pub fn insist(&mut self, keys: &str, what: &str) {
        let mut polls = 0;
        let mut block = [0; 4096];
        let said = format!("{what:?} on the screen");
        let (master, text, seen) = (&mut self.master, &mut self.text, &mut self.seen);
        let mut last = std::time::Instant::now();
        until(&said, || {
            while let Ok(n @ 1..) = master.read(&mut block) {
                text.push_str(&String::from_utf8_lossy(&block[..n]));
            }
            polls += 1;
            if polls % 100 == 50 {
                master.write_all(keys.as_bytes()).expect("it is open");
            }
            if last.elapsed() > std::time::Duration::from_secs(5) {
                eprintln!("waiting for {said}; there is {:?}", &text[*seen..]);
                last = std::time::Instant::now();
            }
            let at = text[*seen..].find(what)?;
            *seen += at + what.len();
            Some(())
        });
    }

    /// Whether the terminal is as a shell wants it: canonical, with echo and signals.
    pub fn is_sane(&self) -> bool {
        // SAFETY: plain integers, for which zero is valid; the kernel writes them.
        let modes = unsafe {
            let mut modes: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.master.as_raw_fd(), &mut modes), 0);
            modes
        };
        let wanted = libc::ICANON | libc::ECHO | libc::ISIG;
        modes.c_lflag & wanted == wanted && modes.c_oflag & libc::OPOST != 0
    }

    /// Its foreground process group.
    pub fn foreground(&self) -> i32 {
        let mut group = 0;
        // SAFETY: the kernel writes one int.
        unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCGPGRP, &mut group) };
        group
    }

    /// Another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = [rows, columns, 0, 0];
        // SAFETY: the kernel reads four short integers.
        unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, size.as_ptr()) };
    }

    /// The child of the program in it that has this name, and is set up.
    pub fn child(&self, name: &str) -> i32 {
        until(&format!("a child {name}"), || {
            let children = format!("/proc/{0}/task/{0}/children", self.job.pid);
            let children = std::fs::read_to_string(children).ok()?;
            let mut pids = children.split_whitespace().flat_map(str::parse::<i32>);
            pids.find(|pid| {
                let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
                comm.is_ok_and(|comm| comm.trim() == name)
            })
        })
    }
}
