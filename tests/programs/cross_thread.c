/* One thread allocates, another one frees: most while both run, some after the first has ended. */
#include "program.h"

enum { BLOCKS = 211, LOST = 13, HALF = 100 };

static void *blocks[BLOCKS];
static pthread_barrier_t handed_over;

SITE static void *produce(void *unused)
{
	(void)unused;
	pthread_setname_np(pthread_self(), "producer");
	for (int i = 0; i < HALF; i++)
		blocks[i] = keep(malloc(61));
	pthread_barrier_wait(&handed_over);
	pthread_barrier_wait(&handed_over);
	for (int i = HALF; i < BLOCKS; i++)
		blocks[i] = keep(malloc(61));
	return NULL;
}

SITE static void consume(int from, int to)
{
	for (int i = from; i < to; i++)
		free(blocks[i]);
}

static void work(void)
{
	pthread_t producer;

	pthread_barrier_init(&handed_over, NULL, 2);
	if (pthread_create(&producer, NULL, produce, NULL))
		abort();
	pthread_barrier_wait(&handed_over);
	consume(0, HALF);
	pthread_barrier_wait(&handed_over);
	pthread_join(producer, NULL);
	consume(HALF, BLOCKS - LOST);
}

MAIN(work)
