//! A progress bar on standard error: bytes, rate, remaining time.

use std::io::{IsTerminal, stderr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::{Progress, Silent};

/// Shorter work shows no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// A bar that appears after half a second of work, and disappears at its end.
#[derive(Debug)]
pub struct Bar {
    what: &'static str,
    started: Instant,
    total: AtomicU64,
    done: AtomicU64,
    shown: OnceLock<ProgressBar>,
}

impl Bar {
    /// A bar for the work that `what` names, in a word such as `checkpoint`.
    pub fn new(what: &'static str) -> Self {
        Bar {
            what,
            started: Instant::now(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            shown: OnceLock::new(),
        }
    }

    fn show(&self) -> ProgressBar {
        let total = self.total.load(Ordering::Relaxed);
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(
            "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        let bar = bar
            .with_message(self.what)
            .with_elapsed(self.started.elapsed());
        bar.set_position(self.done.load(Ordering::Relaxed));
        bar
    }
}

impl Progress for Bar {
    fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        if let Some(bar) = self.shown.get() {
            bar.set_length(total);
        }
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if self.shown.get().is_some() || self.started.elapsed() >= PATIENCE {
            self.shown.get_or_init(|| self.show()).set_position(done);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.shown.get() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // After an error `end` was not called, and the message must not share the bar's line.
        self.end();
    }
}

/// A bar if standard error is a terminal and it is `wanted`, otherwise none.
pub(crate) fn on_terminal(what: &'static str, wanted: bool) -> Box<dyn Progress> {
    if wanted && stderr().is_terminal() {
        Box::new(Bar::new(what))
    } else {
        Box::new(Silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_work_shows_nothing_and_long_work_does() {
        let mut bar = Bar::new("test");
        bar.begin(100);
        bar.advance(10);
        assert!(bar.shown.get().is_none());
        // As if it had started earlier.
        bar.started = Instant::now().checked_sub(PATIENCE).unwrap();
        bar.advance(20);
        let shown = bar.shown.get().unwrap();
        assert_eq!((shown.position(), shown.length()), (30, Some(100)));
        bar.end();
        assert!(bar.shown.get().unwrap().is_finished());
    }
}
