//! How far long work has come.

/// Told about the progress of a checkpoint, a restore or a verification. Calls are cheap and
/// may come from several threads.
pub trait Progress: Sync {
    /// The amount of work, in bytes, as soon as it is known.
    fn begin(&self, total: u64);
    /// More bytes are done.
    fn advance(&self, bytes: u64);
    /// Nothing more will come.
    fn end(&self);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _total: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn end(&self) {}
}
