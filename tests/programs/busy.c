/*
 * Does nothing but allocate and free, as fast as it can; loses one block in a thousand. After the harness's second line it
 * calms down to a thousand pairs a second. Ends with its input.
 */
#include "program.h"
#include <fcntl.h>
#include <time.h>

#define CHURN_BLOCKS 256

SITE static void *churn(size_t size)
{
	return keep(malloc(size));
}

SITE static void lose_one(void)
{
	char *lost = keep(malloc(997));

	/* Touched, so that the process really grows. */
	if (lost)
		memset(lost, 1, 997);
}

int main(void)
{
	static void *ring[CHURN_BLOCKS];
	const struct timespec pause = { .tv_nsec = 1000000 };
	int calm = 0;
	unsigned n;

	say("ready");
	wait_for_line();
	say("done");
	fcntl(0, F_SETFL, O_NONBLOCK);
	for (n = 1;; n++) {
		free(ring[n % CHURN_BLOCKS]);
		ring[n % CHURN_BLOCKS] = churn(16 + n % 128);
		if (n % 1000 == 0)
			lose_one();
		if (calm)
			nanosleep(&pause, NULL);
		if (calm ? n % 16 == 0 : n % 65536 == 0) {
			char line[8];
			ssize_t got = read(0, line, sizeof(line));

			if (got == 0)
				return 0;
			if (got > 0)
				calm = 1;
		}
	}
}
