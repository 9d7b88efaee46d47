/* Two allocators in one process: the C library's malloc, and an allocator that is called by names of its own. */
#include "program.h"

#include <dlfcn.h>
#include <stdio.h>

static void *(*mi_malloc)(size_t size);
static void (*mi_free)(void *p);

SITE static void leak_malloc(void)
{
	for (int i = 0; i < 101; i++)
		keep(malloc(17));
}

SITE static void churn_malloc(void)
{
	for (int i = 0; i < 59; i++)
		free(keep(malloc(19)));
}

SITE static void leak_other(void)
{
	for (int i = 0; i < 97; i++)
		keep(mi_malloc(23));
}

SITE static void churn_other(void)
{
	for (int i = 0; i < 53; i++)
		mi_free(keep(mi_malloc(29)));
}

int main(int argc, char **argv)
{
	void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;

	if (!library) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	mi_malloc = dlsym(library, "mi_malloc");
	mi_free = dlsym(library, "mi_free");
	if (!mi_malloc || !mi_free)
		return 1;
	say("ready");
	wait_for_line();
	leak_malloc();
	churn_malloc();
	leak_other();
	churn_other();
	say("done");
	wait_for_end();
	return 0;
}
