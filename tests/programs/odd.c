/*
 * A program in an unusual situation, which ODD names; it follows the protocol of the fixtures.
 * ODD_FILE is the file of the situations that have one.
 */
#include "../../fixtures/aio.h"

#include <arpa/inet.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <linux/perf_event.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

static pid_t child;

static void end_child(void)
{
	kill(child, SIGKILL);
}

static int set;

static void remove_set(void)
{
	semctl(set, 0, IPC_RMID);
}

static bool is(const char *name)
{
	const char *odd = getenv("ODD");

	return odd && !strcmp(odd, name);
}

/* A unix socket that is bound or connected to ODD_FILE. */
static int unix_socket(int type, const char *path, int (*call)(int, const struct sockaddr *, socklen_t))
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int fd = FX_SYS(socket(AF_UNIX, type, 0));

	FX_CHECK(strlen(path) < sizeof(a.sun_path), "%s is too long for an address", path);
	strcpy(a.sun_path, path);
	FX_SYS(call(fd, (void *)&a, sizeof(a)));
	return fd;
}

static atomic_int begun;

/* Goes to 32-bit code that does nothing for ever. */
static void *code32(void *unused)
{
	unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	(void)unused;
	FX_CHECK(code != MAP_FAILED, "mmap: %s", strerror(errno));
	memcpy(code, "\xeb\xfe", 2); /* jmp to itself */
	atomic_store(&begun, 1);
	__asm__ volatile("pushq $0x23; pushq %0; lretq" : : "r"(code));
	__builtin_unreachable();
}

static atomic_int notices;

static void noticed(union sigval unused)
{
	(void)unused;
	atomic_fetch_add(&notices, 1);
}

static void remove_queue(void)
{
	mq_unlink("/odd");
}

static void nothing(int unused)
{
	(void)unused;
}

static sem_t alone;

static void *unshared(void *unused)
{
	(void)unused;
	FX_SYS(unshare(CLONE_FILES));
	sem_post(&alone);
	for (;;)
		pause();
}

/* Descriptors of kinds that are refused; the first is 3. */
static void other_files(const char *file)
{
	long fd = 0;

	if (is("breaking")) {
		fd = FX_SYS(open(file, O_RDONLY));
		signal(SIGIO, SIG_IGN);
		if (fcntl(fd, F_SETLEASE, F_RDLCK))
			fx_skip("leases on this file system (%s)", strerror(errno));
		FX_EQ("open", open(file, O_WRONLY | O_NONBLOCK), -1);
	} else if (is("fanotify")) {
		fd = syscall(SYS_fanotify_init, FAN_CLASS_CONTENT, O_RDONLY);
		if (fd < 0)
			fx_skip("fanotify with permissions (%s)", strerror(errno));
	} else if (is("userfaultfd")) {
		fd = syscall(SYS_userfaultfd, 1 /* UFFD_USER_MODE_ONLY */);
	} else if (is("secret") || is("secret-mapped")) {
		char *at;

		fd = syscall(447 /* memfd_secret */, 0);
		if (fd < 0)
			fx_skip("memfd_secret (%s)", strerror(errno));
		FX_SYS(ftruncate(fd, FX_PAGE));
		at = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		FX_CHECK(at != MAP_FAILED, "mmap: %s", strerror(errno));
		strcpy(at, "key");
		if (is("secret-mapped")) {
			for (int i = 0; i < 2; i++)
				FX_CHECK(mmap(NULL, FX_PAGE, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED, "mmap: %s", strerror(errno));
			close(fd);
		}
	} else if (is("dnotify")) {
		signal(SIGUSR1, SIG_IGN);
		fd = FX_SYS(open(fx_dir, O_RDONLY | O_DIRECTORY));
		FX_SYS(fcntl(fd, F_SETSIG, SIGUSR1));
		if (fcntl(fd, F_NOTIFY, DN_CREATE | DN_MULTISHOT))
			fx_skip("F_NOTIFY (%s)", strerror(errno));
	} else if (is("perf")) {
		struct perf_event_attr attr = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(attr), .config = PERF_COUNT_SW_TASK_CLOCK,
			.exclude_kernel = 1 };

		fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
	} else if (is("bpf")) {
		uint32_t attr[32] = { BPF_MAP_TYPE_ARRAY, 4, 4, 1 };

		fd = syscall(SYS_bpf, BPF_MAP_CREATE, attr, sizeof(attr));
	} else if (is("namespace")) {
		char path[64];
		int told[2];
		pid_t child;

		/* That of a child, which is in another one. */
		FX_SYS(pipe(told));
		child = FX_SYS(fork());
		if (!child) {
			FX_EQ("write", write(told[1], unshare(CLONE_NEWUTS) ? "n" : "y", 1), 1);
			for (;;)
				pause();
		}
		FX_EQ("read", read(told[0], path, 1), 1);
		if (path[0] == 'n')
			fx_skip("permission for a uts namespace");
		close(told[0]);
		close(told[1]);
		snprintf(path, sizeof(path), "/proc/%d/ns/uts", child);
		fd = open(path, O_RDONLY);
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	} else if (is("stranger")) {
		fd = syscall(SYS_pidfd_open, 1, 0);
	}
	if (fd < 0)
		fx_skip("%s (%s)", getenv("ODD"), strerror(errno));
}

