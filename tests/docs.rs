//! The pages of docs/ and README.md against the code: nothing that is there is left out.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The variants of an enum whose declaration begins with `head`, one a line of that indentation.
fn variants(source: &str, head: &str) -> Vec<String> {
    let (_, body) = source
        .split_once(head)
        .unwrap_or_else(|| panic!("there is no {head:?}"));
    let (body, _) = body.split_once("\n}").expect("an enum has an end");
    let names = body.lines().filter_map(|line| {
        let line = line.strip_prefix("    ")?;
        line.starts_with(|c: char| c.is_ascii_uppercase())
            .then(|| line.split(|c: char| !c.is_ascii_alphanumeric()).next())?
    });
    let names: Vec<String> = names.map(str::to_owned).collect();
    assert!(names.len() > 3, "{head:?} has no variants: {names:?}");
    names
}

/// Those of `words` that `page` does not have in backquotes.
fn missing<'a>(page: &str, words: impl IntoIterator<Item = &'a String>) -> Vec<&'a String> {
    let quoted = |word: &&String| !page.contains(&format!("`{word}`"));
    words.into_iter().filter(quoted).collect()
}

fn fixtures() -> Vec<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let entries = fs::read_dir(directory).expect("the fixtures are there");
    let names = entries.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_suffix(".c").map(str::to_owned)
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn every_fixture_has_its_row() {
    let (page, fixtures) = (read("docs/supported.md"), fixtures());
    assert!(fixtures.len() > 50);
    assert_eq!(missing(&page, &fixtures), [""; 0], "name it in a row");
}

#[test]
fn every_fixture_in_the_table_exists() {
    let (page, fixtures) = (read("docs/supported.md"), fixtures());
    let rows = page.lines().filter(|line| line.starts_with('|'));
    let last = rows.filter_map(|row| row.trim_end_matches(['|', ' ']).rsplit('|').next());
    // A cell of nothing but names in backquotes.
    let cells = last.filter(|cell| {
        let named = |word: &str| word.trim().starts_with('`') && word.trim().ends_with('`');
        cell.split(',').all(named)
    });
    let names: Vec<String> = cells
        .flat_map(|cell| cell.split(','))
        .map(|name| name.trim().trim_matches('`').to_owned())
        .collect();
    assert!(names.len() > 50);
    let unknown: Vec<_> = names.iter().filter(|n| !fixtures.contains(n)).collect();
    assert_eq!(unknown, [""; 0], "no such file in fixtures/");
}

#[test]
fn every_kind_of_file_and_memory_has_its_row() {
    let page = read("docs/supported.md");
    let mut kinds = variants(&read("objects/src/files/mod.rs"), "\nkinds! {");
    // Only the tests of the crate have it.
    kinds.retain(|kind| kind != "Toy");
    assert_eq!(missing(&page, &kinds), [""; 0], "kinds of open files");
    let backings = variants(&read("objects/src/memory/mod.rs"), "pub enum Backing {");
    assert_eq!(missing(&page, &backings), [""; 0], "kinds of mappings");
}

#[test]
fn every_command_is_in_the_readme() {
    let page = read("README.md");
    let commands = variants(&read("src/cli/mod.rs"), "enum Command {");
    for command in commands {
        // `ckpt man` is of `Man`.
        let command = format!("`ckpt {}", command.to_lowercase());
        assert!(page.contains(&command), "README.md lacks {command}`");
    }
}

#[test]
fn every_step_of_fault_injection_is_described() {
    let page = read("docs/architecture.md");
    let steps = read("tracer/src/fault.rs");
    let (_, steps) = steps.split_once("\nsteps! {").expect("it has the list");
    let (steps, _) = steps.split_once("\n}").expect("the list has an end");
    let names: Vec<&str> = steps
        .lines()
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    assert!(names.len() > 10);
    for name in names {
        assert!(
            page.contains(&format!("\"{name}\"")),
            "docs/architecture.md lacks the step {name}"
        );
    }
}

