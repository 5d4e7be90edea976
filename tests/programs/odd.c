/*
 * A program in an unusual situation, which ODD names; it follows the protocol of the fixtures.
 * ODD_FILE is the file of the situations that have one.
 */
#include "../../fixtures/fixture.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static pid_t child;

static void end_child(void)
{
	kill(child, SIGKILL);
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

static sem_t alone;

static void *unshared(void *unused)
{
	(void)unused;
	FX_SYS(unshare(CLONE_FILES));
	sem_post(&alone);
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	const char *file = getenv("ODD_FILE");
	char *map = NULL, old[16] = "";
	int fd = -1;

	fx_init(argc, argv);
	if (is("listen")) {
		struct sockaddr_in any = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

		fd = FX_SYS(socket(AF_INET, SOCK_STREAM, 0));
		FX_SYS(bind(fd, (void *)&any, sizeof(any)));
		FX_SYS(listen(fd, 1));
	} else if (is("unix-stream")) {
		fd = unix_socket(SOCK_STREAM, file, connect);
	} else if (is("unix-datagram")) {
		fd = unix_socket(SOCK_DGRAM, file, connect);
	} else if (is("unix-listen") || is("unix-unaccepted")) {
		fd = unix_socket(SOCK_STREAM, file, bind);
		FX_SYS(listen(fd, 3));
		if (is("unix-unaccepted"))
			FX_EQ("write", write(unix_socket(SOCK_STREAM, file, connect), "early", 5), 5);
	} else if (is("uring")) {
		char params[120] = "";

		fd = syscall(SYS_io_uring_setup, 4, params);
		if (fd < 0)
			fx_skip("io_uring (%s)", strerror(errno));
	} else if (is("child")) {
		fx_cleanup = end_child;
		child = FX_SYS(fork());
		if (!child)
			for (;;)
				pause();
	} else if (is("own-files")) {
		pthread_t thread;

		FX_CHECK(!pthread_create(&thread, NULL, unshared, NULL), "pthread_create");
		sem_wait(&alone);
	} else if (is("own-uts")) {
		if (unshare(CLONE_NEWUTS))
			fx_skip("permission for a uts namespace (%s)", strerror(errno));
	} else if (is("map")) {
		fd = FX_SYS(open(file, O_RDONLY));
		map = mmap(NULL, FX_PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
		FX_CHECK(map != MAP_FAILED, "mmap: %s", strerror(errno));
		memcpy(old, map, sizeof(old));
		close(fd);
	} else if (is("file")) {
		fd = FX_SYS(open(file, O_RDWR));
		FX_SYS(lseek(fd, 5, SEEK_SET));
	}
	fx_ready();
	fx_wait_go();
	if (is("map"))
		FX_CHECK(!memcmp(old, map, sizeof(old)), "the mapping changed");
	if (is("file")) {
		FX_EQ("position", FX_SYS(lseek(fd, 0, SEEK_CUR)), 5);
		FX_EQ("write", FX_SYS(write(fd, "written", 7)), 7);
	}
	if (is("unix-datagram"))
		FX_EQ("send", send(fd, "after", 5, 0), 5);
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
