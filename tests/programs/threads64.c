/*
 * 64 threads at once. Each allocates and swaps its block into a shared slot, freeing what it finds there (so most
 * blocks are freed by another thread), and loses three blocks on the way.
 */
#include "program.h"

enum { THREADS = 64, ROUNDS = 16000, SLOTS = 257 };

static _Atomic(void *) slots[SLOTS];

SITE static void *exchanged(unsigned round)
{
	return keep(malloc(opaque(1 + round % 509)));
}

SITE static void lost_by_thread(void)
{
	for (int i = 0; i < 3; i++)
		keep(malloc(33));
}

static void *run(void *argument)
{
	unsigned state = (unsigned)(uintptr_t)argument * 2654435761u + 1;

	for (unsigned round = 0; round < ROUNDS; round++) {
		state = state * 1664525u + 1013904223u;
		free(__atomic_exchange_n((void **)&slots[(state >> 8) % SLOTS], exchanged(round), __ATOMIC_ACQ_REL));
	}
	lost_by_thread();
	return NULL;
}

static void work(void)
{
	static pthread_t threads[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, run, (void *)i))
			abort();
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < SLOTS; i++)
		free(slots[i]);
}

MAIN(work)
