//! Every fixture through checkpoint, kill and restore: it judges itself, and from outside it
//! looks as before.

use crate::common;
use crate::common::fixture::{changing, exceptions};
use crate::common::look::{self, assert_let_go};
use crate::common::refused::attach_is_refused;
use crate::common::tool::{ckpt, leftovers};
use crate::common::{Case, Looks, attach, fixture, isolated, isolated_as_user, restored};
use std::os::unix::fs::MetadataExt;

/// What is not supported: the fixture and the words that name the object and the remedy.
const REFUSED: &[(&str, &[&str])] = &[
    (
        "aio_inflight",
        &[
            "AIO context",
            "requests in flight that do not end (3)",
            "io_cancel",
        ],
    ),
    (
        "tcp_backlog",
        &["waits to be accepted, and has", "unread bytes", "accept it"],
    ),
    ("tcp_urgent", &["urgent byte (MSG_OOB)", "read from it"]),
    (
        "udp_corked",
        &["not complete (UDP_CORK, MSG_MORE)", "send it"],
    ),
    (
        "udp_errors",
        &["pending error before its unread datagrams", "read from it"],
    ),
];

/// A checkpoint, after which it goes on as if nothing had been.
fn goes_on(case: &Case, name: &str) {
    if let Some((_, words)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return attach_is_refused(case, fixture(case, name), words);
    }
    needs_its_rights(case, name);
    let fixture = fixture(case, name);
    let before = Looks::at(fixture.pid());
    let (image, figures) = attach(case, fixture.pid(), "job.ckpt", &[]);
    assert_let_go(fixture.pid());
    before.assert_same(fixture.pid(), changing(name));
    assert_eq!(figures["pid"], fixture.pid());
    assert_eq!(leftovers(case.dir()), ["job.ckpt"]);
    assert_eq!(image.metadata().expect("it is there").mode() & 0o777, 0o600);
    ckpt(case, ["verify".as_ref(), image.as_os_str()]).ok();
    fixture.passes();
}

/// A checkpoint, then death, then a new life; `times` times.
fn lives_again(case: &Case, name: &str, times: usize) {
    if let Some((_, words)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return attach_is_refused(case, fixture(case, name), words);
    }
    needs_its_rights(case, name);
    let mut fixture = fixture(case, name);
    let before = Looks::at(fixture.pid());
    for _ in 0..times {
        let pid = fixture.pid();
        let image = fixture.killed_into(case, "job.ckpt");
        fixture.continued_by(restored(case, &image, &[]));
        assert_eq!(fixture.pid(), pid, "the pid is another one");
        assert_let_go(pid);
        before.assert_same(pid, &exceptions(name));
    }
    fixture.passes();
}

/// A hundred checkpoints while it runs.
fn hundred(case: &Case, name: &str) {
    let fixture = fixture(case, name);
    for _ in 0..100 {
        attach(case, fixture.pid(), "job.ckpt", &["--codec", "none"]);
        assert_let_go(fixture.pid());
    }
    fixture.passes();
}

macro_rules! matrix {
    ($($name:ident)*; twins $($twin:ident = $file:literal)*; hundred $($often:ident)*) => {
        const LISTED: &[&str] = &[$(stringify!($name)),*];

        matrix!(@ goes_on isolated, super::goes_on; $($name)* ; $($twin = $file)*);
        matrix!(@ lives_again isolated, |case, name| super::lives_again(case, name, 1);
            $($name)* ; $($twin = $file)*);
        matrix!(@ three_lives isolated, |case, name| super::lives_again(case, name, 3);
            $($name)* ; $($twin = $file)*);
        matrix!(@ as_user isolated_as_user, |case, name| super::as_user(case, name);
            $($name)* ; $($twin = $file)*);
        matrix!(@ hundred isolated, super::hundred; $($often)* ;);
    };
    (@ $module:ident $isolated:ident, $body:expr; $($name:ident)*; $($twin:ident = $file:literal)*)
    => {
        mod $module {
            $(#[test]
            fn $name() {
                let name = concat!(stringify!($module), "::", stringify!($name));
                super::$isolated(name, |case| ($body)(case, stringify!($name)));
            })*
            $(#[test]
            fn $twin() {
                let name = concat!(stringify!($module), "::", stringify!($twin));
                super::$isolated(name, |case| {
                    if !case.fixtures().join($file).exists() {
                        case.skip("musl-gcc (musl-tools)");
                    }
                    ($body)(case, $file)
                });
            })*
        }
    };
}

