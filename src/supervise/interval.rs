//! Durations on the command line, and the time of the next checkpoint.

use std::time::{Duration, Instant};

/// Parses `10s`, `5m`, `1h`, `2d`, `500ms`, or plain seconds; fractions are allowed.
///
/// # Errors
/// One sentence on what is wrong with `text`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let seconds = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(format!("{unit:?} is no unit of time; use s, m, h, d or ms")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "write it like 10s, 5m, 1h or 90".to_owned())?;
    let duration = Duration::try_from_secs_f64(number * seconds);
    match duration.map_err(|_| "it is too long".to_owned())? {
        Duration::ZERO => Err("it must not be zero".into()),
        duration => Ok(duration),
    }
}

/// The first time after `now` that is a whole number of intervals after `due`; `None` if the clock cannot represent
/// it.
pub(super) fn next_due(due: Instant, interval: Duration, now: Instant) -> Option<Instant> {
    let late = now.saturating_duration_since(due).as_nanos();
    let into = late % interval.as_nanos().max(1);
    let into = Duration::new((into / 1_000_000_000) as u64, (into % 1_000_000_000) as u32);
    now.max(due).checked_add(interval.checked_sub(into)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed() {
        let seconds = |text| parse_duration(text).unwrap().as_secs_f64();
        assert_eq!(seconds("10s"), 10.0);
        assert_eq!(seconds("5m"), 300.0);
        assert_eq!(seconds("1h"), 3600.0);
        assert_eq!(seconds("2d"), 172_800.0);
        assert_eq!(seconds("90"), 90.0);
        assert_eq!(seconds("0.5"), 0.5);
        assert_eq!(seconds("1.5m"), 90.0);
        assert_eq!(seconds("250ms"), 0.25);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "s",
            "0",
            "0s",
            "-1",
            "-1s",
            "1e3",
            "inf",
            "nan",
            "1 s",
            "1y",
            "10S",
            ".",
            "1.2.3",
            "99999999999999999999999d",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn late_checkpoints_do_not_shift_the_others() {
        let (due, second) = (Instant::now(), Duration::from_secs(1));
        let next = |late| next_due(due, second, due + Duration::from_millis(late)).unwrap() - due;
        assert_eq!(next(0), second);
        assert_eq!(next(1), second);
        assert_eq!(next(999), second);
        assert_eq!(next(1000), 2 * second);
        assert_eq!(next(12_345), 13 * second);
    }
}
