/* Asks the processor itself what it is, in every situation. With -DSTAND_IN the question is another instruction that
 * raises the same signal on every processor, which the guard answers when CKPT_FAULT_CPUID=hlt; if it arrives here,
 * no guard traces us, and CPUID shows the processor as it is.
 *
 *   asks all         once, everywhere; judges what it sees against $CKPT_CPU_BASELINE
 *   asks loop FILE   for ever, in threads and processes; counts in FILE: questions, and answers above the level
 *   asks leaves      prints the answers of some leaves
 *   asks inherited   with what becomes of a blocked or ignored SIGSEGV
 *   asks bit         exits with 1 if it sees what is above the level
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

struct answer {
	uint64_t rax, rbx, rcx, rdx;
};

static struct answer processor(uint32_t leaf, uint32_t subleaf)
{
	uint32_t a = leaf, b, c = subleaf, d;
	__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
	return (struct answer){ a, b, c, d };
}

static struct answer ask(uint32_t leaf, uint32_t subleaf)
{
	/* What is in the upper halves is to go. */
	uint64_t high = 0xabcdull << 32;
	struct answer is = { high | leaf, high, high | subleaf, high };
#ifdef STAND_IN
	__asm__ volatile("hlt; nop"
#else
	__asm__ volatile("cpuid"
#endif
			 : "+a"(is.rax), "+b"(is.rbx), "+c"(is.rcx), "+d"(is.rdx));
	return is;
}

/* AVX2 is above x86-64-v2, AVX-512 above x86-64-v3. */
static int above_v2(void)
{
	return ask(7, 0).rbx >> 5 & 1 || ask(1, 0).rcx >> 28 & 1 || ask(1, 0).rcx >> 27 & 1;
}

static int above_v3(void)
{
	return ask(7, 0).rbx >> 16 & 1 || ask(0xd, 1).rax != 0;
}

static int above(void)
{
	const char *level = getenv("CKPT_CPU_BASELINE");
	if (!level)
		return 0;
	return above_v3() || (!strcmp(level, "x86-64-v2") && above_v2());
}

static volatile sig_atomic_t unguarded;
static sigjmp_buf back;
static volatile siginfo_t seen;

static void on_segv(int signal, siginfo_t *info, void *context)
{
	ucontext_t *c = context;
	greg_t *r = c->uc_mcontext.gregs;
	(void)signal;
	if (info->si_code == SI_KERNEL && !memcmp((void *)r[REG_RIP], "\xf4\x90", 2)) {
		struct answer is = processor(r[REG_RAX], r[REG_RCX]);
		r[REG_RAX] = is.rax, r[REG_RBX] = is.rbx, r[REG_RCX] = is.rcx, r[REG_RDX] = is.rdx;
		r[REG_RIP] += 2;
		unguarded++;
		return;
	}
	if (info->si_code == SI_KERNEL && !memcmp((void *)r[REG_RIP], "\x0f\xa2", 2)) {
		/* The guard was killed; it is asked again until there is another one. */
		unguarded++;
		sched_yield();
		return;
	}
	memcpy((void *)&seen, info, sizeof seen);
	siglongjmp(back, 1);
}

static void install(void)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO };
	action.sa_sigaction = on_segv;
	sigaction(SIGSEGV, &action, NULL);
}

static int failures;

static void expect(int is, const char *what)
{
	if (!is) {
		printf("FAIL %s\n", what);
		failures++;
	}
}

static void *in_thread(void *arg)
{
	(void)arg;
	long wrong = 0;
	for (int i = 0; i < 50; i++)
		wrong += above();
	return (void *)wrong;
}

static void in_threads(void)
{
	pthread_t threads[12];
	for (int i = 0; i < 12; i++)
		pthread_create(&threads[i], NULL, in_thread, NULL);
	for (int i = 0; i < 12; i++) {
		void *wrong;
		pthread_join(threads[i], &wrong);
		expect(wrong == NULL, "in a thread");
	}
}

static int exits_with(pid_t child)
{
	int status;
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static pid_t executed(const char *how)
{
	pid_t child = vfork();
	if (child == 0) {
		execl("/proc/self/exe", "asks", how, (char *)NULL);
		_exit(99);
	}
	return child;
}

static void in_children(void)
{
	pid_t child = fork();
	if (child == 0) {
		failures = 0;
		in_threads();
		_exit(above() || failures);
	}
	expect(exits_with(child) == 0, "in a child");
	for (int i = 0; i < 5; i++)
		expect(exits_with(executed("bit")) == 0, "in a child that executes a program");
	child = fork();
	if (child == 0) {
		pid_t second = fork();
		if (second == 0)
			_exit(exits_with(executed("bit")));
		_exit(exits_with(second));
	}
	expect(exits_with(child) == 0, "in a grandchild");
}

static volatile sig_atomic_t in_handler;

static void on_usr1(int signal)
{
	(void)signal;
	in_handler = 1 + above();
}

static void in_a_handler(void)
{
	signal(SIGUSR1, on_usr1);
	raise(SIGUSR1);
	expect(in_handler == 1, "in a signal handler");
}

/* Signals of the program's own are its own. */
static void faults(void)
{
	volatile int *nowhere = (int *)0x1230;
	if (!sigsetjmp(back, 1)) {
		(void)*nowhere;
		expect(0, "a read of nothing");
	}
	expect(seen.si_code == SEGV_MAPERR && seen.si_addr == (void *)nowhere, "siginfo of a fault");
	char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!sigsetjmp(back, 1)) {
		*(volatile char *)page = 1;
		expect(0, "a write to what can be read");
	}
	expect(seen.si_code == SEGV_ACCERR && seen.si_addr == page, "siginfo of a forbidden write");
	if (!sigsetjmp(back, 1)) {
		__asm__ volatile("cli");
		expect(0, "a privileged instruction");
	}
	expect(seen.si_code == SI_KERNEL && seen.si_addr == NULL, "siginfo of a privileged instruction");
	if (!sigsetjmp(back, 1)) {
		kill(getpid(), SIGSEGV);
		expect(0, "a signal that was sent");
	}
	expect(seen.si_code == SI_USER && seen.si_pid == getpid(), "siginfo of a signal that was sent");
	if (!sigsetjmp(back, 1)) {
		sigqueue(getpid(), SIGSEGV, (union sigval){ .sival_int = 77 });
		expect(0, "a signal with a value");
	}
	expect(seen.si_code == SI_QUEUE && seen.si_value.sival_int == 77, "siginfo of a value");
	expect(!above(), "after faults of its own");
}

