//! Processor state that needs a permission: AMX tiles (arch_prctl(2), `ARCH_REQ_XCOMP_PERM`).
//!
//! The permission is per process; the kernel extends a task's buffer at its first use. Before that it does not accept
//! such state from a tracer (`validate_user_xstate_header`, arch/x86/kernel/fpu/xstate.c), so a thread with tiles in
//! use first loads them itself.

use ckpt_tracer::remote::{Call, RemoteCalls};
use ckpt_tracer::{Error, Result};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::processor::{COMPONENTS, HEADER, in_use};
use crate::plan::Builder;

/// Permitted components, bit n for component n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DynamicState {
    /// For the process itself.
    pub own: u64,
    /// For its guests (KVM).
    pub guest: u64,
}

/// `ARCH_GET_XCOMP_PERM`, `ARCH_REQ_XCOMP_PERM` (asm/prctl.h).
const OWN: (u64, u64) = (0x1022, 0x1023);
/// `ARCH_GET_XCOMP_GUEST_PERM`, `ARCH_REQ_XCOMP_GUEST_PERM`.
const GUEST: (u64, u64) = (0x1024, 0x1025);
/// Tile data, the only component that needs a permission (`XFEATURE_MASK_USER_DYNAMIC`).
const TILE_DATA: u32 = 18;
/// Tile configuration and data.
const TILES: u64 = 1 << 17 | 1 << TILE_DATA;

/// The permissions of the process; none before Linux 5.16.
pub fn capture(calls: &mut RemoteCalls<'_>) -> Result<DynamicState> {
    let out = calls.scratch();
    calls.write_scratch(0, &[0; 16])?;
    let get = |which: (u64, u64), at| Call::new("arch_prctl", libc::SYS_arch_prctl, &[which.0, at]);
    let list = [get(OWN, out.raw()), get(GUEST, out.raw() + 8)];
    let tid = calls.tid();
    for (answer, call) in calls.batch(64, &list)?.into_iter().zip(list) {
        let errno = Errno::from_raw(-answer as i32);
        if answer < 0 && errno != Errno::EINVAL {
            let call = call.name;
            return Err(Error::Remote { tid, call, errno });
        }
    }
    let word = |bytes: [u8; 8]| u64::from_le_bytes(bytes) & 1 << TILE_DATA;
    Ok(DynamicState {
        own: word(calls.read_scratch(0)?),
        guest: word(calls.read_scratch(8)?),
    })
}

impl DynamicState {
    /// Requests them again, before alternate stacks are set, since the kernel then checks their sizes.
    pub fn rebuild(&self, plan: &mut Builder) {
        for (state, which) in [(self.own, OWN), (self.guest, GUEST)] {
            if state & 1 << TILE_DATA != 0 {
                let args = [which.1, TILE_DATA.into()];
                plan.syscall(libc::SYS_arch_prctl, &args, || {
                    "permission to use AMX".into()
                });
            }
        }
    }
}

/// Makes a thread load its tiles, if they are in use.
pub fn load_tiles(xstate: &[u8], plan: &mut Builder) {
    let used = in_use(xstate) & TILES;
    if used & 1 << TILE_DATA == 0 {
        return;
    }
    // The standard format; only the tiles are loaded.
    let mut area = xstate.to_vec();
    area[HEADER..COMPONENTS].fill(0);
    area[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
    let at = plan.pages(&area);
    plan.load_state(at, TILES, || "AMX tiles".into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::HostState;

    fn plan_of(fill: impl FnOnce(&mut Builder)) -> String {
        let mut plan = Builder::new(0x10_0000, HostState::default());
        fill(&mut plan);
        plan.finish().to_text()
    }

    #[test]
    fn permissions_are_asked_for_again() {
        let state = DynamicState {
            own: 1 << TILE_DATA,
            guest: 1 << TILE_DATA,
        };
        let text = plan_of(|plan| state.rebuild(plan));
        assert!(text.contains("arch_prctl(4131, 18)"), "{text}");
        assert!(text.contains("arch_prctl(4133, 18)"), "{text}");
        let none = plan_of(|plan| DynamicState::default().rebuild(plan));
        assert!(!none.contains("arch_prctl"), "{none}");
    }

    #[test]
    fn tiles_that_hold_something_are_loaded() {
        let mut xstate = vec![0u8; 11_008];
        let uses = |xstate: &mut [u8], used: u64| {
            xstate[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
        };
        uses(&mut xstate, 7 | TILES);
        let text = plan_of(|plan| load_tiles(&xstate, plan));
        assert!(text.contains("load processor state 0x60000"), "{text}");
        // The configuration alone needs no extended buffer.
        uses(&mut xstate, 7 | 1 << 17);
        let text = plan_of(|plan| load_tiles(&xstate, plan));
        assert!(!text.contains("load"), "{text}");
    }
}
