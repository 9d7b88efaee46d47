/* What jemalloc has beyond the malloc family. Runs with libjemalloc preloaded. */
#include "preloaded.h"

static void *(*mallocx)(size_t size, int flags);
static void *(*rallocx)(void *p, size_t size, int flags);
static size_t (*xallocx)(void *p, size_t size, size_t extra, int flags);
static void (*dallocx)(void *p, int flags);
static void (*sdallocx)(void *p, size_t size, int flags);

/* The flag for an alignment of 2^la bytes, and for zeroed memory. */
#define LG_ALIGN(la) ((int)(la))
#define ZERO 0x40

KIND(mallocx, 101, mallocx(17, 0), dallocx(p, 0))
KIND(mallocx_aligned, 97, mallocx(33, LG_ALIGN(7) | ZERO), sdallocx(p, 33, LG_ALIGN(7)))
KIND(mallocx_large, 3, mallocx(100003, 0), sdallocx(p, 100003, 0))

SITE static void *to_be_resized(void)
{
	return keep(mallocx(13, 0));
}

KIND(rallocx, 89, rallocx(to_be_resized(), 1029, 0), sdallocx(p, 1029, 0))
/* In its size class a block can take the new size; another class would need another place. */
SITE static void *resize_in_place(void *p, size_t size)
{
	if (xallocx(p, size, 0, 0) < size)
		abort();
	return p;
}

SITE static void *grows(void)
{
	return keep(mallocx(1001, 0));
}

SITE static void fail_to_grow(void *p)
{
	if (xallocx(p, 4000000, 0, 0) >= 4000000)
		abort();
}

SITE static void *stays(void)
{
	return keep(mallocx(39, 0));
}

static void resize_some(void)
{
	for (int i = 0; i < 37; i++)
		keep(resize_in_place(grows(), 1021));
	for (int i = 0; i < 31; i++)
		fail_to_grow(stays());
}

KIND(valloc, 79, valloc(47), free(p))
/* The families mix. */
KIND(mixed, 83, mallocx(35, 0), free(p))

static void work(void)
{
	RUN(mallocx);
	RUN(mallocx_aligned);
	RUN(mallocx_large);
	RUN(rallocx);
	resize_some();
	RUN(valloc);
	RUN(mixed);
}

int main(void)
{
	mallocx = find("mallocx");
	rallocx = find("rallocx");
	xallocx = find("xallocx");
	dallocx = find("dallocx");
	sdallocx = find("sdallocx");
	say("ready");
	wait_for_line();
	work();
	say("done");
	wait_for_end();
	return 0;
}