static volatile pid_t tid_of_forker;

/* Waits in vfork(2), since its child does not execute a program. */
static void *forker(void *arg)
{
	tid_of_forker = fx_tid();
	if (!vfork()) {
		while (!fx_go())
			fx_nap(FX_MS);
		_exit(0);
	}
	return arg;
}

static bool in_vfork(pid_t tid)
{
	char path[64], text[256];

	if (!tid)
		return false;
	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
	fx_slurp(path, text, sizeof(text));
	return atol(text) == SYS_vfork;
}

static char stack[64 << 10];
static int *sibling;

static int sleep_for_ever(void *arg)
{
	for (;;)
		pause();
	return arg != NULL;
}

static void end_siblings(void)
{
	kill(*sibling, SIGKILL);
	end_child();
}

int main(int argc, char **argv)
{
	const char *file = getenv("ODD_FILE");
	struct sockaddr_un beyond = { .sun_family = AF_UNIX };
	char *map = NULL, old[16] = "";
	int fd = -1, ends[2];

	fx_init(argc, argv);
	if (is("netlink")) {
		fd = FX_SYS(socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK));
	} else if (is("others-time")) {
		struct sigevent event = { .sigev_notify = SIGEV_NONE };
		clockid_t clock;
		timer_t timer;

		FX_PT(clock_getcpuclockid(getppid(), &clock));
		FX_SYS(timer_create(clock, &event, &timer));
	} else if (is("narrow-dispatch")) {
		static char selector;

		/* PR_SET_SYSCALL_USER_DISPATCH */
		if (prctl(59, 1, (unsigned long)main, 16, &selector))
			fx_skip("syscall user dispatch (Linux 5.11)");
	} else if (is("discipline")) {
		/* N_NULL, for which there is no name in the headers of libc. */
		int null = 27;

		fd = FX_SYS(posix_openpt(O_RDWR | O_NOCTTY));
		if (ioctl(fd, TIOCSETD, &null))
			fx_skip("CAP_SYS_ADMIN, for another line discipline");
	} else if (is("unix-stream")) {
		fd = unix_socket(SOCK_STREAM, file, connect);
	} else if (is("unix-datagram")) {
		fd = unix_socket(SOCK_DGRAM, file, connect);
	} else if (is("unix-listen") || is("unix-unaccepted")) {
		fd = unix_socket(SOCK_STREAM, file, bind);
		FX_SYS(listen(fd, 3));
		if (is("unix-unaccepted"))
			FX_EQ("write", write(unix_socket(SOCK_STREAM, file, connect), "early", 5), 5);
	} else if (is("unix-empty")) {
		int a, b;

		fd = unix_socket(SOCK_DGRAM, file, bind);
		a = unix_socket(SOCK_DGRAM, file, connect);
		b = unix_socket(SOCK_DGRAM, file, connect);
		FX_EQ("send", send(a, "x", 1, 0) + send(b, "", 0, 0) + send(a, "yy", 2, 0), 3);
	} else if (is("unix-urgent") || is("unix-urgent-first")) {
		/* It comes with a descriptor. */
		union { struct cmsghdr h; char space[CMSG_SPACE(sizeof(int))]; } control = { 0 };
		struct iovec part = { "w", 1 };
		struct msghdr m = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };

		FX_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
		control.h = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int)) };
		*(int *)CMSG_DATA(&control.h) = ends[0];
		if (is("unix-urgent"))
			FX_EQ("send", send(ends[0], "no", 2, 0), 2);
		if (sendmsg(ends[0], &m, MSG_OOB) != 1)
			fx_skip("urgent bytes of unix sockets");
	} else if (is("unix-ebpf")) {
		/* r0 = 0; exit */
		struct bpf_insn program[] = { { .code = 0xb7 }, { .code = 0x95 } };
		union bpf_attr load = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insns = (uintptr_t)program, .insn_cnt = 2,
					.license = (uintptr_t)"GPL" };
		int filter = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof(load));

		if (filter < 0)
			fx_skip("CAP_BPF, for an eBPF filter");
		FX_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
		FX_SYS(setsockopt(ends[0], SOL_SOCKET, SO_ATTACH_BPF, &filter, sizeof(filter)));
		close(filter);
	} else if (is("unix-error")) {
		/* A message is unread at the one that the other leaves; it is told so. */
		FX_SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
		FX_EQ("send", send(ends[0], "first", 5, 0), 5);
		unix_socket(SOCK_DGRAM, file, bind);
		FX_EQ("send", send(ends[1], "unread", 6, 0), 6);
		strcpy(beyond.sun_path, file);
		FX_SYS(connect(ends[0], (void *)&beyond, sizeof(beyond)));
	} else if (is("uring")) {
		char params[120] = "";

		fd = syscall(SYS_io_uring_setup, 4, params);
		if (fd < 0)
			fx_skip("io_uring (%s)", strerror(errno));
	} else if (is("netlink-twice")) {
		int other;

		fd = FX_SYS(socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK));
		other = FX_SYS(socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK));
		fx_cleanup = end_child;
		child = FX_SYS(fork());
		if (!child)
			for (;;)
				pause();
		close(other);
	} else if (is("sibling")) {
		/* The child has a sibling in its memory, which is not that of their parent. */
		sibling = fx_map(FX_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS);
		fx_cleanup = end_siblings;
		child = FX_SYS(fork());
		if (!child) {
			*sibling = clone(sleep_for_ever, stack + sizeof(stack), CLONE_VM | CLONE_PARENT | SIGCHLD, NULL);
			sleep_for_ever(NULL);
		}
		while (!*(volatile int *)sibling)
			fx_nap(FX_MS);
	} else if (is("vfork")) {
		tid_of_forker = 0;
		fx_thread(forker, NULL);
		while (!in_vfork(tid_of_forker))
			fx_nap(FX_MS);
	} else if (is("own-files")) {
		pthread_t thread;

		FX_CHECK(!pthread_create(&thread, NULL, unshared, NULL), "pthread_create");
		sem_wait(&alone);
	} else if (is("own-uts")) {
		if (unshare(CLONE_NEWUTS))
			fx_skip("permission for a uts namespace (%s)", strerror(errno));
	} else if (is("notifying")) {
		struct sock_filter code[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* seccomp_data.nr */
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog prog = { .len = FX_COUNT(code), .filter = code };

		FX_SYS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog));
	} else if (is("landlocked")) {
		/* struct landlock_ruleset_attr: LANDLOCK_ACCESS_FS_MAKE_SOCK */
		unsigned long long handled = 1 << 9;
		int rules = syscall(444 /* landlock_create_ruleset */, &handled, sizeof(handled), 0);

		if (rules < 0)
			fx_skip("Landlock (%s)", strerror(errno));
		FX_SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		FX_SYS(syscall(446 /* landlock_restrict_self */, rules, 0));
		close(rules);
	} else if (is("code32")) {
		fx_thread(code32, NULL);
		fx_await(&begun, 1);
	} else if (is("mq-told") || is("mq-told-loud")) {
		/* Told of one message, which another process sends. The loud one leaves no signal alone that attach could use. */
		struct sigevent event = { .sigev_notify = SIGEV_THREAD, .sigev_notify_function = noticed };

		for (int i = 0; is("mq-told-loud") && i < 3; i++)
			signal((int[]){ SIGURG, SIGWINCH, SIGCHLD }[i], nothing);
		fd = mq_open("/odd", O_RDWR | O_CREAT, 0600, NULL);
		if (fd < 0)
			fx_skip("POSIX message queues (%s)", strerror(errno));
		fx_cleanup = remove_queue;
		FX_SYS(mq_notify(fd, &event));
	} else if (is("mq-nameless") || is("mq-notify")) {
		struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1 };

		fd = mq_open("/odd", O_RDWR | O_CREAT, 0600, NULL);
		if (fd < 0)
			fx_skip("POSIX message queues (%s)", strerror(errno));
		mq_unlink("/odd");
		if (!is("mq-nameless"))
			FX_SYS(mq_notify(fd, &event));
		else
			FX_SYS(mq_send(fd, "text", 4, 0));
	} else if (is("sem-fresh")) {
		fx_cleanup = remove_set;
		set = FX_SYS(semget(0x46000001, 2, IPC_CREAT | IPC_EXCL | 0600));
	} else if (is("aio-fork")) {
		aio_setup(4);
		child = FX_SYS(fork());
		if (!child)
			for (;;)
				pause();
		fx_cleanup = end_child;
	} else if (is("memory-limit")) {
		struct rlimit none = { .rlim_cur = FX_PAGE, .rlim_max = RLIM_INFINITY };

		FX_SYS(setrlimit(RLIMIT_AS, &none));
	} else if (is("data-limit")) {
		struct rlimit none = { .rlim_cur = FX_PAGE, .rlim_max = RLIM_INFINITY };

		FX_SYS(setrlimit(RLIMIT_DATA, &none));
	} else if (is("aio-file-size")) {
		struct rlimit small = { .rlim_cur = 1000, .rlim_max = RLIM_INFINITY };

		aio_setup(4);
		FX_SYS(setrlimit(RLIMIT_FSIZE, &small));
	} else if (is("map")) {
		fd = FX_SYS(open(file, O_RDONLY));
		map = mmap(NULL, FX_PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
		FX_CHECK(map != MAP_FAILED, "mmap: %s", strerror(errno));
		memcpy(old, map, sizeof(old));
		close(fd);
	} else if (is("file")) {
		fd = FX_SYS(open(file, O_RDWR));
		FX_SYS(lseek(fd, 5, SEEK_SET));
	} else {
		other_files(file);
	}
	fx_ready();
	fx_wait_go();
	if (is("map"))
		FX_CHECK(!memcmp(old, map, sizeof(old)), "the mapping changed");
	if (is("file")) {
		FX_EQ("position", FX_SYS(lseek(fd, 0, SEEK_CUR)), 5);
		FX_EQ("write", FX_SYS(write(fd, "written", 7)), 7);
	}
	if (is("mq-told") || is("mq-told-loud")) {
		fx_await(&notices, 1);
		fx_nap(20 * FX_MS);
		FX_EQ("notices", notices, 1);
	}
	if (is("unix-datagram"))
		FX_EQ("send", send(fd, "after", 5, 0), 5);
	if (is("unix-empty")) {
		static const ssize_t sizes[] = { 1, 0, 2, -1 };
		char buf[8];

		for (size_t i = 0; i < FX_COUNT(sizes); i++)
			FX_EQ("recv", recv(fd, buf, sizeof(buf), MSG_DONTWAIT), sizes[i]);
	}
	if (is("unix-urgent") || is("unix-urgent-first")) {
		char byte;

		FX_EQ("recv", recv(ends[1], &byte, 1, MSG_OOB | MSG_DONTWAIT), 1);
		FX_EQ("the urgent byte", byte, 'w');
	}
	if (is("unix-error")) {
		char buf[8];

		FX_CHECK(recv(ends[1], buf, sizeof(buf), MSG_DONTWAIT) == -1 && errno == ECONNRESET, "the error is lost");
		FX_EQ("recv", recv(ends[1], buf, sizeof(buf), MSG_DONTWAIT), 5);
	}
	if (is("fd3"))
		FX_EQ("write", FX_SYS(write(3, "hello\n", 6)), 6);
	if (is("echo")) {
		char line[64];
		ssize_t n = FX_SYS(read(0, line, sizeof(line)));

		FX_EQ("write", FX_SYS(write(1, line, n)), n);
		fx_verdict(23, "PASS\n");
	}
	fx_pass();
}
