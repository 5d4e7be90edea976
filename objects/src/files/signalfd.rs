//! signalfd(2).

use ckpt_tracer::proc::fdinfo::FdDetail;
use ckpt_tracer::proc::fdlink::FdLink;
use serde::{Deserialize, Serialize};

use super::kind::{Captured, OpenFile, Place, Sight};
use crate::error::Obstacle;
use crate::plan::Builder;
use crate::source::Collector;

/// A signalfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalFd {
    /// The signals that it reads, bit n-1 for signal n.
    pub mask: u64,
}

impl OpenFile for SignalFd {
    fn capture(sight: &Sight, _: &mut Collector) -> Captured {
        match (&sight.look.link, &sight.look.info.detail) {
            (FdLink::AnonInode(_), FdDetail::SignalFd { mask }) => {
                Some(Ok(SignalFd { mask: *mask }.into()))
            }
            _ => None,
        }
    }

    fn anon_inode() -> Option<&'static str> {
        Some("signalfd")
    }

    fn class(&self) -> &'static str {
        "signalfd"
    }

    fn open(&self, place: &Place, plan: &mut Builder) -> Result<(), Vec<Obstacle>> {
        let object = || "a signalfd".to_owned();
        let mask = plan.data(&self.mask.to_le_bytes());
        let flags = place.flags & libc::O_NONBLOCK as u32;
        plan.expect(
            libc::SYS_signalfd4,
            &[u64::MAX, mask, 8, flags.into()],
            0,
            object,
        );
        super::place(0, place.at, plan, object);
        Ok(())
    }
}
