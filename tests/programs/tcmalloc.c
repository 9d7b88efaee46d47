/* What tcmalloc has beyond the malloc family. Runs with libtcmalloc or libtcmalloc_minimal preloaded. */
#include "preloaded.h"

static void *(*tc_malloc)(size_t size);
static void *(*tc_malloc_skip_new_handler)(size_t size);
static void *(*tc_calloc)(size_t n, size_t size);
static void *(*tc_realloc)(void *p, size_t size);
static void *(*tc_memalign)(size_t alignment, size_t size);
static int (*tc_posix_memalign)(void **p, size_t alignment, size_t size);
static void *(*tc_valloc)(size_t size);
static void *(*tc_new)(size_t size);
static void *(*tc_newarray_aligned)(size_t size, size_t alignment);
static void (*tc_free)(void *p);
static void (*tc_free_sized)(void *p, size_t size);
static void (*tc_delete)(void *p);
static void (*tc_delete_sized)(void *p, size_t size);
static void (*tc_deletearray_sized_aligned)(void *p, size_t size, size_t alignment);

#define BY_POSIX_MEMALIGN(alignment, size)                   \
	({                                                   \
		void *p_;                                    \
		if (tc_posix_memalign(&p_, alignment, size)) \
			abort();                             \
		p_;                                          \
	})

KIND(tc_malloc, 101, tc_malloc(17), tc_free(p))
KIND(tc_skip, 97, tc_malloc_skip_new_handler(33), tc_free_sized(p, 33))
KIND(tc_calloc, 89, tc_calloc(3, 11), tc_free(p))
KIND(tc_realloc, 83, tc_realloc(0, 29), tc_free(p))
KIND(tc_memalign, 79, tc_memalign(128, 43), tc_free(p))
KIND(tc_posix_memalign, 73, BY_POSIX_MEMALIGN(64, 41), tc_free(p))
KIND(tc_valloc, 71, tc_valloc(47), tc_free(p))
KIND(tc_new, 67, tc_new(71), tc_delete_sized(p, 71))
KIND(tc_newarray_aligned, 61, tc_newarray_aligned(73, 64), tc_deletearray_sized_aligned(p, 73, 64))
/* The families mix. */
KIND(mixed, 59, tc_malloc(300007), tc_delete(p))

static void work(void)
{
	RUN(tc_malloc);
	RUN(tc_skip);
	RUN(tc_calloc);
	RUN(tc_realloc);
	RUN(tc_memalign);
	RUN(tc_posix_memalign);
	RUN(tc_valloc);
	RUN(tc_new);
	RUN(tc_newarray_aligned);
	RUN(mixed);
}

int main(void)
{
	tc_malloc = find("tc_malloc");
	tc_malloc_skip_new_handler = find("tc_malloc_skip_new_handler");
	tc_calloc = find("tc_calloc");
	tc_realloc = find("tc_realloc");
	tc_memalign = find("tc_memalign");
	tc_posix_memalign = find("tc_posix_memalign");
	tc_valloc = find("tc_valloc");
	tc_new = find("tc_new");
	tc_newarray_aligned = find("tc_newarray_aligned");
	tc_free = find("tc_free");
	tc_free_sized = find("tc_free_sized");
	tc_delete = find("tc_delete");
	tc_delete_sized = find("tc_delete_sized");
	tc_deletearray_sized_aligned = find("tc_deletearray_sized_aligned");
	say("ready");
	wait_for_line();
	work();
	say("done");
	wait_for_end();
	return 0;
}
