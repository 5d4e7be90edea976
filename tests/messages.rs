//! The words of refusals and warnings: one sentence each, without slips that a reader would stumble over.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the words of messages stand: what calls these, or is told by them.
const SAID_BY: [&str; 13] = [
    "Obstacle::new(",
    "Obstacle::without_remedy(",
    "refuse(",
    "refuse_for_now(",
    "Error::step(",
    "Error::object(",
    "Error::Bug(",
    "Error::Reported(",
    "Failure::Message(",
    "warnings.push(",
    ".warn(",
    "complain(",
    "#[error(",
];

/// The sentence of a message may be so long; what is put in comes to it.
const LONGEST: usize = 220;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("it is a directory").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// The string literals of a call whose arguments begin there, each on one line.
fn literals(text: &str) -> Vec<String> {
    let (mut depth, mut found) = (1, Vec::new());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            '"' => {
                let mut literal = String::new();
                while let Some(c) = chars.next().filter(|c| *c != '"') {
                    match (c, c == '\\') {
                        (_, true) => match chars.next() {
                            Some('\n') => chars = chars.as_str().trim_start().chars(),
                            Some(escaped) => literal.extend(['\\', escaped]),
                            None => {}
                        },
                        (c, false) => literal.push(c),
                    }
                }
                found.push(literal);
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

/// Every literal of a message, with the file it stands in.
fn messages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for room in ["src", "objects/src", "tracer/src"] {
        sources(&root.join(room), &mut files);
    }
    let mut all = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("it is text");
        let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        let name = file.strip_prefix(root).expect("it is below").display();
        for said_by in SAID_BY {
            for (at, _) in code.match_indices(said_by) {
                let said = literals(&code[at + said_by.len()..]);
                all.extend(said.into_iter().map(|literal| (name.to_string(), literal)));
            }
        }
    }
    all
}

/// What is wrong with it.
fn slip(literal: &str) -> Option<&'static str> {
    const SOUNDS_LIKE_YOU: [&str; 9] = [
        "unix", "user", "uid", "uprobe", "unit", "usable", "one", "USB", "UTS",
    ];
    const SOUNDS_LIKE_A_VOWEL: [&str; 4] = ["hour", "x86", "FIFO", "mq_"];
    let words: Vec<&str> = literal.split([' ', '(', '`', '\n']).collect();
    for pair in words.windows(2) {
        let [article, next] = pair else { continue };
        let Some(first) = next.chars().next().filter(char::is_ascii_alphabetic) else {
            continue;
        };
        let vowel = "aeiouAEIOU".contains(first);
        let like_you = SOUNDS_LIKE_YOU.iter().any(|word| next.starts_with(word));
        if *article == "a" && vowel && !like_you {
            return Some("a before a vowel");
        }
        let like_a_vowel = SOUNDS_LIKE_A_VOWEL
            .iter()
            .any(|word| next.starts_with(word));
        if *article == "an" && (!vowel && !like_a_vowel || like_you) {
            return Some("an before a consonant");
        }
    }
    let doubled = words.windows(2).any(|pair| {
        pair[0] == pair[1] && pair[0].len() > 1 && pair[0].chars().all(char::is_alphabetic)
    });
    let sentences = literal.split(". ").count() > 1 || literal.ends_with('.');
    match () {
        () if doubled => Some("a word twice"),
        () if literal.contains("  ") => Some("two spaces"),
        () if sentences => Some("more than one sentence, or a full stop"),
        () if literal.chars().count() > LONGEST => Some("too long"),
        () => None,
    }
}

#[test]
fn messages_are_one_sentence_without_slips() {
    let all = messages();
    assert!(all.len() > 300, "{}", all.len());
    let slips = all
        .iter()
        .filter_map(|(file, literal)| Some(format!("{}: {file}: {literal}", slip(literal)?)));
    assert_eq!(slips.collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn slips_are_found() {
    for (bad, what) in [
        ("is an userfaultfd", "consonant"),
        ("is a epoll set", "vowel"),
        ("is the the socket", "twice"),
        ("cannot be opened. Close it", "sentence"),
        ("cannot  be", "spaces"),
    ] {
        assert!(slip(bad).is_some_and(|slip| slip.contains(what)), "{bad}");
    }
    for good in ["is a unix socket", "an AIO context", "is a FIFO ({name})"] {
        assert_eq!(slip(good), None, "{good}");
    }
    let call = "format!(\"one {}\", f(\"two\")), \"three \\\n    four\") \"five\"";
    assert_eq!(literals(call), ["one {}", "two", "three four"]);
}
