/* Counts the ways to place N queens, showing its progress; the result depends on every step. */
#include <stdio.h>
#include <stdlib.h>

static unsigned long solutions, steps, mix;
static int n;

static void place(int row, unsigned columns, unsigned left, unsigned right)
{
	if (row == n) {
		solutions++;
		return;
	}
	for (unsigned free = ~(columns | left | right) & ((1u << n) - 1); free; free &= free - 1) {
		unsigned queen = free & -free;
		steps++;
		mix = (mix ^ steps) * 0x9e3779b97f4a7c15;
		place(row + 1, columns | queen, (left | queen) << 1, (right | queen) >> 1);
	}
}

int main(int argc, char **argv)
{
	n = argc > 1 ? atoi(argv[1]) : 15;
	for (int column = 0; column < n; column++) {
		place(1, 1u << column, 2u << column, (1u << column) >> 1);
		printf("column %2d of %d: %lu solutions so far\n", column + 1, n, solutions);
		fflush(stdout);
	}
	printf("result: %lu solutions, %lu steps, check %016lx\n", solutions, steps, mix);
	return 0;
}
