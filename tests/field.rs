//! Twenty of the real programs of `make field` (docs/field.md), the small and quick ones of its table: cut
//! at random moments into checkpoint, kill and restore. Their results are those of undisturbed runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::isolate::{is_root, skipped};

/// As whom a program runs: half of them as each, which `make field` does with all.
const ROOT: &str = "root";
const USER: &str = "user";

fn field() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/field")
}

/// One program, by the runner, which makes its namespaces itself.
fn passes(program: &str, who: &str) {
    let tools = Path::new(env!("CARGO_BIN_EXE_ckpt")).parent();
    let mut run = Command::new(field().join("run"));
    run.arg(program)
        .env("FIELD_AS", if is_root() { who } else { USER })
        .env("FIELD_CUTS", "2")
        .env("FIELD_NICE", "0")
        .env("CKPT_BIN", tools.expect("it is in a directory"));
    let out = match run.output() {
        Ok(out) => out,
        Err(error) => return skipped(program, &format!("/usr/bin/python3 (python3): {error}")),
    };
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let skip = said.lines().find_map(|line| line.strip_prefix("SKIP "));
    if let Some(lacking) = skip {
        skipped("field", lacking);
    }
}

macro_rules! programs {
    ($($test:ident: $program:literal $who:expr;)*) => {
        $(#[test]
        fn $test() {
            passes($program, $who);
        })*

        #[test]
        fn the_quick_ones_are_all_here() {
            let here = BTreeSet::from([$($program),*]);
            let table = std::fs::read_to_string(field().join("programs")).expect("it is there");
            let lines = table.lines().filter(|line| !line.starts_with('#'));
            let columns = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
            let quick = columns.filter(|column| column.get(2) == Some(&"quick"));
            assert_eq!(here, quick.map(|column| column[0]).collect());
        }
    };
}

programs! {
    bc: "bc" USER;
    git: "git" USER;
    lua: "lua" ROOT;
    make: "make" ROOT;
    nginx: "nginx" USER;
    node: "node" ROOT;
    node_workers: "node-workers" USER;
    php: "php" USER;
    python_asyncio: "python-asyncio" ROOT;
    python_multiprocessing: "python-mp" USER;
    redis: "redis" ROOT;
    ruby: "ruby" USER;
    ruby_fork: "ruby-fork" ROOT;
    sbcl: "sbcl" USER;
    screen: "screen" ROOT;
    sqlite: "sqlite" ROOT;
    tmux: "tmux" USER;
    vim: "vim" USER;
    xz: "xz" ROOT;
    zstd: "zstd" ROOT;
}
