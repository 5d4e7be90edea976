//! The name of a task.

use std::fmt;
use std::ops::Deref;

/// Name of a task, `comm`: any bytes but 0, at most 15 (kernel threads may show more). Displays with control
/// characters escaped and invalid UTF-8 replaced, so it can stand in a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Comm(pub Vec<u8>);

impl Deref for Comm {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for Comm {
    fn from(name: &str) -> Self {
        Self(name.as_bytes().to_vec())
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in String::from_utf8_lossy(&self.0).chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                write!(f, "{character}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_prints_on_one_line() {
        let name = Comm(b"a\n\x1b[31m)\xff".to_vec());
        assert_eq!(name.to_string(), "a\\n\\u{1b}[31m)\u{fffd}");
    }
}
