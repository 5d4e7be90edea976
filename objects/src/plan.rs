//! The plan under construction: operations, their data, and the object to which each belongs.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ckpt_restorer::{
    EXITS, MAIN_STACK, Op, OpKind, PARKS, Plan as PlanHeader, THREAD_STACK, TRAPS, ThreadPlan,
};
use ckpt_tracer::blob::Blob;
use ckpt_tracer::capabilities::Held;

mod finished;

use super::rights::Rights;
use crate::credentials::Credentials;
use crate::index::{DescriptionId, FileId, RemovedId, TerminalId};
use crate::memory_policy::MemoryPolicy;
use crate::scheduling::Scheduling;
use crate::security::Surroundings;
use crate::switches::Ours;
use finished::List;
pub use finished::{Part, Plan};

/// The flags of clone(2) for a thread.
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// How a new task gets a chosen id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PidMethod {
    /// `set_tid` of clone3(2).
    #[default]
    SetTid,
    /// By writing the preceding id to `/proc/sys/kernel/ns_last_pid`.
    LastPid,
    /// By using up all ids before it.
    UseUp,
}

/// The state of a new process before the plan sets anything, and what it may do.
#[derive(Clone, Debug, Default)]
pub struct HostState {
    /// How tasks get their ids.
    pub pid_method: PidMethod,
    /// Our own credentials.
    pub credentials: Credentials,
    /// Our own scheduling.
    pub scheduling: Scheduling,
    /// Its effective capabilities.
    pub held: Held,
    /// The user with whose rights it opens files, if not ours.
    pub rights: Option<Rights>,
    /// The owner of its session keyring, if it must not keep ours.
    pub keyring: Option<(u32, u32)>,
    /// The job is alive: the names and objects that it holds will be free when it is restored.
    pub leaving: bool,
    /// Our own switches.
    pub switches: Ours,
    /// Our own audit login uid, if the job may have another one.
    pub login_uid: Option<u32>,
    /// Our own memory policy.
    pub memory_policy: Option<MemoryPolicy>,
    /// Our security contexts, and those that a new process may take.
    pub security: Surroundings,
}

/// A point at which the restorer traps to the tracer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Every mapping with pages of the image exists and can be filled.
    Fill,
    /// The process leads its session or group, and has created its children.
    Born,
    /// It has joined its group; zombies and other temporary processes may end.
    Joined,
    /// All threads exist and are parked.
    Threads,
}

/// A descriptor that the new process inherits from `restore`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherit {
    /// Its number in the new process until the plan has placed it.
    pub number: i32,
    /// Its kind.
    pub what: Inherited,
}

/// Kinds of inherited descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// A memfd of the snapshot, by description.
    MemFd(DescriptionId),
    /// A file without a name, with contents from the image, opened as the description says.
    DeletedFile(DescriptionId),
    /// A file with a name, by description.
    File(DescriptionId),
    /// A device, by description.
    Device(DescriptionId),
    /// The read end of a FIFO, by the description of one of its ends.
    Fifo(DescriptionId),
    /// A mapped file, or a nameless one with its contents; whether writable.
    MappedFile(FileId, bool),
    /// The executable of a process, by mapped file.
    Executable(FileId),
    /// A pidfd of a process that has ended, by description.
    EndedProcess(DescriptionId),
    /// A nameless object other than a regular file, by description.
    Removed(DescriptionId),
    /// A nameless directory used as working or root directory.
    RemovedPlace(RemovedId),
    /// A file of `/proc` of a process that has ended, by description.
    EndedProcFile(DescriptionId),
    /// An internet socket, by description.
    InetSocket(DescriptionId),
    /// An inotify descriptor without watches, by description.
    Inotify(DescriptionId),
    /// One of our own descriptors, for an object outside the job.
    Own(i32),
    /// A description of a terminal that is created anew, by index.
    Terminal(DescriptionId),
    /// A controlling terminal of a session of the job.
    Leading(TerminalId),
    /// Our own terminal, through `/dev/tty` or not, with these flags.
    OwnTerminal(bool, u32),
    /// A terminal of the machine, by description.
    MachineTerminal(DescriptionId),
    /// A file that the user names, by `--fd` or `--replace-fd`.
    Named(PathBuf, u32),
}

/// A thread or process that the plan creates.
#[derive(Clone, Debug)]
struct Task {
    list: List,
    /// Its id.
    tid: i32,
    /// The list that creates it, as [`Builder::current`].
    creator: usize,
    /// Address of its [`ThreadPlan`].
    plan: u64,
    /// Address of its `struct clone_args`, if it is created by clone3(2).
    args: Option<u64>,
    /// Index of the creating operation.
    created_at: usize,
    /// Of a process, address of its header.
    header: Option<u64>,
    /// [`ThreadPlan::end`].
    end: u64,
}

