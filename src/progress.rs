//! Progress of long operations.

/// Progress sink of a checkpoint, a restore or a verification. Calls are cheap and may come from several threads.
pub trait Progress: Sync {
    /// Sets the total work in bytes, as soon as it is known.
    fn begin(&self, total: u64);
    /// Adds completed bytes.
    fn advance(&self, bytes: u64);
    /// Ends the operation.
    fn end(&self);
}

/// Ignores progress.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _total: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn end(&self) {}
}
