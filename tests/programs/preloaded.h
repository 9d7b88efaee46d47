/*
 * For programs that call functions which only a preloaded allocator has: found by name at run time, so that the
 * programs compile without it.
 */
#ifndef PRELOADED_H
#define PRELOADED_H

#include "program.h"

#include <dlfcn.h>
#include <stdio.h>

enum { FREED = 59 };

/* The function of that name; ends the program when nothing has it. */
static inline void *find(const char *name)
{
	void *function = dlsym(RTLD_DEFAULT, name);

	if (!function) {
		fprintf(stderr, "no %s: is the library preloaded?\n", name);
		exit(1);
	}
	return function;
}

/* Defines leak_NAME, which loses `count` blocks, and churn_NAME, which gives FREED of them back through `release`. */
#define KIND(name, count, expression, release)    \
	SITE static void leak_##name(void)        \
	{                                         \
		for (int i = 0; i < (count); i++) \
			keep(expression);         \
	}                                         \
	SITE static void churn_##name(void)       \
	{                                         \
		for (int i = 0; i < FREED; i++) { \
			void *p = (expression);   \
			keep(p);                  \
			release;                  \
		}                                 \
	}

/* Calls both. */
#define RUN(name)      \
	leak_##name(); \
	churn_##name()

#endif
