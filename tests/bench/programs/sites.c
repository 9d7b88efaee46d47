// Holds 1,000,000 blocks that were allocated at 10,000 places: what memleak's own cost is measured with.
//
// Prints "ready"; at the first line of input it allocates and prints "did BLOCKS NANOSECONDS"; from then on it replaces one block
// per millisecond, every place in its turn, and ends when its input does.
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SITES 10000
#define BLOCKS_PER_SITE 100
#define BLOCKS (SITES * BLOCKS_PER_SITE)

// One function per number of four digits: a call stack of its own, and a name of its own to look up.
#define SITE(n)                                                      \
	static __attribute__((noinline)) void *site_##n(size_t size) \
	{                                                            \
		void *block = malloc(size);                          \
		__asm__ volatile("" : "+r"(block) : : "memory");     \
		return block;                                        \
	}
#define NAME(n) site_##n,
#define TENS(M, p) M(p##0) M(p##1) M(p##2) M(p##3) M(p##4) M(p##5) M(p##6) M(p##7) M(p##8) M(p##9)
#define HUNDREDS(M, p) \
	TENS(M, p##0)  \
	TENS(M, p##1)  \
	TENS(M, p##2) TENS(M, p##3) TENS(M, p##4) TENS(M, p##5) TENS(M, p##6) TENS(M, p##7) TENS(M, p##8) TENS(M, p##9)
#define THOUSANDS(M, p)   \
	HUNDREDS(M, p##0) \
	HUNDREDS(M, p##1) \
	HUNDREDS(M, p##2) \
	HUNDREDS(M, p##3) \
	HUNDREDS(M, p##4) HUNDREDS(M, p##5) HUNDREDS(M, p##6) HUNDREDS(M, p##7) HUNDREDS(M, p##8) HUNDREDS(M, p##9)
#define ALL(M)          \
	THOUSANDS(M, 0) \
	THOUSANDS(M, 1) \
	THOUSANDS(M, 2) \
	THOUSANDS(M, 3) THOUSANDS(M, 4) THOUSANDS(M, 5) THOUSANDS(M, 6) THOUSANDS(M, 7) THOUSANDS(M, 8) THOUSANDS(M, 9)

ALL(SITE)

static void *(*const sites[SITES])(size_t) = { ALL(NAME) };
static void *blocks[BLOCKS];

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Called from one place only: another would make every call stack twice.
static void *allocate(unsigned int n)
{
	return sites[n % SITES](16 + n % 7 * 16);
}

int main(void)
{
	struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
	char line[64];
	long long start;

	printf("ready\n");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 0;
	start = now();
	for (unsigned long long n = 0;; n++) {
		if (n == BLOCKS) {
			printf("did %u %lld\n", BLOCKS, now() - start);
			fflush(stdout);
		}
		if (n >= BLOCKS) {
			if (poll(&input, 1, 1) != 0)
				return 0;
			free(blocks[n % BLOCKS]);
		}
		blocks[n % BLOCKS] = allocate(n % BLOCKS);
	}
}
