//! Waiting for a state, not for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Nothing that is waited for takes longer, on the slowest machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Polls until `state` is there; panics with `what` when it does not come.
pub fn until<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(
            begun.elapsed() < DEADLINE,
            "waited {DEADLINE:?} for {what}\n{}",
            super::look::everybody()
        );
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// True when `state` holds all the time for that long: for what must not happen.
pub fn holds_for(time: Duration, mut state: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < time {
        if !state() {
            return false;
        }
        sleep(Duration::from_millis(2));
    }
    state()
}