/// A plan under construction. Everything is placed from `base` on: the restorer, the stack of its first thread, then
/// the data; operations and further stacks follow when it is finished.
#[derive(Debug)]
pub struct Builder {
    base: u64,
    blob: Blob,
    data_base: u64,
    data: Vec<u8>,
    main: List,
    tasks: Vec<Task>,
    /// The list that operations are appended to: 0 is the first thread's, otherwise that of task N-1.
    current: usize,
    objects: Vec<Box<str>>,
    stages: Vec<(usize, usize, Stage)>,
    aims: Vec<(usize, usize, i32)>,
    warnings: Vec<String>,
    conditional: Vec<(usize, usize, String)>,
    /// Operations whose first operand is the result of an earlier one: list, the operation, the earlier.
    answers: Vec<(usize, usize, usize)>,
    inherit: Vec<Inherit>,
    host: HostState,
    /// Bytes of memory that it may still use; `None` after it exceeded that and is incomplete.
    room: Option<u64>,
}

impl Builder {
    /// A plan to be placed at `base`.
    pub fn new(base: u64, host: HostState) -> Self {
        let blob = Blob::load();
        let data_base = base + blob.image.len() as u64 + MAIN_STACK;
        Self {
            base,
            blob,
            data_base,
            data: Vec::new(),
            main: List::default(),
            tasks: Vec::new(),
            current: 0,
            objects: Vec::new(),
            stages: Vec::new(),
            aims: Vec::new(),
            warnings: Vec::new(),
            conditional: Vec::new(),
            answers: Vec::new(),
            inherit: Vec::new(),
            host,
            room: Some(u64::MAX),
        }
    }

    /// The same with a limit of its memory in bytes.
    pub fn within(self, room: u64) -> Self {
        Self {
            room: Some(room),
            ..self
        }
    }

    /// Whether it exceeded that limit.
    pub fn is_too_large(&self) -> bool {
        self.room.is_none()
    }

    /// The descriptors that it inherits.
    pub fn inherited(self) -> Vec<Inherit> {
        self.inherit
    }

    /// Whether that many bytes are left.
    fn takes(&mut self, bytes: usize) -> bool {
        self.room = self.room.and_then(|room| room.checked_sub(bytes as u64));
        self.room.is_some()
    }

    /// The initial state of the new process.
    pub fn host(&self) -> &HostState {
        &self.host
    }

