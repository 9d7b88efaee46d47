/*
 * Uses a pool allocator that memleak knows from a manifest alone. Lines from the harness: 1. ordinary use,
 * 2. a bulk release that the manifest does not name, after which the same addresses are handed out again.
 */
#include "program.h"

#include "pool.h"

SITE static void pool_leak(void)
{
	for (int i = 0; i < 31; i++)
		keep(pool_alloc(79));
}

SITE static void pool_churn(void)
{
	for (int i = 0; i < 37; i++)
		pool_free(keep(pool_alloc(83)));
}

SITE static void pool_leak_large(void)
{
	for (int i = 0; i < 5; i++)
		keep(pool_alloc_large(2001));
}

SITE static void pool_churn_large(void)
{
	for (int i = 0; i < 3; i++)
		pool_free_large(keep(pool_alloc_large(2003)));
}

SITE static void handed_out_again(void)
{
	for (int i = 0; i < 23; i++)
		keep(pool_alloc(79));
}

int main(void)
{
	say("ready");
	wait_for_line();
	pool_leak();
	pool_churn();
	pool_leak_large();
	pool_churn_large();
	say("done");
	wait_for_line();
	pool_reset();
	handed_out_again();
	say("done");
	wait_for_end();
	return 0;
}
