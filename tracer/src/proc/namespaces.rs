//! Namespaces of a process, and the clocks of its time namespace: proc_pid_ns(5), time_namespaces(7).

use std::os::unix::fs::MetadataExt;

use super::ProcDir;
use super::parse::{dec, fields, lines};
use crate::Result;

/// Namespaces of a process: name of the link (`pid`, `pid_for_children`, `time` …) and inode, in
/// the order of the names.
///
/// # Errors
/// See [`ProcDir::read_link`]; `EACCES` without the right to ptrace it.
pub fn list_namespaces(process: impl Into<ProcDir>) -> Result<Vec<(String, u64)>> {
    let dir = process.into();
    let path = dir.join("ns");
    let failed = |source| dir.error(path.clone(), source);
    std::fs::metadata(&path).map_err(failed)?;
    let mut found = Vec::new();
    // The names are taken from ourselves: listing the directory takes the process's user, readlink(2) only permission
    // to trace it.
    for entry in std::fs::read_dir("/proc/self/ns").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let link = path.join(&name);
        match std::fs::metadata(&link) {
            Ok(metadata) => found.push((name, metadata.ino())),
            // pid_for_children before the first child of a new namespace.
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(dir.error(link, source)),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Offset of one clock in the time namespace for children of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, 0 to 999999999.
    pub nanoseconds: i64,
}

/// Clock offsets; empty on a kernel without time namespaces.
///
/// # Errors
/// See [`ProcDir::read`].
pub fn timens_offsets(process: impl Into<ProcDir>) -> Result<Vec<ClockOffset>> {
    let dir = process.into();
    let text = dir.read_optional("timens_offsets")?.unwrap_or_default();
    let present = lines(&text).filter(|line| !line.is_empty());
    present
        .map(|line| offset(line).ok_or_else(|| dir.syntax("timens_offsets", line)))
        .collect()
}

fn offset(line: &[u8]) -> Option<ClockOffset> {
    let mut parts = fields(line);
    let clock = match parts.next()? {
        // Linux before 5.7 printed the number of the clock.
        b"1" => "monotonic".to_owned(),
        b"7" => "boottime".to_owned(),
        name => String::from_utf8_lossy(name).into_owned(),
    };
    Some(ClockOffset {
        clock,
        seconds: dec(parts.next()?)?,
        nanoseconds: dec(parts.next()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pid;

    #[test]
    fn we_are_in_namespaces() {
        let own = Pid::own();
        let found = list_namespaces(own).unwrap();
        assert!(
            found
                .iter()
                .any(|(name, inode)| name == "pid" && *inode != 0)
        );
        timens_offsets(own).unwrap();
    }

    #[test]
    fn both_formats_of_offsets() {
        let of = |line: &[u8]| offset(line).map(|o| (o.clock, o.seconds, o.nanoseconds));
        assert_eq!(of(b"monotonic  -5  7"), Some(("monotonic".into(), -5, 7)));
        assert_eq!(of(b"7 1 2"), Some(("boottime".into(), 1, 2)));
        assert_eq!(of(b"7 1"), None);
    }
}
