/*
 * A heap that behaves in one known way, slowly, as those of services do: what the recordings in rules/recordings were
 * made of (make recordings). The argument is the shape; it goes on until it is killed.
 *
 *   leak        25 blocks of 1 KiB a second, never freed
 *   slow_leak   4 blocks of 256 bytes a second, under the noise of others at the same site
 *   cache_fill  a cache of 4,000 keys that is asked for at random: fills fast, then slower, then not at all
 *   warm_up     5 MiB in the first half minute, then nothing
 *   sawtooth    a buffer that grows for twelve seconds and is flushed
 *   load_ramp   connections that come until the load is reached, each of them for a while
 *
 * All of them also do some work that allocates and frees.
 */
#include "program.h"

#include <time.h>

enum { TICK_MS = 20, TICKS_PER_S = 1000 / TICK_MS, KEYS = 4000, NOISE = 64, BUFFER = 4096, CONNECTIONS = 400 };

static unsigned long ticks;
static unsigned random_state = 1;

static unsigned below(unsigned n)
{
	random_state = random_state * 1664525u + 1013904223u;
	return (random_state >> 8) % n;
}

/* A macro: the function around it is the site. */
#define take(size) memset(keep(malloc(opaque(size))), 1, (size))

SITE static void work(void)
{
	void *blocks[8];

	for (int i = 0; i < 8; i++)
		blocks[i] = keep(malloc(100 + 50 * below(10)));
	for (int i = 0; i < 8; i++)
		free(blocks[i]);
}

SITE static void leak_steadily(void)
{
	if (ticks % 2 == 0)
		take(1024);
}

/* One place for what is lost and for what is not, so that the noise is the site's own. */
SITE static void *remember(void)
{
	return take(256);
}

SITE static void leak_slowly(void)
{
	static void *others[NOISE];
	unsigned at = below(NOISE);

	if (ticks % 12 == 0)
		remember();
	if (others[at]) {
		free(others[at]);
		others[at] = NULL;
	} else {
		others[at] = remember();
	}
}

SITE static void fill_cache(void)
{
	static void *cache[KEYS];

	for (int i = 0; i < 2; i++) {
		unsigned key = below(KEYS);

		if (!cache[key])
			cache[key] = take(512);
	}
}

SITE static void warm_up(void)
{
	if (ticks < 30 * TICKS_PER_S)
		take(3500);
}

SITE static void fill_buffer(void)
{
	static void *buffer[BUFFER];
	static unsigned used;

	if (ticks % (12 * TICKS_PER_S) == 0)
		while (used)
			free(buffer[--used]);
	for (int i = 0; i < 4 && used < BUFFER; i++)
		buffer[used++] = take(700);
}

SITE static void serve_connections(void)
{
	static void *connections[CONNECTIONS];
	unsigned long wanted = ticks / TICKS_PER_S * 2;
	unsigned at = below(CONNECTIONS);

	/* Two more a second at a time, up to the load; some end and are replaced. */
	if (wanted > CONNECTIONS)
		wanted = CONNECTIONS;
	for (unsigned i = 0; i < wanted; i++)
		if (!connections[i])
			connections[i] = take(2048);
	if (connections[at] && below(4) == 0) {
		free(connections[at]);
		connections[at] = NULL;
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*tick)(void);
	} shapes[] = {
		{ "leak", leak_steadily }, { "slow_leak", leak_slowly }, { "cache_fill", fill_cache },
		{ "warm_up", warm_up },	   { "sawtooth", fill_buffer },	 { "load_ramp", serve_connections },
	};
	const struct timespec pause = { .tv_nsec = TICK_MS * 1000000L };

	for (size_t i = 0; argc == 2 && i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		if (strcmp(argv[1], shapes[i].name))
			continue;
		say("ready");
		for (;; ticks++) {
			work();
			shapes[i].tick();
			nanosleep(&pause, NULL);
		}
	}
	return 2;
}
