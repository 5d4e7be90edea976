/*
 * A program with a library of its own and three files that it only reads: `data`, `twin` of the same contents, which is
 * mapped as well, and `mapped`. It follows the protocol of the fixtures. PACKED_DATA is the directory of the files. With LIBRARY it is the library.
 */
#ifdef LIBRARY

/* So large that most of it has not been touched at the checkpoint. */
static const unsigned char table[1 << 18] = { [0] = 1, [(1 << 18) - 1] = 41 };

int packed_sum(void)
{
	int sum = 0;

	for (unsigned i = 0; i < sizeof(table); i++)
		sum += table[i];
	return sum;
}

#else

#include "../../fixtures/fixture.h"

int packed_sum(void);

static int open_data(const char *name)
{
	char path[PATH_MAX];
	const char *dir = getenv("PACKED_DATA");

	FX_CHECK(dir, "PACKED_DATA is not set");
	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return FX_SYS(open(path, O_RDONLY));
}

int main(int argc, char **argv)
{
	char half[5] = { 0 };

	fx_init(argc, argv);
	int data = open_data("data");
	int twin = open_data("twin"), mapped = open_data("mapped");
	char *view = mmap(NULL, 2 * FX_PAGE, PROT_READ, MAP_SHARED, mapped, 0);
	char *both = mmap(NULL, FX_PAGE, PROT_READ, MAP_SHARED, twin, 0);
	FX_CHECK(view != MAP_FAILED && both != MAP_FAILED, "mmap: %s", strerror(errno));
	FX_SYS(close(mapped));
	FX_CHECK(read(data, half, 4) == 4 && !strcmp(half, "half"), "the data begins with %s", half);
	FX_EQ("seek", FX_SYS(lseek(twin, 4, SEEK_SET)), 4);
	fx_ready();
	fx_wait_go();
	FX_CHECK(read(data, half, 4) == 4 && !strcmp(half, "rest"), "the data goes on with %s", half);
	FX_CHECK(read(twin, half, 4) == 4 && !strcmp(half, "rest"), "its twin goes on with %s", half);
	FX_CHECK(!strcmp(view + FX_PAGE, "second page"), "the mapped file is another");
	FX_CHECK(!strcmp(both, "halfrest"), "its twin is mapped as %s", both);
	FX_CHECK(packed_sum() == 42, "the library is another");
	fx_pass();
}

#endif
