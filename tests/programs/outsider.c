/*
 * A process outside the job that uses the same objects: outsider WHAT ID [FILE].
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[1] : "";
	int id = argc > 2 ? atoi(argv[2]) : -1;

	if (!strcmp(what, "hold") || !strcmp(what, "scribble")) {
		char *p = shmat(id, NULL, 0);

		if (p == (void *)-1)
			err(1, "shmat");
		if (!strcmp(what, "scribble")) {
			memset(p, 0xee, 4096);
			return 0;
		}
		close(open(argv[3], O_CREAT | O_WRONLY, 0666));
		pause();
	} else if (!strcmp(what, "up")) {
		struct sembuf up = { .sem_num = 3, .sem_op = 1 };

		if (semop(id, &up, 1))
			err(1, "semop");
		return 0;
	} else if (!strcmp(what, "send")) {
		struct { long type; char text[4]; } m = { 77, "abc" };

		if (msgsnd(id, &m, 4, IPC_NOWAIT))
			err(1, "msgsnd");
		return 0;
	} else if (!strcmp(what, "take-id")) {
		int fd = open("/proc/sys/kernel/sem_next_id", O_WRONLY);

		if (fd < 0 || write(fd, argv[2], strlen(argv[2])) < 0 || semget(IPC_PRIVATE, 1, 0600) != id)
			err(1, "a set with the id %d", id);
		return 0;
	}
	errx(2, "what shall I do?");
}
