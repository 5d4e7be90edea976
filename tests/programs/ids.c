// Says who it is at its beginning, in DIR/before, and when it is told to end (SIGTERM), in DIR/after:
// real, effective and saved ids, whether it is dumpable, AT_SECURE. Exits with 7.
//   ids DIR [drop|undumpable]
// drop: gives up what its file gave it, for good, and is dumpable again.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <unistd.h>

static volatile sig_atomic_t asked;
static void ask(int signal) { (void)signal; asked = 1; }

static void tell(const char *dir, const char *name) {
    char path[4096];
    uid_t r, e, s;
    gid_t gr, ge, gs;
    char whole[sizeof path];

    /* It has its name when it is closed. */
    snprintf(whole, sizeof whole, "%s/%s", dir, name);
    snprintf(path, sizeof path, "%s/%s.new", dir, name);
    FILE *out = fopen(path, "w");
    if (!out) return;
    getresuid(&r, &e, &s);
    getresgid(&gr, &ge, &gs);
    fprintf(out, "uid %d %d %d gid %d %d %d dumpable %d secure %lu\n", r, e, s, gr, ge, gs, prctl(PR_GET_DUMPABLE),
            getauxval(AT_SECURE));
    fclose(out);
    rename(path, whole);
}

int main(int argc, char **argv) {
    const char *how = argc > 2 ? argv[2] : "";
    if (!strcmp(how, "drop") && (setresgid(getgid(), getgid(), getgid()) || setresuid(getuid(), getuid(), getuid()) ||
                                 prctl(PR_SET_DUMPABLE, 1)))
        return 1;
    if (!strcmp(how, "undumpable") && prctl(PR_SET_DUMPABLE, 0)) return 1;
    signal(SIGTERM, ask);
    tell(argv[1], "before");
    while (!asked) usleep(10000);
    tell(argv[1], "after");
    return 7;
}
