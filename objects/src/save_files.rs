//! `--save-files GLOB`: open files whose contents go into the image.

use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};

/// Patterns, and which of them have matched a file.
#[derive(Clone, Debug, Default)]
pub struct SaveFiles {
    patterns: Vec<Pattern>,
    /// For each pattern.
    matched: Vec<bool>,
}

/// A pattern of file names: for the whole path, or for the last component if it has no slash.
#[derive(Clone, Debug)]
pub struct Pattern {
    matcher: GlobMatcher,
    whole: bool,
}

impl Pattern {
    /// Parses a pattern: `*`, `?` and `[…]` match within a component, `**` any number of components, `{a,b}` either.
    ///
    /// # Errors
    /// What is wrong with it. A relative path never matches, so such a pattern is an error.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("the pattern is empty".into());
        }
        let whole = text.contains('/');
        if whole && !text.starts_with(['/', '*', '?', '[', '{']) {
            return Err(format!(
                "with a slash the whole path is matched; begin it with / or with **/, such as **/{text}"
            ));
        }
        let glob = GlobBuilder::new(text).literal_separator(true).build();
        let glob = glob.map_err(|e| e.kind().to_string())?;
        Ok(Self {
            matcher: glob.compile_matcher(),
            whole,
        })
    }

    /// The pattern as given.
    pub fn text(&self) -> &str {
        self.matcher.glob().glob()
    }

    fn matches(&self, path: &Path) -> bool {
        match self.whole {
            true => self.matcher.is_match(path),
            false => path
                .file_name()
                .is_some_and(|name| self.matcher.is_match(name)),
        }
    }
}

impl SaveFiles {
    /// These patterns, without a match so far.
    pub fn new(patterns: Vec<Pattern>) -> Self {
        Self {
            matched: vec![false; patterns.len()],
            patterns,
        }
    }

    /// Whether to save a file.
    pub fn wants(&mut self, path: &Path) -> bool {
        let mut wanted = false;
        for (pattern, matched) in self.patterns.iter().zip(&mut self.matched) {
            if pattern.matches(path) {
                *matched = true;
                wanted = true;
            }
        }
        wanted
    }

    /// Patterns that no file matched.
    pub fn unmatched(&self) -> Vec<String> {
        let all = self.patterns.iter().zip(&self.matched);
        let unmatched = all.filter(|(_, matched)| !**matched);
        unmatched
            .map(|(pattern, _)| pattern.text().to_owned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(Path::new(path))
    }

    #[test]
    fn without_a_slash_the_name_is_matched() {
        assert!(matches("*.log", "/var/run/job.log"));
        assert!(matches("job.{log,out}", "/a/job.out"));
        assert!(matches("*", "/a/.hidden"));
        assert!(!matches("*.log", "/var/job.log/data"));
        assert!(!matches("run", "/var/run/job.log"));
    }

    #[test]
    fn with_a_slash_the_path_is_matched() {
        assert!(matches("/var/*/job.log", "/var/run/job.log"));
        assert!(!matches("/var/*.log", "/var/run/job.log"));
        assert!(matches("/var/**", "/var/run/job.log"));
        assert!(matches("**/run/*", "/var/run/job.log"));
        assert!(!matches("/var/run", "/var/run/job.log"));
    }

    #[test]
    fn patterns_that_cannot_match_are_refused() {
        for wrong in ["", "out/*.log", "./x", "[a", "{a"] {
            assert!(Pattern::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_pattern_without_a_match_is_told() {
        let patterns = ["*.a", "*.b"].map(|p| Pattern::parse(p).unwrap());
        let mut files = SaveFiles::new(patterns.into());
        assert!(files.wants(Path::new("/x/y.a")));
        assert!(!files.wants(Path::new("/x/y.c")));
        assert_eq!(files.unmatched(), ["*.b"]);
    }

    #[test]
    fn names_need_not_be_text() {
        use std::os::unix::ffi::OsStrExt;
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a/\xff.log"));
        assert!(Pattern::parse("*.log").unwrap().matches(path));
    }
}
