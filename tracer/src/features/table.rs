//! The probed features as a table for display.

use super::KernelFeatures;
use crate::capabilities::{self, Use};

/// One row of what `ckpt check` prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureRow {
    /// The feature.
    pub name: &'static str,
    /// Whether it is there.
    pub available: bool,
    /// What does not work, or not as well, without it.
    pub needed_for: &'static str,
    /// Further details.
    pub detail: String,
}

impl KernelFeatures {
    /// All rows, for display.
    pub fn table(&self) -> Vec<FeatureRow> {
        let row = |name, available, needed_for, detail: &str| FeatureRow {
            name,
            available,
            needed_for,
            detail: detail.to_owned(),
        };
        let yama = match self.yama_scope {
            None => "no Yama".to_owned(),
            Some(scope) => format!("kernel.yama.ptrace_scope = {scope}"),
        };
        let rseq = format!("{} bytes of struct rseq in use", self.rseq_feature_size);
        let hidepid = format!("hidepid={} on /proc", self.hidepid);
        let takes = |of: Use| format!("needs {of}");
        let overcommit = format!("vm.overcommit_memory = {}", self.overcommit);
        let xsave = format!("{} bytes, XCR0 = {:#x}", self.cpu.xsave_size, self.cpu.xcr0);
        let limits = format!(
            "vm.max_map_count = {}, kernel.pid_max = {}, kernel.threads-max = {}",
            self.max_map_count, self.pid_max, self.threads_max
        );
        vec![
            row("kernel", true, "everything", &self.release),
            row(
                "processor",
                true,
                "restoring on another machine",
                &self.cpu.model,
            ),
            row("xsave", self.cpu.xcr0 != 0, "vector registers", &xsave),
            row("PTRACE_SEIZE", self.ptrace_seize, "everything", &yama),
            row(
                "ptrace of unrelated processes",
                self.yama_scope.unwrap_or(0) == 0 || self.capabilities.allows(Use::Trace),
                "a program that `ckpt run` did not start",
                &yama,
            ),
            row(
                "PTRACE_GET_RSEQ_CONFIGURATION",
                self.ptrace_rseq,
                "programs with restartable sequences (glibc 2.35 and later)",
                &rseq,
            ),
            row(
                "PTRACE_O_SUSPEND_SECCOMP",
                self.suspend_seccomp,
                "programs with seccomp filters",
                &takes(Use::SuspendSeccomp),
            ),
            row(
                "process_vm_readv",
                self.process_vm_readv,
                "reading memory fast",
                "Linux 3.2",
            ),
            row(
                "pidfd_open",
                self.pidfd_open,
                "descriptors of the job, by pidfd_getfd",
                "Linux 5.3",
            ),
            row(
                "pidfd_getfd",
                self.pidfd_getfd,
                "contents of pipes and sockets, files that were deleted",
                "Linux 5.6",
            ),
            row("kcmp", self.kcmp, "what processes share", "CONFIG_KCMP"),
            row(
                "PAGEMAP_SCAN",
                self.pagemap_scan,
                "finding pages fast",
                if self.pagemap_guard {
                    "knows guard pages"
                } else {
                    "Linux 6.7"
                },
            ),
            row(
                "map_files",
                self.map_files,
                "mapped files that were deleted",
                &takes(Use::MappedFiles),
            ),
            row(
                "clone3 set_tid",
                self.set_tid,
                "the old pids outside a new namespace",
                &takes(Use::ChoosePids),
            ),
            row(
                "user namespace",
                self.user_namespace,
                "restoring without privilege when pids are taken",
                "unshare(CLONE_NEWUSER), tried",
            ),
            row(
                "pid namespace",
                self.pid_namespace,
                "restoring without privilege when pids are taken",
                "unshare(CLONE_NEWPID) in a new user namespace, tried",
            ),
            row(
                "time namespace",
                self.time_namespace,
                "clocks that go on after a reboot",
                "unshare(CLONE_NEWTIME) in a new user namespace, tried",
            ),
            row(
                "PR_SET_MM_MAP",
                self.set_mm_map,
                "brk, arguments, environment",
                "Linux 3.18",
            ),
            row(
                "MAP_FIXED_NOREPLACE",
                self.map_fixed_noreplace,
                "mapping safely",
                "Linux 4.17",
            ),
            row(
                "PR_SET_VMA_ANON_NAME",
                self.anon_vma_name,
                "names of memory",
                "CONFIG_ANON_VMA_NAME",
            ),
            row(
                "MADV_GUARD_INSTALL",
                self.guard_install,
                "guard pages",
                "Linux 6.13",
            ),
            row("mseal", self.mseal, "sealed mappings", "Linux 6.10"),
            row(
                "MEMBARRIER_CMD_GET_REGISTRATIONS",
                self.membarrier_registrations,
                "programs that registered for membarrier",
                "Linux 6.3",
            ),
            row(
                "/proc shows all",
                self.hidepid == 0,
                "processes of other users",
                &hidepid,
            ),
            row(
                "overcommit",
                self.overcommit != 2,
                "jobs that reserve more memory than there is",
                &overcommit,
            ),
            row("swap", self.swap, "jobs larger than memory", ""),
            row(
                "limits of the system",
                true,
                "many mappings, tasks and large pids",
                &limits,
            ),
            row(
                "capabilities",
                self.capabilities.effective() != 0,
                "what is listed as uses of capabilities",
                &capabilities::set_names(self.capabilities.effective()),
            ),
        ]
    }
}
