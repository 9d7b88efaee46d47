/* Keeps blocks in the handler of a signal that interrupts the program's own code; no library lies between the two. */
#include "program.h"

#include <signal.h>
#include <sys/time.h>

static volatile sig_atomic_t left = 11;

SITE void on_alarm(int signal)
{
	(void)signal;
	if (left > 0) {
		keep(malloc(37));
		left--;
	}
}

/* The loop does not begin at the first instruction: an address there would be taken for the end of what lies before. */
SITE static void spin(void)
{
	volatile unsigned turns = 0;

	while (left > 0)
		turns++;
}

int main(void)
{
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	struct itimerval often = { .it_interval = { .tv_usec = 2000 }, .it_value = { .tv_usec = 2000 } };

	say("ready");
	wait_for_line();
	if (sigaction(SIGALRM, &action, NULL) || setitimer(ITIMER_REAL, &often, NULL))
		abort();
	spin();
	often.it_interval.tv_usec = often.it_value.tv_usec = 0;
	setitimer(ITIMER_REAL, &often, NULL);
	say("done");
	wait_for_end();
	return 0;
}
