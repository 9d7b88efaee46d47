// A program with C++ operators of its own: small blocks come out of a pool, large ones from malloc.
extern "C" {
#include "program.h"
}

#include <new>

static char pool[1 << 16];
static size_t used;

static bool in_pool(void *p)
{
	return (char *)p >= pool && (char *)p < pool + sizeof(pool);
}

void *operator new(size_t size)
{
	if (size > 256)
		return malloc(size);
	used = (used + 15) & ~(size_t)15;
	if (used + size > sizeof(pool))
		abort();
	used += size;
	return pool + used - size;
}

void operator delete(void *p) noexcept
{
	if (!in_pool(p))
		free(p);
}

void operator delete(void *p, size_t) noexcept
{
	operator delete(p);
}

SITE static void leak_from_pool()
{
	for (int i = 0; i < 31; i++)
		keep(::operator new(71));
}

SITE static void churn_from_pool()
{
	for (int i = 0; i < 29; i++)
		::operator delete(keep(::operator new(73)), 73);
}

SITE static void leak_from_malloc()
{
	for (int i = 0; i < 23; i++)
		keep(::operator new(1001));
}

SITE static void churn_from_malloc()
{
	for (int i = 0; i < 19; i++)
		::operator delete(keep(::operator new(1003)));
}

// The C++ library's operator new[] rests on ours.
SITE static void leak_array()
{
	for (int i = 0; i < 17; i++)
		keep(::operator new[](79));
}

SITE static void leak_malloc()
{
	for (int i = 0; i < 13; i++)
		keep(malloc(83));
}

static void work()
{
	leak_from_pool();
	churn_from_pool();
	leak_from_malloc();
	churn_from_malloc();
	leak_array();
	leak_malloc();
}

MAIN(work)
