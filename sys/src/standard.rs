//! Standard input, output and error, made sure of before anything is opened.
//!
//! Where one of them is closed, the first file that is opened would get its number. The runtime of Rust puts a
//! /dev/null there that takes whatever is written: an image would be lost, and the job be killed for it. So
//! before that comes to it, they get one that refuses.
#![allow(unsafe_code)]

/// Opens /dev/null, in the direction that is of no use, for each of the three that is closed. To be called before
/// anything else, which is what `.init_array` is for.
pub extern "C" fn make_sure() {
    let standard = [
        (libc::STDIN_FILENO, libc::O_WRONLY),
        (libc::STDOUT_FILENO, libc::O_RDONLY),
        (libc::STDERR_FILENO, libc::O_RDONLY),
    ];
    for (fd, mode) in standard {
        // SAFETY: calls of libc with a number, and with a string that ends in 0. An open takes the lowest
        // number that is free: this one.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), mode);
            }
        }
    }
}
