/* Tells on standard output which features glibc uses, and which the compiler's runtime finds; then waits for its end. */
#include <stdio.h>
#include <sys/platform/x86.h>
#include <unistd.h>

int main(void)
{
	printf("glibc popcnt %d avx2 %d\n", !!CPU_FEATURE_ACTIVE(POPCNT), !!CPU_FEATURE_ACTIVE(AVX2));
	printf("compiler avx2 %d\n", !!__builtin_cpu_supports("avx2"));
	fflush(stdout);
	pause();
}
