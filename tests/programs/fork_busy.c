/*
 * Forks a child for each line of the harness; the child calls nothing but malloc and free, and prints every fifth of a
 * second how many nanoseconds of its CPU time a pair took. The child ends with its parent, or when the next is forked.
 */
#include "program.h"
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

static long long clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

SITE static void work(void)
{
	for (;;) {
		long long cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID), start = clock_ns(CLOCK_MONOTONIC);
		long long pairs = 0;

		while (clock_ns(CLOCK_MONOTONIC) - start < 200000000) {
			for (int i = 0; i < 100; i++)
				free(keep(malloc(16 + i)));
			pairs += 100;
		}
		say_number("pair", (unsigned long)((clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / pairs));
	}
}

int main(void)
{
	pid_t child = 0;

	say("ready");
	for (;;) {
		wait_for_line();
		if (child) {
			kill(child, SIGKILL);
			waitpid(child, NULL, 0);
		}
		child = fork();
		if (child < 0)
			abort();
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			say_number("child", (unsigned long)getpid());
			work();
		}
	}
}
