/*
 * Grows in two ways: through malloc, which is traced, and through mappings of its own, which are not when the probe set
 * mmap is off. Everything is touched, so that all of it is resident.
 */
#include "program.h"

#include <sys/mman.h>

enum { LOST = 20011, LOST_SIZE = 1009, BIG = 3, BIG_SIZE = 2000003, MAPPED_SIZE = 31 << 20 };

SITE static void *lose(size_t size)
{
	void *p = keep(malloc(size));

	if (!p)
		abort();
	return memset(p, 1, size);
}

SITE static void map_directly(void)
{
	void *p = mmap(NULL, MAPPED_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	memset(keep(p), 1, MAPPED_SIZE);
}

static void work(void)
{
	for (int i = 0; i < LOST; i++)
		lose(LOST_SIZE);
	/* These have mappings of their own, too, but malloc's. */
	for (int i = 0; i < BIG; i++)
		lose(BIG_SIZE);
	map_directly();
}

MAIN(work)
