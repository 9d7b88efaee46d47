/* Calls that fail: none of them may be recorded, whatever they leave in memory. */
#include "program.h"

#include <errno.h>

enum { TRIES = 11 };

SITE static void malloc_fails(void)
{
	if (keep(malloc(opaque(SIZE_MAX / 2))))
		abort();
}

/* The product wraps around to a small number: a tracer that multiplies carelessly records it. */
SITE static void calloc_overflows(void)
{
	if (keep(calloc(opaque(SIZE_MAX / 2 + 2), opaque(2))))
		abort();
}

SITE static void reallocarray_overflows(void)
{
	if (keep(reallocarray(NULL, opaque(SIZE_MAX / 2 + 2), opaque(2))))
		abort();
}

SITE static void aligned_alloc_fails(void)
{
	if (keep(aligned_alloc(64, opaque(SIZE_MAX / 2))))
		abort();
}

/* The pointer argument holds a plausible address although nothing was allocated. */
SITE static void posix_memalign_is_refused(void *stale)
{
	void *p = stale;

	if (posix_memalign(&p, opaque(3), 19) != EINVAL || p != stale)
		abort();
	if (posix_memalign(&p, 64, opaque(SIZE_MAX / 2)) != ENOMEM || p != stale)
		abort();
}

/* Shows that counting still works for the thread whose calls failed. */
SITE static void *after_failures(void)
{
	return keep(malloc(19));
}

static void work(void)
{
	static char somewhere[64];

	for (int i = 0; i < TRIES; i++) {
		malloc_fails();
		calloc_overflows();
		reallocarray_overflows();
		aligned_alloc_fails();
		posix_memalign_is_refused(somewhere);
	}
	for (int i = 0; i < 5; i++)
		after_failures();
}

MAIN(work)
