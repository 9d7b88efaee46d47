/* A process name and a symbol made to break whatever prints them. */
#include "program.h"

#include <sys/prctl.h>

void hostile_symbol(void) __asm__("\"<script>alert('s')</script>\"");

SITE void hostile_symbol(void)
{
	for (int i = 0; i < 13; i++)
		keep(malloc(101));
}

int main(void)
{
	/* Fifteen bytes: markup, quotes, a line break and the start of an escape sequence. */
	prctl(PR_SET_NAME, "<b>'\"\n\x1b[31m&x");
	say("ready");
	wait_for_line();
	hostile_symbol();
	say("done");
	wait_for_end();
	return 0;
}
