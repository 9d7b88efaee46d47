/*
 * Loads libraries one after the other, each when the one before is gone: reload LIBRARY... Lines from the harness: load,
 * call, load, call, ...
 */
#include "program.h"

#include <dlfcn.h>

int main(int argc, char **argv)
{
	say("ready");
	for (int i = 1; i < argc; i++) {
		void *library, *symbol;

		wait_for_line();
		library = dlopen(argv[i], RTLD_NOW);
		symbol = library ? dlsym(library, "plugin_leak") : NULL;
		if (!symbol)
			abort();
		say_number("loaded", (unsigned long)symbol);
		wait_for_line();
		((void (*)(void))symbol)();
		if (dlclose(library))
			abort();
		say("called");
	}
	wait_for_end();
	return 0;
}
