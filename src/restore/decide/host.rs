//! What a new process inherits from us.

use ckpt_tracer::capabilities::Held;
use ckpt_tracer::{Pid, Tid};

use crate::objects::credentials::Credentials;
use crate::objects::plan::{HostState, PidMethod};
use crate::objects::rights::Rights;
use crate::objects::switches::Ours;
use crate::objects::{Snapshot, memory_policy, scheduling, security, session};
use crate::restore::probed::Probed;
use crate::restore::run::spawn;

/// The credentials of a new process with these supplementary groups, and its effective capabilities.
pub(in crate::restore) fn credentials(probed: &Probed, groups: &[u32]) -> (Credentials, Held) {
    let status = &probed.ours;
    let mut credentials = Credentials::of(status, ckpt_sys::credentials::securebits());
    credentials.groups = groups.to_vec();
    // An exec by root gives all permitted capabilities; by others, only the ambient ones.
    let by_exec = match status.uid.effective {
        0 => status.capabilities.bounding,
        _ => status.capabilities.ambient,
    };
    (credentials.permitted, credentials.effective) = (by_exec, by_exec);
    let held = probed.kernel.capabilities.with(by_exec);
    (credentials, held)
}

/// Everything that a new process inherits. `leaving`: the job still runs, and its ids and names count as free.
pub(in crate::restore) fn state(
    snapshot: &Snapshot,
    probed: &Probed,
    (groups, pid_method, leaving): (&[u32], PidMethod, bool),
) -> HostState {
    let me = Pid::own();
    let (mut credentials, held) = credentials(probed, groups);
    let rights = Rights::of(snapshot, &credentials, held);
    if let Some(rights) = &rights {
        // The initial groups of the plan.
        credentials.groups = rights.groups().to_vec();
        (credentials.uid[3], credentials.gid[3]) = rights.ids();
    }
    let root = &snapshot.processes[0].threads[0].credentials;
    let another = root.uid[0] != credentials.uid[0];
    HostState {
        pid_method,
        keyring: (another && ckpt_sys::credentials::keyrings_exist())
            .then_some((root.uid[0], root.gid[0])),
        rights,
        leaving,
        scheduling: scheduling::capture(Tid(me.raw()), 0),
        held,
        credentials,
        switches: Ours::ask(),
        memory_policy: memory_policy::own(),
        login_uid: session::login_uid(&me.into()),
        security: security::Surroundings::of(snapshot, |context| {
            spawn::may_become(context, pid_method)
        }),
    }
}
