//! Bounds of numbers in records: what no kernel has is no snapshot.
//!
//! A record says `#[serde(deserialize_with = "bounds::at_most::<_, _, 15>")]` of a number whose size something
//! else depends on: loops, memory, lengths. So the number is checked once, where it is read.

use std::fmt::Display;

use serde::de::{Deserialize, Deserializer, Error};
use serde_bytes::ByteBuf;

/// A number of at most `MOST`.
///
/// # Errors
/// The format's own, for a number that is above.
pub fn at_most<'de, D, N, const MOST: u64>(deserializer: D) -> Result<N, D::Error>
where
    D: Deserializer<'de>,
    N: Deserialize<'de> + Copy + Display + TryInto<u64>,
{
    let number = N::deserialize(deserializer)?;
    match number.try_into() {
        Ok(small) if small <= MOST => Ok(number),
        _ => Err(D::Error::custom(format!("{number} is above {MOST}"))),
    }
}

/// Bytes, `MOST` of them at most.
///
/// # Errors
/// The format's own, for more.
pub fn bytes<'de, D: Deserializer<'de>, const MOST: usize>(
    deserializer: D,
) -> Result<Vec<u8>, D::Error> {
    let bytes = ByteBuf::deserialize(deserializer)?.into_vec();
    match bytes.len() <= MOST {
        true => Ok(bytes),
        false => Err(D::Error::custom(format!(
            "{} bytes, of {MOST} at most",
            bytes.len()
        ))),
    }
}
