//! How a snapshot comes to fit this machine.

pub mod bundle;
pub mod paths;
