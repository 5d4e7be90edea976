//! Programs that count, in the symbolic link `count`. It is never open, as a file that is written to would be
//! in some checkpoint, and when the job has gone on, such a file is not there any more for a restore.

use std::fs;

use super::{Case, until};

/// How far it has come.
pub fn count(case: &Case) -> u32 {
    let link = fs::read_link(case.path("count")).unwrap_or_default();
    link.to_string_lossy().parse().unwrap_or(0)
}

/// It goes on for a while.
pub fn counts(case: &Case) {
    let before = count(case);
    until("it to count", || (count(case) > before + 5).then_some(()));
}
