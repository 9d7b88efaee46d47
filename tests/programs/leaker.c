/* Every line from the harness loses seven blocks of 67 bytes; for tests about which process is watched. */
#include "program.h"

SITE static void lose_some(void)
{
	for (int i = 0; i < 7; i++)
		keep(malloc(67));
}

int main(void)
{
	say("ready");
	for (;;) {
		wait_for_line();
		lose_some();
		say("done");
	}
}
