/* Opens files and forgets to close some of them. */
#include "program.h"

#include <stdio.h>

SITE static void open_and_forget(void)
{
	for (int i = 0; i < 7; i++)
		keep(fopen("/dev/null", "r"));
}

SITE static void open_and_close(void)
{
	for (int i = 0; i < 5; i++)
		fclose(keep(fopen("/dev/null", "r")));
}

SITE static void fail_to_open(void)
{
	if (keep(fopen("/nonexistent/file", "r")))
		abort();
}

static void work(void)
{
	open_and_forget();
	open_and_close();
	fail_to_open();
}

MAIN(work)
