/* Has the kernel allocate: event counters that are kept, others that are closed again. */
#include "program.h"
#include <sys/eventfd.h>

enum { KEPT = 211, CLOSED = 307 };

int main(void)
{
	char byte;
	int i;

	say("ready");
	if (read(STDIN_FILENO, &byte, 1) != 1)
		return 1;
	for (i = 0; i < KEPT; i++)
		if (eventfd(0, 0) < 0)
			return 2;
	for (i = 0; i < CLOSED; i++)
		if (close(eventfd(0, 0)))
			return 3;
	say("done");
	while (read(STDIN_FILENO, &byte, 1) == 1)
		;
	return 0;
}
