/*
 * Blocks that the program can and cannot reach any more, one shape per allocation site. The first line from the harness
 * makes them, and starts threads that move reachable blocks about; the second frees what was hidden.
 */
#include "program.h"

#include <time.h>

#define TABLE 4096
#define ROTATED 2000

struct node {
	struct node *next;
	struct node *other;
	char text[40];
};

struct node *global_list;
/* Not static: the compiler would see that nobody reads them. */
char *interior[19];
char *odd_interior[19];
static uintptr_t hidden[31];
__thread void *thread_local_blocks[13];
static struct node *table[TABLE];
static struct node *rotated[2][ROTATED];
static volatile int over;

/* Overwrites what calls have left behind on the stack. */
SITE static void scrub(void)
{
	char stack[65536];

	memset(stack, 0, sizeof(stack));
	keep(stack);
}

SITE static void lose(void)
{
	for (int i = 0; i < 23; i++)
		keep(malloc(101));
}

SITE static struct node *list_of(int length, int ring)
{
	struct node *first = NULL, *last = NULL;

	for (int i = 0; i < length; i++) {
		struct node *n = malloc(sizeof(*n));

		n->next = first;
		first = n;
		if (!last)
			last = n;
	}
	if (ring)
		last->next = first;
	return first;
}

SITE static void lose_list(void)
{
	keep(list_of(17, 0));
}

SITE static void lose_ring(void)
{
	keep(list_of(11, 1));
}

SITE static void keep_global_list(void)
{
	global_list = list_of(29, 0);
}

/* Every block is known by the byte behind its header. */
SITE static void keep_interior(void)
{
	for (int i = 0; i < 19; i++)
		interior[i] = (char *)malloc(200) + 16;
}

/* Every block is known by another of its bytes. */
SITE static void keep_odd_interior(void)
{
	for (int i = 0; i < 19; i++)
		odd_interior[i] = (char *)malloc(200) + 8 + 8 * i;
}

SITE static void keep_thread_local(void)
{
	for (int i = 0; i < 13; i++)
		thread_local_blocks[i] = malloc(303);
}

SITE static void keep_on_stack(void **blocks)
{
	for (int i = 0; i < 13; i++)
		blocks[i] = malloc(404);
}

SITE static void hide(void)
{
	for (int i = 0; i < 31; i++)
		hidden[i] = (uintptr_t)malloc(505) ^ 0x5a5a5a5a5a5a5a5aUL;
}

SITE static void insert(unsigned long key)
{
	struct node *n = malloc(sizeof(*n));

	n->next = table[key % TABLE];
	table[key % TABLE] = n;
}

/* A table that grows: every insertion moves the head of a list. */
static void *grow(void *unused)
{
	struct timespec pause = { .tv_nsec = 1000000 };

	for (unsigned long key = 1; !over; key++) {
		insert(key * 2654435761UL >> 7);
		/* First fast, to fill it. */
		if (key > 20000)
			nanosleep(&pause, NULL);
	}
	return unused;
}

SITE static void fill_rotated(void)
{
	for (int i = 0; i < ROTATED; i++)
		rotated[0][i] = malloc(sizeof(struct node));
}

/* Moves blocks from one table to the other and back, so that a scan meets some of them nowhere. */
static void *rotate(void *unused)
{
	for (unsigned long step = 0; !over; step++) {
		int i = (int)(step * 7919 % ROTATED), from = rotated[0][i] ? 0 : 1;
		struct node *n = rotated[from][i];

		rotated[from][i] = NULL;
		rotated[1 - from][i] = keep(n);
		if (step % 64 == 0)
			usleep(50);
	}
	return unused;
}

int main(void)
{
	void *on_stack[13];
	pthread_t threads[2];

	say("ready");
	wait_for_line();
	lose();
	lose_list();
	lose_ring();
	keep_global_list();
	keep_interior();
	keep_odd_interior();
	keep_thread_local();
	keep_on_stack(on_stack);
	hide();
	fill_rotated();
	scrub();
	if (pthread_create(&threads[0], NULL, grow, NULL) || pthread_create(&threads[1], NULL, rotate, NULL))
		abort();
	say("done");
	wait_for_line();
	for (int i = 0; i < 31; i++)
		free((void *)(hidden[i] ^ 0x5a5a5a5a5a5a5a5aUL));
	say("freed");
	wait_for_end();
	over = 1;
	keep(on_stack);
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
	return 0;
}
