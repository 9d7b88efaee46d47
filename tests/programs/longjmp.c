/* An allocator that jumps out instead of returning; the thread's later allocations must still be counted. */
#include "program.h"

#include "pool.h"

enum { JUMPS = 7 };

static jmp_buf on_failure;

SITE static void jump_out(void)
{
	keep(pool_alloc_or_jump(opaque(1 << 19), &on_failure));
	abort();
}

SITE static void after_jump(void)
{
	keep(pool_alloc_or_jump(89, &on_failure));
}

SITE static void malloc_after_jump(void)
{
	keep(malloc(97));
}

static void work(void)
{
	for (volatile int i = 0; i < JUMPS; i++) {
		if (!setjmp(on_failure))
			jump_out();
		malloc_after_jump();
		after_jump();
	}
}

MAIN(work)
