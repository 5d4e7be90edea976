//! Clocks: clock_gettime(2), time(7).
#![allow(unsafe_code)]

/// clock_gettime(2): the time of a clock (`CLOCK_*`) in nanoseconds; 0 if the clock does not exist.
pub fn clock(id: i32) -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(id, &raw mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Clock ticks in a second, the unit of times in `/proc/PID/stat` (sysconf(3)).
pub fn ticks_per_second() -> u64 {
    // SAFETY: a call without pointers.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64
}