static void answers(void)
{
	struct answer is = ask(0, 0), was = processor(0, 0);
	(void)was;
	expect(!((is.rax | is.rbx | is.rcx | is.rdx) >> 32), "upper halves are zero");
	expect(is.rax >= 1, "the highest leaf");
	expect(ask(1, 0).rdx >> 26 & 1, "SSE2 is there");
	/* The APIC's id is that of the processor that we run on. */
	cpu_set_t all, one;
	sched_getaffinity(0, sizeof all, &all);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		sched_setaffinity(0, sizeof one, &one);
#ifdef STAND_IN
		expect(ask(1, 0).rbx >> 24 == processor(1, 0).rbx >> 24, "the id of this processor");
#else
		FILE *info = fopen("/proc/cpuinfo", "r");
		char line[4096];
		int at = -1, id = -1;
		while (fgets(line, sizeof line, info)) {
			sscanf(line, "processor : %d", &at);
			if (at == cpu && sscanf(line, "initial apicid : %d", &id) == 1)
				break;
		}
		fclose(info);
		expect(id < 0 || (int)(ask(1, 0).rbx >> 24) == id, "the id of this processor");
#endif
	}
	sched_setaffinity(0, sizeof all, &all);
}

static int all(void)
{
	install();
	answers();
	expect(!above(), "at once");
	in_a_handler();
	in_threads();
	in_children();
	faults();
	expect(!unguarded, "every question is answered by the guard");
	puts(failures ? "FAILED" : "PASS");
	return failures != 0;
}

struct counts {
	_Atomic uint64_t asked, above, round, exec_failed;
};
static struct counts *counts;

static void *asks_for_ever(void *arg)
{
	(void)arg;
	for (;;) {
		int wrong = above();
		counts->above += wrong;
		counts->asked++;
		usleep(500);
	}
	return NULL;
}

static int loop(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	if (ftruncate(fd, 4096) != 0)
		return 1;
	counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	install();
	pthread_t threads[4];
	for (int i = 0; i < 4; i++)
		pthread_create(&threads[i], NULL, asks_for_ever, NULL);
	if (fork() == 0)
		asks_for_ever(NULL);
	for (;;) {
		/* One with a thread of its own that is soon gone, and one that executes a program. */
		pthread_t brief;
		pthread_create(&brief, NULL, in_thread, NULL);
		void *wrong;
		pthread_join(brief, &wrong);
		counts->above += (uint64_t)wrong;
		int code = exits_with(executed("bit"));
		counts->above += code == 1;
		if (code > 1)
			counts->exec_failed = code;
		counts->round++;
		usleep(2000);
	}
}

static int leaves(void)
{
	install();
	static const uint32_t asked[][2] = { { 0, 0 }, { 1, 0 }, { 4, 0 }, { 4, 1 }, { 7, 0 }, { 7, 1 }, { 0xd, 0 },
		{ 0xd, 1 }, { 0xd, 2 }, { 0x14, 0 }, { 0x80000001, 0 }, { 0x80000008, 0 } };
	for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
		struct answer is = ask(asked[i][0], asked[i][1]);
		printf("%08x.%x %08lx %08lx %08lx %08lx\n", asked[i][0], asked[i][1], is.rax, is.rbx, is.rcx, is.rdx);
	}
	return 0;
}

/* Of what comes from whoever started us. */
static int inherited(void)
{
	sigset_t mask;
	struct sigaction action;
	expect(!above(), "without a handler");
	sigprocmask(SIG_BLOCK, NULL, &mask);
	sigaction(SIGSEGV, NULL, &action);
	printf("blocked %d ignored %d\n", sigismember(&mask, SIGSEGV), action.sa_handler == SIG_IGN);
	return failures != 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "all";
	if (!strcmp(what, "loop") && argc > 2)
		return loop(argv[2]);
	if (!strcmp(what, "leaves"))
		return leaves();
	if (!strcmp(what, "inherited"))
		return inherited();
	if (!strcmp(what, "bit")) {
		install();
		return above();
	}
	return all();
}
