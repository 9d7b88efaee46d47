/* A program that takes malloc over with an allocator that nobody knows: blocks out of a table, never reused. */
#include "program.h"

enum { LEAKED = 101, FREED = 59 };

static char memory[1 << 20];
static size_t used;
static unsigned long freed;

SITE void *malloc(size_t size)
{
	size_t at = (__atomic_fetch_add(&used, (size + 31) & ~(size_t)15, __ATOMIC_RELAXED) + 15) & ~(size_t)15;

	return at + size <= sizeof(memory) ? memory + at : NULL;
}

SITE void *calloc(size_t n, size_t size)
{
	return malloc(n * size);
}

SITE void *realloc(void *old, size_t size)
{
	void *p = malloc(size);

	if (p && old)
		memcpy(p, old, size);
	return p;
}

SITE void free(void *p)
{
	freed += p != NULL;
}

SITE static void leak_malloc(void)
{
	for (int i = 0; i < LEAKED; i++)
		keep(malloc(17));
}

SITE static void churn_malloc(void)
{
	for (int i = 0; i < FREED; i++)
		free(keep(malloc(17)));
}

SITE static void leak_calloc(void)
{
	for (int i = 0; i < LEAKED; i++)
		keep(calloc(3, 11));
}

SITE static void leak_strdup(void)
{
	for (int i = 0; i < LEAKED; i++)
		keep(strdup("out of the C library"));
}

static void work(void)
{
	leak_malloc();
	churn_malloc();
	leak_calloc();
	leak_strdup();
}

MAIN(work)
