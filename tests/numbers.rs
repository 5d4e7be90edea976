//! Numbers in records: each has a bound where it is read (`objects/src/bounds.rs`), or a reason why it needs none.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Fields without a bound, by the reason.
#[rustfmt::skip]
const FREE: &[(&str, &str)] = &[
    ("the kernel's, never passed to it: only compared with another one",
     "Bundled.device Bundled.inode FifoEnd.device FifoEnd.inode FileIdentity.device FileIdentity.inode MemFd.inode InetSocket.inode Pending.inode State.other \
      MessageQueue.inode PidFd.inode PipeEnd.inode SharedMemory.inode NetlinkSocket.inode NetlinkSocket.charged UnixSocket.inode Removed.device Removed.inode \
      Terminal.device Device.number End.node Place.namespace Message.from Role.peer Role.pending Of.started \
      Processor.signature Word.bits Word.leaf Word.subleaf Seccomp.around Thread.core_cookie"),
    ("an index, checked against its list in objects/src/references",
     "Adjustment.semaphore SpaceId.0"),
    ("an address, checked there too",
     "AddressSpace.inherited Mapping.start Mapping.end Mapping.guards Mapping.prot"),
    ("an address or a length that the kernel accepts or refuses, not used here",
     "Action.handler Action.restorer Dispatch.selector Dispatch.offset Dispatch.len Layout.arg_end Layout.arg_start \
      Layout.brk Layout.end_code Layout.end_data Layout.env_end Layout.env_start Layout.start_brk Layout.start_code \
      Layout.start_data Layout.start_stack Rseq.address Rseq.flags Rseq.length Rseq.signature Thread.alternate_stack \
      Thread.clear_child_tid Thread.robust_list GeneralRegisters.0 Segment.base Segment.limit Segment.flags"),
    ("bits, any of which may be set",
     "Action.flags Action.mask AddressSpace.membarrier Attributes.flags Credentials.ambient Credentials.bounding \
      Credentials.effective Credentials.inheritable Credentials.permitted Credentials.securebits Description.flags \
      DynamicState.guest DynamicState.own Entry.events Host.xcr0 Fanotify.event_flags Fanotify.flags Filter.flags Mark.flags \
      Mark.ignored Mark.kind Mark.mask MemFd.seals Modes.control Modes.input Modes.local Modes.output \
      Process.coredump_filter Process.personality SignalFd.mask Thread.signal_mask Watch.mask Pair.status"),
    ("a user or group, who may be had or not: the kernel says",
     "Access.owner Attributes.owner Credentials.gid Credentials.groups Credentials.uid Description.made_by \
      MessageQueue.gid MessageQueue.uid NameFile.gid NameFile.uid Object.creator_gid Object.creator_uid Object.gid \
      Object.uid Process.login_uid Saved.owner Ucred.gid Ucred.uid UserNamespace.inherited_groups \
      UserNamespace.owner Zombie.ids"),
    ("the program's own, handed on as it is",
     "Entry.data PosixTimer.value Object.key Message.kind Set.values Adjustment.by Switch.value SocketOption.number SocketOption.level"),
    ("an operand of a call that the kernel refuses if it does not like it",
     "Address.port Address.scope Membership.interface NetlinkSocket.groups NetlinkSocket.port NetlinkSocket.switches NetlinkSocket.protocol NetlinkSocket.style MessageQueue.notify BusyPoll.budget BusyPoll.microseconds BusyPoll.preferred Limit.hard Limit.soft MemoryPolicy.mode Modes.chars \
      Modes.input_speed Modes.line Modes.output_speed PosixTimer.clock PosixTimer.overrun ProcFile.offset \
      Process.record_locks Regular.offset Role.backlog Scheduling.timer_slack Size.columns Size.height Size.rows \
      Size.width Thread.io_ports TimerFd.ticks Hierarchy.threads"),
    ("no record of an image: the parts of a restore tell each other",
     "Clocks.boottime_ns Clocks.monotonic_ns Clocks.monotonic_raw_ns"),
    ("a time of a file, of which any can be set",
     "Attributes.accessed_ns Attributes.lifetime Attributes.modified_ns FileIdentity.created_ns \
      FileIdentity.modified_ns"),
    ("fits with what is in it, or the image is refused (objects/src/files/pieces.rs, objects/src/aio)",
     "FifoEnd.capacity PipeEnd.capacity Ring.head Ring.id Ring.tail"),
];

