//! What refusals have in common: they name the object, and nothing has happened.

use std::path::Path;

use super::fixture::Fixture;
use super::isolate::Case;
use super::look::{Looks, assert_let_go, assert_no_process_left};
use super::tool::{ckpt, leftovers, restore_cmd, run};

/// What a supervisor returns when it failed itself.
pub const FAILED: i32 = 99;

/// `ckpt attach` of the fixture is refused with these words, and nothing happened to it.
pub fn attach_is_refused(case: &Case, fixture: Fixture, words: &[&str]) {
    let before = Looks::at(fixture.pid());
    ckpt(
        case,
        ["attach", &fixture.pid().to_string(), "-o", "job.ckpt"],
    )
    .refused(1, words);
    unharmed(case, fixture, &before);
}

/// It is not traced, looks as before, no image was left, and it passes.
pub fn unharmed(case: &Case, fixture: Fixture, before: &Looks) {
    assert_let_go(fixture.pid());
    before.assert_same(fixture.pid(), &[]);
    assert!(
        leftovers(case.dir()).is_empty(),
        "{:?}",
        leftovers(case.dir())
    );
    fixture.passes();
}

/// `restore` of this image is refused with these words, and leaves no process.
pub fn restore_is_refused(case: &Case, image: &Path, words: &[&str]) {
    run(case, &mut restore_cmd(image, &[])).refused(FAILED, words);
    assert_no_process_left();
}
