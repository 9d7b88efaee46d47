/*
 * Loads a library after it was started: dlopen LIBRARY FUNCTION [SIZE]. Lines from the harness: 1. load, 2. call.
 * With a size the function is an allocator, called as `block = function(size)`.
 */
#include "program.h"

#include <dlfcn.h>

typedef void *(*allocate)(size_t);

SITE static void call_loaded_allocator(allocate function, size_t size)
{
	for (int i = 0; i < 19; i++)
		keep(function(size));
}

int main(int argc, char **argv)
{
	void *library, *symbol;

	if (argc < 3)
		return 2;
	say("ready");
	wait_for_line();
	library = dlopen(argv[1], RTLD_NOW);
	symbol = library ? dlsym(library, argv[2]) : NULL;
	if (!symbol)
		abort();
	say("loaded");
	wait_for_line();
	if (argc > 3)
		call_loaded_allocator((allocate)symbol, (size_t)atoi(argv[3]));
	else
		((void (*)(void))symbol)();
	say("done");
	wait_for_end();
	return 0;
}
