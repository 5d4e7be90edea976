//! Opens standard input, output and error, if closed, before any other file.
//!
//! Otherwise the first file opened would get the number. The runtime of Rust opens /dev/null there, which accepts
//! every write: an image would be lost, and the job killed after it. So before the runtime starts, a closed stream
//! becomes one that refuses reads or writes.
#![allow(unsafe_code)]

/// Opens /dev/null in the useless direction for each of the three that is closed. Must be the first call of the
/// process, hence `.init_array`.
pub extern "C" fn make_sure() {
    let standard = [
        (libc::STDIN_FILENO, libc::O_WRONLY),
        (libc::STDOUT_FILENO, libc::O_RDONLY),
        (libc::STDERR_FILENO, libc::O_RDONLY),
    ];
    for (fd, mode) in standard {
        // SAFETY: calls of libc with a number, and with a string that ends in 0. An open takes the lowest free
        // number: this one.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), mode);
            }
        }
    }
}
