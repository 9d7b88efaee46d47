// Allocates and frees from a deep stack, as often as it can.
//
//   depth FRAMES      so many calls deep
//
// The protocol of all the benchmark's programs, see pairs.c; the nanoseconds are CPU time of its own.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SECOND 1000000000LL
#define BATCH 1000

static long long cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static unsigned long long work(long long end)
{
	unsigned long long done = 0;

	while (cpu_time() < end) {
		for (int i = 0; i < BATCH; i++, done++) {
			void *block = malloc(64);

			__asm__ volatile("" : "+r"(block) : : "memory");
			free(block);
		}
	}
	return done;
}

static __attribute__((noinline)) unsigned long long dive(int depth, long long end)
{
	volatile unsigned long long done = depth ? dive(depth - 1, end) : work(end);

	return done;
}

int main(int argc, char **argv)
{
	int depth = argc > 1 ? atoi(argv[1]) : 0;
	double seconds;

	printf("ready\n");
	fflush(stdout);
	while (scanf("%lf", &seconds) == 1) {
		long long start = cpu_time();
		unsigned long long done = dive(depth, start + (long long)(seconds * SECOND));

		printf("did %llu %lld\n", done, cpu_time() - start);
		fflush(stdout);
	}
	return 0;
}
