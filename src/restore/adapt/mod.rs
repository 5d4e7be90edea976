//! Adapts a snapshot to this machine.

pub mod bundle;
pub mod paths;
