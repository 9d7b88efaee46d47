/* Allocates, replaces itself by a fresh image of the same file, and allocates again. */
#include "program.h"

SITE static void before_exec(void)
{
	for (int i = 0; i < 5; i++)
		keep(malloc(43));
}

SITE static void after_exec(void)
{
	for (int i = 0; i < 7; i++)
		keep(malloc(47));
}

int main(int argc, char **argv)
{
	if (argc > 1) {
		say("again");
		wait_for_line();
		after_exec();
		say("done");
		wait_for_end();
		return 0;
	}
	say("ready");
	wait_for_line();
	before_exec();
	say("allocated");
	wait_for_line();
	execl("/proc/self/exe", argv[0], "again", (char *)NULL);
	abort();
}