/// Skips what an ordinary user has no right to.
fn needs_its_rights(case: &Case, name: &str) {
    let wants = |f: &ckpt_fixtures::Fixture| {
        f.name == name && f.needs.iter().any(|n| n == "root" || n == "ckpt-root")
    };
    // `creds` sets supplementary groups, which a user namespace of an ordinary user denies.
    if name == "creds" || ckpt_fixtures::all().iter().any(wants) {
        case.needs_root();
    }
}

/// Like `lives_again`, of an ordinary user in a user namespace.
fn as_user(case: &Case, name: &str) {
    lives_again(case, name, 1);
}

matrix! {
    aio aio_busy aio_inflight aio_pinned aio_ring amx anon_private anon_shared anonname bigsparse brk cleartid clocks condvar
    core_sched counter creds cwd dev_console dev_tty dispatch droppable dumpable epoll epoll_busy epoll_dup eventfd exelink fanotify fcntl_owner
    fd_appended fd_chardev fd_deleted fd_dir fd_dup fd_grown fd_hardlink fd_high fd_many fd_opath fd_proc fd_regular fd_removed fd_tmpfile
    fifo file_deleted file_private file_shared flock_self fragmented fsgs growsdown guard handler_slow hugetlb icmp inhandler inotify
    inotify_deep inotify_nameless inotify_open inotify_unread ldt lease limits limits_used lock_kinds login madvflags map_beyond maps maps_changing maps_limit
    mdwe membarrier memfd memfd_exec
    mempolicy mlock mlockall mmfields mq_notify mqueue mseal mutex_pi_held mutex_robust_held netlink_route nnp noreserve oomscore pdeathsig
    personality pidfd pipe pipe_packet pipe_splice pkey protnone pty_locked pty_modes pty_packet pty_pair pty_session
    pty_several pty_stopped restart_epoll restart_futex restart_locks restart_misc restart_nanosleep restart_poll
    restart_sysv robust rodata root rseq sched seccomp seccomp_strict seccomp_tsync segv_regs sem_posix shm_posix
    sigaction sigaltstack sigmask signal_sequence signalfd signalfd_ignored sigpending sigpending_fault sigpending_stop sigpending_sync
    sleepers sock_abstract
    sock_deleted sock_dgram sock_filter sock_halfclosed sock_listen sock_named sock_options sock_pair sock_peercred sock_rights
    sock_rights_kinds sock_seqpacket sock_urgent stack stopped storm subreaper switches sysv_msg sysv_sem sysv_sem_undo sysv_shm tcp_backlog tcp_blocked tcp_connecting tcp_halfclosed tcp_listen
    tcp_options tcp_pair tcp_queues tcp_shared tcp_tree tcp_urgent thp thpdisable threadname
    threads threads500 timerfd timers_ended timers_itimer timers_pending timers_posix tree_adopted tree_cow tree_creds
    tree_deep tree_exec
    tree_fifo tree_files_struct tree_fs_struct tree_futex tree_group tree_growing tree_locks
    tree_memfd tree_orphan tree_pdeathsig tree_pipe tree_ptrace_signals tree_session
    tree_session_gone tree_sharedfd tree_shm tree_sigchld tree_signalfd tree_stopped tree_stopping
    tree_sysvsem tree_thousand tree_vm tree_vm_orphan tree_vm_stopped tree_vm_threads tree_wait
    tree_wide tree_zombie udp udp_corked udp_errors udp_multicast udp_options umask vdso vdso_handler xstate;
twins
    counter_static = "counter.static" threads_static = "threads.static"
    sigpending_static = "sigpending.static" vdso_static = "vdso.static"
    restart_nanosleep_static = "restart_nanosleep.static" rseq_static = "rseq.static"
    robust_static = "robust.static" sleepers_static = "sleepers.static"
    counter_musl = "counter.musl" threads_musl = "threads.musl";
hundred sleepers threads rseq aio_busy
}

#[test]
fn every_fixture_is_listed() {
    let all: Vec<String> = ckpt_fixtures::all().into_iter().map(|f| f.name).collect();
    assert_eq!(
        LISTED, all,
        "put the names of all fixtures into the list in tests/fixtures.rs"
    );
}

#[test]
fn a_broken_fixture_does_not_pass() {
    isolated("a_broken_fixture_does_not_pass", |case| {
        let mut command = std::process::Command::new(case.fixtures().join("counter"));
        command.env("FIXTURE_BREAK", "1");
        let mut fixture = common::fixture::start_in(case, "counter", "run", command);
        let image = fixture.killed_into(case, "job.ckpt");
        fixture.continued_by(restored(case, &image, &[]));
        fixture.go();
        let ended = common::until("the verdict", || fixture.job.ended());
        assert_eq!(ended, common::Ended::Exited(1), "{}", look::everybody());
    });
}
