/* Leaks and ends at once: only a last look at exit can see it. */
#include "program.h"

SITE static void lost_at_exit(void)
{
	for (int i = 0; i < 23; i++)
		keep(malloc(53));
}

int main(void)
{
	say("ready");
	wait_for_line();
	lost_at_exit();
	return 0;
}
