//! Clocks of this machine.
#![allow(unsafe_code)]

/// What a clock shows, in nanoseconds.
pub fn clock(id: i32) -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(id, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// The second since 1970 of a moment in clock ticks since the start of the machine, as
/// `/proc/PID/stat` has it.
pub fn unix_time_of_ticks(ticks: u64) -> i64 {
    // SAFETY: a call without pointers.
    let a_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64;
    let started = clock(libc::CLOCK_REALTIME).saturating_sub(clock(libc::CLOCK_BOOTTIME));
    (started / 1_000_000_000 + ticks / a_second) as i64
}
