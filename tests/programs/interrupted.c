/* Keeps blocks in handlers of signals that interrupt the program's own code; no library lies between the two. */
#include "program.h"

#include <signal.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>

static volatile sig_atomic_t left = 11;

SITE void on_alarm(int signal)
{
	(void)signal;
	if (left > 0) {
		keep(malloc(37));
		left--;
	}
}

SITE static void spin(void)
{
	volatile unsigned turns = 0;

	while (left > 0)
		turns++;
}

static volatile sig_atomic_t ticks = 31;

SITE void on_tick(int signal)
{
	(void)signal;
	if (ticks > 0) {
		keep(malloc(43));
		ticks--;
	}
}

/* Nearly always in the kernel's own code in the process. */
SITE static void ask_the_time(void)
{
	struct timespec now;

	while (ticks > 0)
		clock_gettime(CLOCK_MONOTONIC, &now);
}

/* Its first instruction is refused; another function ends right before it. */
void refused(void);
__asm__(".text\n"
	".type just_before,@function\n"
	"just_before:\n"
	".cfi_startproc\n"
	"nop\n"
	"ret\n"
	".cfi_endproc\n"
	".size just_before,.-just_before\n"
	".globl refused\n"
	".type refused,@function\n"
	"refused:\n"
	".cfi_startproc\n"
	"ud2\n"
	"ret\n"
	".cfi_endproc\n"
	".size refused,.-refused\n");

SITE void on_refusal(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)info;
	keep(malloc(41));
	/* Behind the instruction. */
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

SITE static void be_refused(void)
{
	struct sigaction action = { .sa_sigaction = on_refusal, .sa_flags = SA_SIGINFO };

	if (sigaction(SIGILL, &action, NULL))
		abort();
	for (int i = 0; i < 13; i++)
		refused();
}

/* Runs `work` while its end is counted down by a handler of an alarm. */
static void interrupt(void (*handler)(int), void (*work)(void))
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART };
	struct itimerval often = { .it_interval = { .tv_usec = 2000 }, .it_value = { .tv_usec = 2000 } };

	if (sigaction(SIGALRM, &action, NULL) || setitimer(ITIMER_REAL, &often, NULL))
		abort();
	work();
	often.it_interval.tv_usec = often.it_value.tv_usec = 0;
	setitimer(ITIMER_REAL, &often, NULL);
}

int main(void)
{
	say("ready");
	wait_for_line();
	interrupt(on_alarm, spin);
	interrupt(on_tick, ask_the_time);
	be_refused();
	say("done");
	wait_for_end();
	return 0;
}
