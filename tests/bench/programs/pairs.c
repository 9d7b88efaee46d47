// Allocates and frees: so many pairs of malloc and free per second, or as many as it can.
//
//   pairs RATE      pairs per second; 0 is without pause
//
// The protocol of all the benchmark's programs: prints "ready"; for every line "SECONDS" works that long and prints
// "did UNITS NANOSECONDS"; ends when its input does.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SECOND 1000000000LL
// A paced run works in steps of this length, or as long as so many pairs take: with fewer pairs each the cost of waking up, which
// varies by a fifth, would be larger than what is to be measured.
#define STEP (SECOND / 1000)
#define STEP_PAIRS 100
// Without pause, the clock is read once per so many pairs.
#define BATCH 1000

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void sleep_until(long long when)
{
	struct timespec t = { .tv_sec = when / SECOND, .tv_nsec = when % SECOND };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

// Three calls deep, as an allocation in a program would be, and never optimised away.
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

static unsigned long long work(unsigned long long rate, long long start, long long end)
{
	unsigned long long done = 0;
	long long step = start, length = STEP;

	if (rate == 0) {
		while (now() < end) {
			for (int i = 0; i < BATCH; i++)
				pair(done++);
		}
		return done;
	}
	if (rate < STEP_PAIRS * SECOND / STEP)
		length = STEP_PAIRS * SECOND / (long long)rate;
	// What a late step left undone the next ones catch up on; what cannot be done in time is missing from the rate.
	while (step < end && now() < end) {
		step += length;
		sleep_until(step);
		// From the whole time so far: nothing is lost to rounding.
		while (done < rate * (unsigned long long)(step - start) / SECOND)
			pair(done++);
	}
	return done;
}

int main(int argc, char **argv)
{
	unsigned long long rate = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
	char line[64];

	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		long long start = now();
		unsigned long long done = work(rate, start, start + atoll(line) * SECOND);

		printf("did %llu %lld\n", done, now() - start);
		fflush(stdout);
	}
	return 0;
}