/// Fields of records that are numbers, by `Record.field`; whether they have a bound.
fn fields(source: &str, found: &mut BTreeMap<String, bool>) {
    let mut record: Option<String> = None;
    let (mut derives, mut bound) = (false, false);
    for line in source.lines() {
        let text = line.trim();
        let declared = ["struct ", "enum "].iter().find_map(|kind| {
            let rest = text.strip_prefix("pub ").unwrap_or(text);
            rest.strip_prefix(kind)
        });
        if text.starts_with("#[derive(") {
            derives = text.contains("Deserialize");
        } else if let Some(rest) = declared {
            let end = rest
                .find(|c: char| !c.is_alphanumeric())
                .unwrap_or(rest.len());
            let name = rest[..end].to_owned();
            if derives && let Some((_, one)) = rest.split_once('(') {
                note(&format!("{name}.0"), one, one.contains("bounds::"), found);
            }
            record = (derives && rest.ends_with('{')).then_some(name);
            derives = false;
        } else if line == "}" {
            record = None;
        } else if text.contains("bounds::") {
            // How many elements a list has says nothing of each.
            bound |= !text.contains("bounds::few");
        } else if let (Some(record), Some((name, kind))) = (&record, text.split_once(": "))
            && !text.starts_with("//")
            && !text.starts_with('#')
        {
            let name = name.strip_prefix("pub ").unwrap_or(name);
            note(&format!("{record}.{name}"), kind, bound, found);
            bound = false;
        }
    }
}

fn note(field: &str, kind: &str, bound: bool, found: &mut BTreeMap<String, bool>) {
    let mut words = kind.split(|c: char| !c.is_alphanumeric());
    let number = |word: &str| {
        let rest = word.strip_prefix(['u', 'i']);
        rest.is_some_and(|rest| ["8", "16", "32", "64", "128", "size"].contains(&rest))
    };
    // Bytes are as many as the image has.
    if words.any(number) && !kind.contains("<u8>") {
        let before = found.entry(field.to_owned()).or_insert(bound);
        *before &= bound;
    }
}

fn sources(place: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(place).expect("the sources are there") {
        let path = entry.expect("it is readable").path();
        match path.is_dir() {
            true => sources(&path, all),
            false => all.push(path),
        }
    }
}

#[test]
fn each_has_a_bound_or_a_reason() {
    let mut all = Vec::new();
    // Modes and sizes of terminals are the system calls' own.
    for crate_of_records in ["objects/src", "sys/src"] {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join(crate_of_records);
        sources(&place, &mut all);
    }
    let mut found = BTreeMap::new();
    for path in all {
        let text = fs::read_to_string(path).expect("it is text");
        let text = text
            .split("\n#[cfg(test)]\nmod tests")
            .next()
            .unwrap_or_default();
        fields(text, &mut found);
    }
    assert!(found.values().filter(|bound| **bound).count() > 80);
    let free: Vec<&str> = FREE
        .iter()
        .flat_map(|(_, fields)| fields.split_whitespace())
        .collect();
    let open = found
        .iter()
        .filter(|(field, bound)| !**bound && !free.contains(&field.as_str()));
    let open: Vec<&String> = open.map(|(field, _)| field).collect();
    assert_eq!(open, [""; 0], "give them a bound of objects/bounds.rs");
    let gone = free
        .iter()
        .filter(|field| found.get(**field) != Some(&false));
    let gone: Vec<&&str> = gone.collect();
    assert!(gone.is_empty(), "{gone:?} are none, or have a bound");
}
