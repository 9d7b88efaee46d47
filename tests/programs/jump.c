/* Makes a thousand pairs of malloc and free a second; after the harness's line as many as it can. Ends with its input. */
#include "program.h"
#include <fcntl.h>
#include <time.h>

SITE static void pair(size_t size)
{
	free(keep(malloc(size)));
}

int main(void)
{
	const struct timespec pause = { .tv_nsec = 1000000 };
	int fast = 0;
	unsigned n;

	say("ready");
	fcntl(0, F_SETFL, O_NONBLOCK);
	for (n = 1;; n++) {
		pair(16 + n % 128);
		if (!fast)
			nanosleep(&pause, NULL);
		if (fast ? n % 65536 == 0 : n % 16 == 0) {
			char line[8];
			ssize_t got = read(0, line, sizeof(line));

			if (got == 0)
				return 0;
			if (got > 0)
				fast = 1;
		}
	}
}
