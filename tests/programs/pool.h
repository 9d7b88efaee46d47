/* The pool allocator in libpool.c. */
#ifndef POOL_H
#define POOL_H

#include <setjmp.h>
#include <stddef.h>

void *pool_alloc(size_t size);
void pool_free(void *block);
void pool_reset(void);
void *pool_alloc_or_jump(size_t size, jmp_buf *on_failure);
void *pool_alloc_large(size_t size);
void pool_free_large(void *block);

#endif