#[test]
fn every_key_of_json_is_described() {
    let page = read("docs/json.md");
    let structs = [
        ("src/cli/attach.rs", "struct Figures"),
        ("src/cli/check.rs", "struct Here"),
        ("src/cli/check.rs", "struct Feature"),
        ("src/cli/check.rs", "struct Privilege"),
        ("src/cli/check.rs", "struct Process"),
        ("src/cli/check.rs", "struct Image"),
        ("objects/src/error.rs", "pub struct Obstacle"),
        ("src/cli/inspect.rs", "struct Everything"),
        ("src/inspect/summary.rs", "pub struct Summary"),
        ("src/inspect/summary.rs", "pub struct ProcessView"),
        ("src/inspect/summary.rs", "pub struct ZombieView"),
        ("src/inspect/threads.rs", "pub struct ThreadView"),
        ("src/inspect/maps.rs", "pub struct MapView"),
        ("src/inspect/fds.rs", "pub struct FdView"),
        ("objects/src/need.rs", "pub struct Need"),
        ("src/inspect/attributes.rs", "pub struct AttributeView"),
    ];
    for (file, head) in structs {
        let source = read(file);
        let (_, body) = source.split_once(head).expect(head);
        let (body, _) = body.split_once("\n}").expect(head);
        let written = body.replace("#[serde(skip)]\n    pub ", "skipped ");
        let fields = written.lines().filter_map(|line| {
            let line = line.trim().trim_start_matches("pub ");
            let (name, _) = line.split_once(": ")?;
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            name.chars().all(plain).then(|| name.to_owned())
        });
        let fields: Vec<String> = fields.collect();
        assert!(fields.len() > 1, "{head} of {file} has no fields");
        assert_eq!(missing(&page, &fields), [""; 0], "{head} of {file}");
    }
}

/// The page has the very rows of the code.
#[test]
fn every_use_of_a_capability_has_its_row() {
    let page = read("docs/privileges.md");
    let wanted = ckpt_tracer::capabilities::markdown();
    assert!(wanted.lines().count() > 20);
    let there: Vec<&str> = page.lines().filter(|l| l.starts_with("| CAP_")).collect();
    let rows: Vec<&str> = wanted.lines().skip(2).collect();
    assert_eq!(
        there, rows,
        "docs/privileges.md must have this table:\n{wanted}"
    );
}

/// Nothing asks for a capability, or names one, but by the table.
#[test]
fn capabilities_are_named_in_one_place() {
    let mut files = Vec::new();
    for room in [
        "src",
        "objects/src",
        "tracer/src",
        "restorer/src",
        "image/src",
    ] {
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(room),
            &mut files,
        );
    }
    assert!(files.len() > 100);
    let mut elsewhere = Vec::new();
    for file in files {
        let table = "tracer/src/capabilities";
        if file.starts_with(Path::new(env!("CARGO_MANIFEST_DIR")).join(table))
            || file.ends_with("capabilities.rs")
        {
            continue;
        }
        let text = fs::read_to_string(&file).expect("it is text");
        let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        let lines = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let named = lines.filter(|line| line.replace("PR_CAP_", "").contains("CAP_"));
        elsewhere.extend(named.map(|line| format!("{}: {}", file.display(), line.trim())));
    }
    assert_eq!(elsewhere, [""; 0], "ask ckpt_tracer::capabilities::Use");
}

fn sources(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(dir).expect("it is a directory").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") => {
                found.push(path);
            }
            false => {}
        }
    }
}

/// A file that `main.rs` does not name would not be compiled, and its tests would be missing silently.
#[test]
fn every_file_of_tests_is_a_module() {
    let main = read("tests/main.rs");
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let entries = fs::read_dir(directory).expect("it is there").flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let files = names.filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned()));
    let left_out = |name: &String| name != "main" && !main.contains(&format!("mod {name};"));
    let left_out: Vec<String> = files.filter(left_out).collect();
    assert_eq!(left_out, [""; 0], "name it in tests/main.rs");
}

#[test]
fn links_between_the_pages_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut links = 0;
    for page in [
        "README.md",
        "CHANGELOG.md",
        "docs/architecture.md",
        "docs/json.md",
        "docs/limits.md",
        "docs/privileges.md",
        "docs/supported.md",
    ] {
        let text = read(page);
        let directory = root.join(page).parent().expect("in a directory").to_owned();
        for rest in text.split("](").skip(1) {
            let (target, _) = rest.split_once(')').expect("a link has an end");
            if target.starts_with("https://") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => root.join(page),
                file => directory.join(file),
            };
            assert!(file.exists(), "{page}: there is no {target}");
            if !heading.is_empty() {
                let there = fs::read_to_string(&file).expect("it is a page");
                let mut headings = there.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.any(|line| anchor(line) == heading),
                    "{page}: there is no heading {target}"
                );
            }
            links += 1;
        }
    }
    assert!(links > 5);
}

/// The anchor of a heading, as code hosts make it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
