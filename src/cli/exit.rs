//! Prints errors and decides exit codes; nothing else does.
//!
//! | code | when |
//! |---|---|
//! | 0 | done; for `verify` and `check`: no obstacle or fault was found |
//! | 1 | `attach`, `check`, `inspect`, `verify` failed or found a fault |
//! | 2 | the command line is wrong |
//! | 99 | `run` or `restore` themselves failed; `CKPT_FAIL_RC` or else `DMTCP_FAIL_RC` set another code from 1 to 255
//! |
//! | other | `run` and `restore` return their program's exit code, or 128 plus the number of the signal that ended it
//! |
//!
//! Every error is printed once, on standard error, as `ckpt: …`, one line for each obstacle.

use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// Shown at the end of each command's help.
pub(crate) const HELP: &str = "\
Exit codes: 0 done; 1 failed, or a fault was found; 2 the command line is wrong; \
99 `run` or `restore` themselves failed (CKPT_FAIL_RC or DMTCP_FAIL_RC name another code); \
otherwise `run` and `restore` return their program's own code, 128 plus the signal that ended it.";

/// Exit code for a command's own failure, if it otherwise returns another program's exit code.
const SUPERVISOR_FAILED: u8 = 99;

/// Which exit code a command returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its own.
    Tool,
    /// Its program's, so its own failure needs a code that programs do not use.
    Supervisor,
}

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// An error of the library.
    Error(crate::Error),
    /// Conflicting options, detected at run time.
    Usage(String),
    /// Anything else, in one sentence.
    Message(String),
    /// Everything was printed on standard output already.
    Told,
}

impl<E: Into<crate::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Error(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Error(error) => {
                error.fmt(f)?;
                match is_out_of_descriptors(error) {
                    true => f.write_str("; raise the hard limit of open files (ulimit -Hn)"),
                    false => Ok(()),
                }
            }
            Failure::Usage(text) | Failure::Message(text) => f.write_str(text),
            Failure::Told => Ok(()),
        }
    }
}

/// Several files are open at once for each process of a job; the soft limit was raised before.
fn is_out_of_descriptors(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |e| e.source());
    causes.any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|e| e.raw_os_error() == Some(libc::EMFILE))
    })
}

/// Result of a command: the exit code to return.
pub type Outcome = Result<u8, Failure>;

/// Prints a failure, and decides the exit code.
pub(crate) fn finish(role: Role, outcome: Outcome) -> ExitCode {
    report(role, outcome).into()
}

/// The same for a process that ends in another way.
pub(crate) fn report(role: Role, outcome: Outcome) -> u8 {
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            complain(&failure);
            code_of(role, &failure, |name| std::env::var_os(name))
        }
    }
}

/// Prints a message on standard error, each of its lines as `ckpt: …`.
pub(crate) fn complain(message: &dyn fmt::Display) {
    let text: String = message
        .to_string()
        .lines()
        .map(|line| format!("ckpt: {}\n", printable(line)))
        .collect();
    // Ignored: without standard error nothing can be reported.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Names of processes and files are arbitrary; escapes control characters.
fn printable(line: &str) -> String {
    line.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn code_of(role: Role, failure: &Failure, env: impl Fn(&str) -> Option<OsString>) -> u8 {
    match (role, failure) {
        (_, Failure::Usage(_)) => 2,
        (Role::Tool, _) => 1,
        (Role::Supervisor, _) => ["CKPT_FAIL_RC", "DMTCP_FAIL_RC"]
            .into_iter()
            .filter_map(|name| env(name)?.to_str()?.trim().parse().ok())
            .find(|code| *code != 0)
            .unwrap_or(SUPERVISOR_FAILED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor(ckpt: Option<&str>, dmtcp: Option<&str>) -> u8 {
        let failure = Failure::Message("no".into());
        code_of(Role::Supervisor, &failure, |name| {
            let value = if name == "CKPT_FAIL_RC" { ckpt } else { dmtcp };
            value.map(OsString::from)
        })
    }

    #[test]
    fn own_failures_of_supervisors_can_be_named() {
        assert_eq!(supervisor(None, None), 99);
        assert_eq!(supervisor(Some("7"), None), 7);
        assert_eq!(supervisor(None, Some("8")), 8);
        assert_eq!(supervisor(Some("7"), Some("8")), 7);
        for nonsense in ["", "0", "256", "-1", "x"] {
            assert_eq!(supervisor(Some(nonsense), None), 99, "{nonsense:?}");
            assert_eq!(supervisor(Some(nonsense), Some("8")), 8, "{nonsense:?}");
        }
    }

    #[test]
    fn the_tools_code_cannot_be_named() {
        let env = |_: &str| Some(OsString::from("7"));
        assert_eq!(code_of(Role::Tool, &Failure::Told, env), 1);
        assert_eq!(code_of(Role::Tool, &Failure::Usage(String::new()), env), 2);
        assert_eq!(
            code_of(Role::Supervisor, &Failure::Usage(String::new()), env),
            2
        );
    }

    #[test]
    fn escape_sequences_are_not_passed_on() {
        assert_eq!(printable("a\x1b[31mb\r"), "a\u{fffd}[31mb\u{fffd}");
    }
}
