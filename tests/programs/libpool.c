/*
 * A pool allocator of its own: blocks from a static arena, never from malloc. memleak learns of it from a manifest.
 * pool_reset() releases everything at once; the manifest in the tests leaves it out, so that addresses are handed out
 * again without a free having been seen.
 */
#include "program.h"

#include <setjmp.h>

enum { GRAIN = 16, CLASSES = 64, ARENA = 1 << 20 };

static _Alignas(GRAIN) char arena[ARENA];
static size_t used;
static void *free_blocks[CLASSES + 1];

static size_t class_of(size_t size)
{
	return (size + 2 * GRAIN - 1) / GRAIN;
}

/* The block's class is kept in the grain before it. */
SITE void *pool_alloc(size_t size)
{
	size_t class = class_of(size);
	char *block;

	if (class > CLASSES)
		return NULL;
	if (free_blocks[class]) {
		block = free_blocks[class];
		free_blocks[class] = *(void **)block;
		return block;
	}
	if (ARENA - used < class * GRAIN)
		return NULL;
	block = arena + used + GRAIN;
	*(size_t *)(block - GRAIN) = class;
	used += class * GRAIN;
	return block;
}

SITE void pool_free(void *block)
{
	size_t class = *(size_t *)((char *)block - GRAIN);

	*(void **)block = free_blocks[class];
	free_blocks[class] = block;
}

SITE void pool_reset(void)
{
	memset(free_blocks, 0, sizeof(free_blocks));
	used = 0;
}

/* Jumps out instead of returning when the pool has no block of that size. */
SITE void *pool_alloc_or_jump(size_t size, jmp_buf *on_failure)
{
	void *block = pool_alloc(size);

	if (!block)
		longjmp(*on_failure, 1);
	return block;
}

/* A pool call that rests on malloc: one block for the user, not two. */
SITE void *pool_alloc_large(size_t size)
{
	return keep(malloc(size + 2));
}

SITE void pool_free_large(void *block)
{
	free(keep(block));
}
