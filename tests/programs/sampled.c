/* Leaks far more blocks than a sample holds, at sites of very different sizes, and frees all of one site. */
#include "program.h"

static void *churned[211];

SITE static void leak_small(void)
{
	for (int i = 0; i < 40009; i++)
		keep(malloc(67));
}

SITE static void leak_medium(void)
{
	for (int i = 0; i < 4001; i++)
		keep(calloc(3, 337));
}

SITE static void leak_large(void)
{
	for (int i = 0; i < 53; i++)
		keep(malloc(1000003));
}

/* realloc(NULL, n) of glibc calls malloc: the inner call must not get a second chance to be sampled. */
SITE static void leak_realloc(void)
{
	for (int i = 0; i < 20011; i++)
		keep(realloc(NULL, 129));
}

SITE static void *churn_one(void)
{
	return keep(malloc(331));
}

static void churn(void)
{
	for (int i = 0; i < 30011; i++) {
		free(churned[i % 211]);
		churned[i % 211] = churn_one();
	}
	for (int i = 0; i < 211; i++)
		free(churned[i]);
}

static void work(void)
{
	leak_small();
	leak_medium();
	leak_large();
	leak_realloc();
	churn();
}

MAIN(work)