    /// Adds bytes; returns their address.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        if !self.takes(2 * bytes.len()) {
            return self.data_base;
        }
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at, 0);
        self.data.extend_from_slice(bytes);
        self.data_base + at as u64
    }

    /// Adds bytes, page aligned; returns their address.
    pub fn pages(&mut self, bytes: &[u8]) -> u64 {
        let next = self.data_base + self.data.len() as u64;
        let gap = next.next_multiple_of(4096) - next;
        self.data.resize(self.data.len() + gap as usize, 0);
        self.data(bytes)
    }

    /// Reserves memory for the kernel to write to.
    pub fn reserve(&mut self, len: usize) -> u64 {
        if !self.takes(2 * len) {
            return self.data_base;
        }
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at + len, 0);
        self.data_base + at as u64
    }

    /// Adds a path as a C string.
    pub fn path(&mut self, path: &Path) -> u64 {
        let mut bytes = path.as_os_str().as_bytes().to_vec();
        bytes.push(0);
        self.data(&bytes)
    }

    /// A system call that must succeed.
    pub fn syscall(&mut self, nr: i64, args: &[u64], object: impl FnOnce() -> String) {
        self.push(Op::syscall(nr, six(args)), object());
    }

    /// A system call with a required result.
    pub fn expect(&mut self, nr: i64, args: &[u64], answer: u64, object: impl FnOnce() -> String) {
        self.push(Op::syscall(nr, six(args)).expecting(answer), object());
    }

    /// A system call with a required result; its first operand is the address of a word that an earlier one stores.
    pub fn loading(&mut self, nr: i64, args: &[u64], answer: u64, object: impl FnOnce() -> String) {
        let op = Op::syscall(nr, six(args)).expecting(answer).loading();
        self.push(op, object());
    }

    /// A system call that may fail; a failure is reported as a warning.
    pub fn try_syscall(&mut self, nr: i64, args: &[u64], warning: &str) {
        self.push(Op::syscall(nr, six(args)).may_fail(), warning.to_owned());
        let index = self.list().ops.len() - 1;
        let list = self.current;
        self.conditional.push((list, index, warning.to_owned()));
    }

    /// A system call whose failure is ignored.
    pub fn attempt(&mut self, nr: i64, args: &[u64], object: impl FnOnce() -> String) {
        self.push(Op::syscall(nr, six(args)).may_fail(), object());
    }

    /// The same; its first operand is the result of the operation `back` before the last (a descriptor, for example).
    pub fn attempt_with_answer(
        &mut self,
        nr: i64,
        (back, args): (usize, &[u64]),
        object: impl FnOnce() -> String,
    ) {
        let index = self.list().ops.len();
        self.answers
            .push((self.current, index, index.saturating_sub(1 + back)));
        self.push(Op::syscall(nr, six(args)).may_fail().loading(), object());
    }

    /// Loads components of the processor's extended state, from a page-aligned XSAVE area.
    pub fn load_state(&mut self, area: u64, components: u64, object: impl FnOnce() -> String) {
        let op = Op::other(OpKind::LoadState, [area, components, 0, 0, 0, 0]);
        self.push(op, object());
    }

    /// Traps to the tracer, in the list of a process that the plan creates.
    pub fn pause(&mut self) {
        self.push(Op::other(OpKind::Trap, [0; 6]), "helper process".into());
    }

    /// Traps to the tracer.
    pub fn stage(&mut self, stage: Stage) {
        let index = self.list().ops.len();
        self.stages.push((self.current, index, stage));
        self.push(Op::other(OpKind::Trap, [0; 6]), format!("stage {stage:?}"));
    }

    /// Records a difference from the checkpointed state.
    pub fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    /// Requests a descriptor.
    pub fn inherit(&mut self, number: i32, what: Inherited) {
        self.inherit.push(Inherit { number, what });
    }

    /// Creates a thread with that id; `fill` appends its operations.
    pub fn thread(&mut self, tid: i32, fill: impl FnOnce(&mut Self)) {
        let object = format!("thread {tid}");
        self.task(PARKS, tid, (THREAD as u64, 0), object, fill);
    }

    /// Creates a process with that id by clone(2) with `flags` and the exit signal `signal`; `fill` appends its
    /// operations.
    pub fn process(&mut self, pid: i32, flags: i32, signal: i32, fill: impl FnOnce(&mut Self)) {
        // With CLONE_PARENT the exit signal is the creator's own (clone(2)).
        let signal = match flags & libc::CLONE_PARENT {
            0 => signal as u64,
            _ => 0,
        };
        let object = format!("process {pid}");
        self.task(TRAPS, pid, (flags as u64, signal), object, fill);
    }

    /// Creates an *envoy*: a process with that id, which shares memory and descriptors with its creator, executes
    /// what `fill` appends under its own pid, and ends before its creator continues. If it cannot be created, or one
    /// of its operations fails, its creator executes what `otherwise` appends, with a warning.
    pub fn envoy(
        &mut self,
        pid: i32,
        warning: &str,
        fill: impl FnOnce(&mut Self),
        otherwise: impl FnOnce(&mut Self),
    ) {
        // Untraced, like a call of its creator, which waits for it.
        const FLAGS: i32 = libc::CLONE_VM
            | libc::CLONE_VFORK
            | libc::CLONE_FILES
            | libc::CLONE_FS
            | libc::CLONE_UNTRACED;
        if self.host.pid_method != PidMethod::SetTid {
            // Without set_tid the tracer would have to provide the id.
            self.warn(warning.to_owned());
            return otherwise(self);
        }
        let object = format!("envoy {pid}");
        self.task(EXITS, pid, (FLAGS as u64, 0), object.clone(), fill);
        let header = self.tasks.last().and_then(|t| t.header).unwrap_or_default();
        let all = libc::__WALL as u64;
        self.attempt(libc::SYS_wait4, &[pid as u64, 0, all, 0], || object.clone());
        let unless = Op::other(OpKind::Unless, [header, 0, 0, 0, 0, 0]).may_fail();
        self.push(unless, object);
        let (list, index) = (self.current, self.list().ops.len() - 1);
        self.conditional.push((list, index, warning.to_owned()));
        otherwise(self);
        let ops = &mut self.list().ops;
        ops[index].args[1] = (ops.len() - index - 1) as u64;
    }

    /// Creates a thread that executes what `fill` appends, and ends before its creator continues. Its id is `tid` if
    /// ids may be chosen; otherwise another one, which is written to `id_at`.
    pub fn passing_thread(
        &mut self,
        (tid, id_at): (i32, u64),
        object: &str,
        fill: impl FnOnce(&mut Self),
    ) {
        // Untraced, like a call of its creator, which waits for it.
        const FLAGS: i32 = THREAD | libc::CLONE_VFORK | libc::CLONE_UNTRACED;
        let plan = self.reserve(size_of::<ThreadPlan>());
        let created_at = self.list().ops.len();
        let chosen = self.host.pid_method == PidMethod::SetTid;
        let args = chosen.then(|| self.clone_args(tid, FLAGS as u64, 0));
        let op = match args {
            Some(args) => Op::create(OpKind::Process, libc::SYS_clone3, [plan, args, 88, 0]),
            None => {
                let flags = (FLAGS | libc::CLONE_CHILD_SETTID) as u64;
                Op::create(OpKind::Process, libc::SYS_clone, [plan, flags, 0, id_at])
            }
        };
        self.push(op, object.to_owned());
        let header = self.reserve(size_of::<PlanHeader>());
        let outer = std::mem::replace(&mut self.current, self.tasks.len() + 1);
        self.tasks.push(Task {
            list: List::default(),
            tid,
            creator: outer,
            plan,
            args,
            created_at,
            header: Some(header),
            end: EXITS,
        });
        fill(self);
        self.current = outer;
        // Fails if it has completed.
        let done = Op::other(OpKind::Unless, [header, 0, 0, 0, 0, 0]);
        self.push(done, object.to_owned());
    }

    fn task(
        &mut self,
        end: u64,
        tid: i32,
        (flags, exit_signal): (u64, u64),
        object: String,
        fill: impl FnOnce(&mut Self),
    ) {
        // ThreadPlan and stack contents are written at the end, when addresses are known.
        let plan = self.reserve(size_of::<ThreadPlan>());
        let kind = match end {
            PARKS => OpKind::Thread,
            _ => OpKind::Process,
        };
        let (args, op) = match self.host.pid_method {
            PidMethod::SetTid => {
                let args = self.clone_args(tid, flags, exit_signal);
                let op = Op::create(kind, libc::SYS_clone3, [plan, args, 88, 0]);
                (Some(args), op)
            }
            // The tracer provides the id; the stack is known at the end.
            PidMethod::LastPid | PidMethod::UseUp => {
                let index = self.list().ops.len();
                self.aims.push((self.current, index, tid));
                self.push(Op::other(OpKind::Trap, [0; 6]), object.clone());
                let op = Op::create(kind, libc::SYS_clone, [plan, flags | exit_signal, 0, 0]);
                (None, op)
            }
        };
        let created_at = self.list().ops.len();
        let op = op.expecting(tid as u64);
        self.push(if end == EXITS { op.may_fail() } else { op }, object);
        let header = (end != PARKS).then(|| self.reserve(size_of::<PlanHeader>()));
        let outer = std::mem::replace(&mut self.current, self.tasks.len() + 1);
        self.tasks.push(Task {
            list: List::default(),
            tid,
            creator: outer,
            plan,
            args,
            created_at,
            header,
            end,
        });
        fill(self);
        self.current = outer;
    }

    /// A `struct clone_args` with a requested id; its stack is written at the end.
    fn clone_args(&mut self, tid: i32, flags: u64, exit_signal: u64) -> u64 {
        let ids = self.data(&tid.to_le_bytes());
        let args = self.reserve(88);
        // flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid n cgroup
        let size = THREAD_STACK - 8;
        let words = [flags, 0, 0, 0, exit_signal, 0, size, 0, ids, 1, 0];
        self.put(args, &words.map(u64::to_le_bytes).concat());
        args
    }

    /// Waits until all threads of the process are parked.
    pub fn join(&mut self) {
        self.push(Op::other(OpKind::Join, [0; 6]), "threads".into());
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = (at - self.data_base) as usize;
        match self.data.get_mut(at..at + bytes.len()) {
            Some(place) => place.copy_from_slice(bytes),
            None => assert!(self.is_too_large(), "it was set aside"),
        }
    }

    fn list(&mut self) -> &mut List {
        match self.current.checked_sub(1) {
            Some(task) => &mut self.tasks[task].list,
            None => &mut self.main,
        }
    }

    fn push(&mut self, op: Op, object: String) {
        let is_new = self.objects.last().is_none_or(|last| **last != *object);
        // In the list, and in the restorer's layout.
        let bytes = 2 * size_of::<Op>() + if is_new { 40 + object.len() } else { 0 };
        if !self.takes(bytes) && !self.list().ops.is_empty() {
            return;
        }
        if is_new {
            self.objects.push(object.into());
        }
        let index = (self.objects.len() - 1) as u32;
        let list = self.list();
        list.ops.push(op);
        list.objects.push(index);
    }
}

fn six(args: &[u64]) -> [u64; 6] {
    std::array::from_fn(|i| args.get(i).copied().unwrap_or(0))
}
