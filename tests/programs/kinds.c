/* One leak per allocator function, and as many blocks that are freed; counts are primes, sizes odd. */
#include "program.h"

#include <malloc.h>

enum { FREED = 59 };

/*
 * Defines leak_NAME, which loses `count` blocks, and churn_NAME, which frees all of its FREED blocks;
 * `expression` yields one block.
 */
#define KIND(name, count, expression)             \
	SITE static void leak_##name(void)        \
	{                                         \
		for (int i = 0; i < (count); i++) \
			keep(expression);         \
	}                                         \
	SITE static void churn_##name(void)       \
	{                                         \
		for (int i = 0; i < FREED; i++)   \
			free(keep(expression));   \
	}

/* A statement expression rather than a function: the site must be the caller, not a helper. */
#define BY_POSIX_MEMALIGN(alignment, size)                \
	({                                                \
		void *p_;                                 \
		if (posix_memalign(&p_, alignment, size)) \
			abort();                          \
		p_;                                       \
	})

/* Told that it is NULL, the compiler calls malloc instead. */
#define NOTHING ((void *)opaque(0))

KIND(malloc, 101, malloc(17))
KIND(calloc, 97, calloc(3, 11))
KIND(realloc, 89, realloc(NOTHING, 29))
KIND(reallocarray, 83, reallocarray(NOTHING, 5, 7))
KIND(posix_memalign, 79, BY_POSIX_MEMALIGN(64, 41))
KIND(aligned_alloc, 73, aligned_alloc(32, opaque(31)))
KIND(memalign, 71, memalign(128, 43))
#if defined(__GLIBC__) && !defined(NO_PVALLOC)
KIND(valloc, 67, valloc(47))
KIND(pvalloc, 61, pvalloc(51))
#endif

static void work(void)
{
	leak_malloc();
	churn_malloc();
	leak_calloc();
	churn_calloc();
	leak_realloc();
	churn_realloc();
	leak_reallocarray();
	churn_reallocarray();
	leak_posix_memalign();
	churn_posix_memalign();
	leak_aligned_alloc();
	churn_aligned_alloc();
	leak_memalign();
	churn_memalign();
#if defined(__GLIBC__) && !defined(NO_PVALLOC)
	leak_valloc();
	churn_valloc();
	leak_pvalloc();
	churn_pvalloc();
#endif
	free(NULL);
}

MAIN(work)
