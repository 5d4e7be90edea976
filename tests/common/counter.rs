//! Programs that count, in the file `count`.

use std::fs;

use super::{Case, until};

/// How far it has come.
pub fn count(case: &Case) -> u32 {
    let text = fs::read_to_string(case.path("count")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// It goes on for a while.
pub fn counts(case: &Case) {
    let before = count(case);
    until("it to count", || (count(case) > before + 5).then_some(()));
}
