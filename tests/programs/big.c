/*
 * A store: as many MiB of blocks of 256 bytes in a hash table as the argument says, filled at the first line of input. Then
 * it looks up blocks at random, writes to them and replaces some, and prints how many per second until its input ends.
 */
#include "program.h"

#include <stdio.h>
#include <time.h>

struct entry {
	struct entry *next;
	unsigned long key;
	char value[240];
};

static struct entry **table;
static unsigned long entries;
static volatile int over;

SITE static struct entry *make_entry(unsigned long key)
{
	struct entry *e = keep(malloc(sizeof(*e)));

	e->key = key;
	e->next = table[key];
	/* Random bytes are no pointers. */
	memset(e->value, (int)(key * 2654435761UL >> 5), sizeof(e->value));
	table[key] = e;
	return e;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *work(void *unused)
{
	unsigned long random = 88172645463325252UL, done = 0;
	double next = now() + 1;

	while (!over) {
		struct entry *e;

		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		e = table[random % entries];
		e->value[random % sizeof(e->value)]++;
		if (done % 100 == 0) {
			table[e->key] = e->next;
			make_entry(e->key);
			free(e);
		}
		if (++done % 4096 == 0 && now() >= next) {
			say_number("lookups", done);
			done = 0;
			next = now() + 1;
		}
	}
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t thread;

	if (argc < 2)
		return 2;
	say("ready");
	wait_for_line();
	entries = ((unsigned long)atoi(argv[1]) << 20) / 272;
	table = calloc(entries, sizeof(*table));
	for (unsigned long key = 0; key < entries; key++)
		make_entry(key);
	say("done");
	wait_for_line();
	if (pthread_create(&thread, NULL, work, NULL))
		abort();
	wait_for_end();
	over = 1;
	pthread_join(thread, NULL);
	return 0;
}
