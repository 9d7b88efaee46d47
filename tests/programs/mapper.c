/* Memory taken from the kernel directly, and a malloc that does so behind the scenes. */
#include "program.h"

#include <sys/mman.h>

enum { PAGE = 4096, LOST = 11, RETURNED = 13, REMAPPED = 5 };

SITE static void *map(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	return keep(p);
}

SITE static void map_and_lose(void)
{
	for (int i = 0; i < LOST; i++)
		map(3 * PAGE);
}

SITE static void map_and_return(void)
{
	for (int i = 0; i < RETURNED; i++)
		munmap(map(5 * PAGE), 5 * PAGE);
}

SITE static void remap(void *p)
{
	if (mremap(p, 3 * PAGE, 7 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED)
		abort();
}

/* Fails with MAP_FAILED, which is not NULL. */
SITE static void map_nothing(void)
{
	if (mmap(NULL, opaque(0), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED)
		abort();
}

/* Above malloc's threshold: malloc maps each block on its own. */
SITE static void big_malloc(void)
{
	for (int i = 0; i < 3; i++)
		keep(malloc((1 << 20) + 1));
}

static void work(void)
{
	map_and_lose();
	map_and_return();
	for (int i = 0; i < REMAPPED; i++)
		remap(map(3 * PAGE));
	map_nothing();
	big_malloc();
}

MAIN(work)
