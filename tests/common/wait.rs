//! Waiting for a state, not for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Nothing that is waited for takes longer, on the slowest machine. `CKPT_TEST_DEADLINE` names
/// another number of seconds.
pub fn deadline() -> Duration {
    let seconds = std::env::var("CKPT_TEST_DEADLINE")
        .ok()
        .and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Polls until `state` is there; panics with `what` when it does not come.
pub fn until<T>(what: &str, mut state: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(
            begun.elapsed() < deadline(),
            "waited {:?} for {what}\n{}",
            deadline(),
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
