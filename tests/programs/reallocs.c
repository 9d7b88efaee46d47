/* realloc in all its forms: growing chains, shrinking, failing, and freeing by size 0. */
#include "program.h"

enum { CHAINS = 7, LINKS = 101, SURVIVORS = 13, ZEROED = 19, SHRUNK = 17 };

SITE static void *chain_start(void)
{
	return keep(malloc(11));
}

/* Each step asks for two bytes more; only the last block of a chain stays. */
SITE static void chain_grow(void *p)
{
	for (int i = 1; i <= LINKS; i++) {
		p = keep(realloc(p, opaque(11 + 2 * i)));
		if (!p)
			abort();
	}
}

SITE static void *kept_through_failure(void)
{
	return keep(malloc(37));
}

SITE static void fail_to_grow(void *p)
{
	/* A copy that the compiler cannot connect with the block given away. */
	void *still_ours = (void *)opaque((size_t)p);

	if (keep(realloc(p, opaque(SIZE_MAX / 2))))
		abort();
	memset(still_ours, 1, 37);
}

SITE static void *freed_by_zero(void)
{
	return keep(malloc(23));
}

SITE static void realloc_to_zero(void *p)
{
	keep(realloc(p, opaque(0)));
}

SITE static void *shrink_from(void)
{
	return keep(malloc(1001));
}

SITE static void shrink_to(void *p)
{
	keep(realloc(p, opaque(501)));
}

static void work(void)
{
	for (int i = 0; i < CHAINS; i++)
		chain_grow(chain_start());
	for (int i = 0; i < SURVIVORS; i++)
		fail_to_grow(kept_through_failure());
	for (int i = 0; i < ZEROED; i++)
		realloc_to_zero(freed_by_zero());
	for (int i = 0; i < SHRUNK; i++)
		shrink_to(shrink_from());
}

MAIN(work)
