/* What mimalloc has beyond the malloc family. Runs with libmimalloc preloaded. */
#include "preloaded.h"

typedef struct heap heap;

static void *(*mi_malloc)(size_t size);
static void *(*mi_zalloc)(size_t size);
static void *(*mi_malloc_small)(size_t size);
static void *(*mi_calloc)(size_t n, size_t size);
static void *(*mi_mallocn)(size_t n, size_t size);
static void *(*mi_realloc)(void *p, size_t size);
static void *(*mi_reallocf)(void *p, size_t size);
static void *(*mi_rezalloc)(void *p, size_t size);
static void *(*mi_recalloc)(void *p, size_t n, size_t size);
static void *(*mi_malloc_aligned)(size_t size, size_t alignment);
static void *(*mi_calloc_aligned)(size_t n, size_t size, size_t alignment);
static void *(*mi_realloc_aligned)(void *p, size_t size, size_t alignment);
static void *(*mi_aligned_alloc)(size_t alignment, size_t size);
static int (*mi_posix_memalign)(void **p, size_t alignment, size_t size);
static void *(*mi_new)(size_t size);
static void *(*mi_new_n)(size_t n, size_t size);
static char *(*mi_strdup)(const char *text);
static heap *(*mi_heap_new)(void);
static void *(*mi_heap_malloc)(heap *heap, size_t size);
static void *(*mi_heap_calloc)(heap *heap, size_t n, size_t size);
static void *(*mi_heap_realloc)(heap *heap, void *p, size_t size);
static void *(*mi_heap_malloc_aligned)(heap *heap, size_t size, size_t alignment);
static void (*mi_free)(void *p);
static void (*mi_free_size)(void *p, size_t size);
static void (*mi_free_size_aligned)(void *p, size_t size, size_t alignment);
static void (*mi_free_aligned)(void *p, size_t alignment);

static heap *own_heap;

#define BY_POSIX_MEMALIGN(alignment, size)                   \
	({                                                   \
		void *p_;                                    \
		if (mi_posix_memalign(&p_, alignment, size)) \
			abort();                             \
		p_;                                          \
	})

SITE static void *to_be_resized(void)
{
	return keep(mi_malloc(13));
}

KIND(mi_malloc, 101, mi_malloc(17), mi_free(p))
KIND(mi_zalloc, 97, mi_zalloc(19), mi_free_size(p, 19))
KIND(mi_malloc_small, 89, mi_malloc_small(23), mi_free(p))
KIND(mi_calloc, 83, mi_calloc(3, 11), mi_free(p))
KIND(mi_mallocn, 79, mi_mallocn(5, 7), mi_free(p))
KIND(mi_realloc, 73, mi_realloc(to_be_resized(), 1029), mi_free(p))
KIND(mi_reallocf, 71, mi_reallocf(to_be_resized(), 1031), mi_free(p))
KIND(mi_rezalloc, 67, mi_rezalloc(to_be_resized(), 1033), mi_free(p))
KIND(mi_recalloc, 61, mi_recalloc(to_be_resized(), 41, 27), mi_free(p))
KIND(mi_malloc_aligned, 53, mi_malloc_aligned(43, 128), mi_free_size_aligned(p, 43, 128))
KIND(mi_calloc_aligned, 47, mi_calloc_aligned(3, 15, 64), mi_free_aligned(p, 64))
KIND(mi_realloc_aligned, 43, mi_realloc_aligned(to_be_resized(), 1039, 64), mi_free_aligned(p, 64))
KIND(mi_aligned_alloc, 41, mi_aligned_alloc(64, 51), mi_free(p))
KIND(mi_posix_memalign, 37, BY_POSIX_MEMALIGN(64, 53), mi_free(p))
KIND(mi_new, 31, mi_new(71), mi_free(p))
KIND(mi_new_n, 29, mi_new_n(3, 25), mi_free(p))
KIND(mi_strdup, 23, mi_strdup("text"), mi_free(p))
KIND(mi_heap_malloc, 19, mi_heap_malloc(own_heap, 77), mi_free(p))
KIND(mi_heap_calloc, 17, mi_heap_calloc(own_heap, 3, 27), mi_free(p))
KIND(mi_heap_realloc, 13, mi_heap_realloc(own_heap, to_be_resized(), 1041), mi_free(p))
KIND(mi_heap_malloc_aligned, 11, mi_heap_malloc_aligned(own_heap, 83, 64), mi_free(p))
KIND(mi_large, 7, mi_malloc(3000017), mi_free(p))
/* The families mix. */
KIND(mixed, 5, mi_malloc(87), free(p))

static void work(void)
{
	RUN(mi_malloc);
	RUN(mi_zalloc);
	RUN(mi_malloc_small);
	RUN(mi_calloc);
	RUN(mi_mallocn);
	RUN(mi_realloc);
	RUN(mi_reallocf);
	RUN(mi_rezalloc);
	RUN(mi_recalloc);
	RUN(mi_malloc_aligned);
	RUN(mi_calloc_aligned);
	RUN(mi_realloc_aligned);
	RUN(mi_aligned_alloc);
	RUN(mi_posix_memalign);
	RUN(mi_new);
	RUN(mi_new_n);
	RUN(mi_strdup);
	RUN(mi_heap_malloc);
	RUN(mi_heap_calloc);
	RUN(mi_heap_realloc);
	RUN(mi_heap_malloc_aligned);
	RUN(mi_large);
	RUN(mixed);
}

int main(void)
{
	mi_malloc = find("mi_malloc");
	mi_zalloc = find("mi_zalloc");
	mi_malloc_small = find("mi_malloc_small");
	mi_calloc = find("mi_calloc");
	mi_mallocn = find("mi_mallocn");
	mi_realloc = find("mi_realloc");
	mi_reallocf = find("mi_reallocf");
	mi_rezalloc = find("mi_rezalloc");
	mi_recalloc = find("mi_recalloc");
	mi_malloc_aligned = find("mi_malloc_aligned");
	mi_calloc_aligned = find("mi_calloc_aligned");
	mi_realloc_aligned = find("mi_realloc_aligned");
	mi_aligned_alloc = find("mi_aligned_alloc");
	mi_posix_memalign = find("mi_posix_memalign");
	mi_new = find("mi_new");
	mi_new_n = find("mi_new_n");
	mi_strdup = find("mi_strdup");
	mi_heap_new = find("mi_heap_new");
	mi_heap_malloc = find("mi_heap_malloc");
	mi_heap_calloc = find("mi_heap_calloc");
	mi_heap_realloc = find("mi_heap_realloc");
	mi_heap_malloc_aligned = find("mi_heap_malloc_aligned");
	mi_free = find("mi_free");
	mi_free_size = find("mi_free_size");
	mi_free_size_aligned = find("mi_free_size_aligned");
	mi_free_aligned = find("mi_free_aligned");
	own_heap = mi_heap_new();
	say("ready");
	wait_for_line();
	work();
	say("done");
	wait_for_end();
	return 0;
}
