// Allocates and frees, slowly or as fast as it can at about three million pairs per second, and says how it gets on.
//
// Prints "ready", and from then on, every 20 ms, "slice NANOSECONDS PAIRS CPU_NANOSECONDS MODE": the clock, what was done and the
// CPU time that was used since its start, and whether that was "slow" (1,000 pairs per second) or "fast". A line of input
// changes between the two; ends when its input does.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define SLICE (SECOND / 50)
#define SLOW_STEP (SECOND / 1000)
#define FAST_RATE 3000000
// The clock is read once per so many pairs: often enough for a slice when each takes a hundred times as long.
#define BATCH 200

static long long clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static __attribute__((noinline)) void *take(size_t size)
{
	void *block = malloc(size);

	__asm__ volatile("" : "+r"(block) : : "memory");
	return block;
}

static __attribute__((noinline)) void pair(unsigned long long n)
{
	void *block = take(16 + n % 32 * 16);

	free(block);
	__asm__ volatile("");
}

static void spin(unsigned int turns)
{
	for (unsigned int i = 0; i < turns; i++)
		__asm__ volatile("");
}

// Pairs per second of CPU time with so many turns of idle work for each.
static double rate_with(unsigned int turns)
{
	const int pairs = 300000;
	long long start = clock_ns(CLOCK_PROCESS_CPUTIME_ID);

	for (int n = 0; n < pairs; n++) {
		pair(n);
		spin(turns);
	}
	return pairs * 1e9 / (clock_ns(CLOCK_PROCESS_CPUTIME_ID) - start);
}

int main(void)
{
	unsigned long long done = 0;
	unsigned int turns = 0;
	long long next, step;
	int fast = 0;

	// A program that does something with its blocks, not a loop around malloc.
	while (turns < 100000 && rate_with(turns) > FAST_RATE)
		turns = turns * 5 / 4 + 8;
	fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
	printf("ready\n");
	fflush(stdout);
	next = step = clock_ns(CLOCK_MONOTONIC);
	for (;;) {
		char line[256];
		long long now;
		ssize_t got;

		if (fast) {
			for (int i = 0; i < BATCH; i++) {
				pair(done++);
				spin(turns);
			}
		} else {
			struct timespec t = { .tv_sec = step / SECOND, .tv_nsec = step % SECOND };

			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
			step += SLOW_STEP;
			pair(done++);
		}
		now = clock_ns(CLOCK_MONOTONIC);
		if (now < next)
			continue;
		next = now + SLICE;
		// Not printf: this must not allocate.
		got = snprintf(line, sizeof(line), "slice %lld %llu %lld %s\n", now, done,
			       clock_ns(CLOCK_PROCESS_CPUTIME_ID), fast ? "fast" : "slow");
		if (write(STDOUT_FILENO, line, got) != got)
			return 1;
		got = read(STDIN_FILENO, line, sizeof(line));
		if (got == 0)
			return 0;
		if (got > 0) {
			fast = !fast;
			step = now;
		}
	}
}
