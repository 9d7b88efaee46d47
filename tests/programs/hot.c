/*
 * Allocates about three million times a second, one thread: a leak of one block in a thousand among churn, a cache with a bound, and a table
 * whose entries are freed after some seconds. Prints how many pairs of malloc and free it makes per second until its input
 * ends.
 */
#include "program.h"

#include <stdio.h>
#include <time.h>

#define CHURNED 256
#define WORK 220
#define CACHED 20000
#define SESSIONS 20000

static void *churned[CHURNED];
static void *cache[CACHED];
static void *sessions[SESSIONS];
static volatile int over;

SITE static void *churn(unsigned long n)
{
	return keep(malloc(24 + n % 8 * 16));
}

SITE static void leak(void)
{
	keep(malloc(88));
}

SITE static void *cache_insert(void)
{
	return keep(malloc(200));
}

SITE static void *open_session(void)
{
	return keep(malloc(312));
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *work(void *unused)
{
	unsigned long random = 88172645463325252UL;
	double began = now(), next = began + 1;
	unsigned long pairs = 0, last = 0;

	for (unsigned long n = 0; !over; n++) {
		void **slot = &churned[n % CHURNED];

		free(*slot);
		*slot = churn(n);
		pairs++;
		/* What a program does with its memory. */
		for (int i = 0; i < WORK; i++)
			random = random * 6364136223846793005UL + 1442695040888963407UL;
		if (n % 1000 == 0) {
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			leak();
			/* Replaced at random, as keys are that come again. */
			slot = &cache[random % CACHED];
			free(*slot);
			*slot = cache_insert();
			/* First in, first out: a few seconds each. */
			slot = &sessions[n / 1000 % SESSIONS];
			free(*slot);
			*slot = open_session();
		}
		if (n % 4096 == 0 && now() >= next) {
			say_number("pairs", pairs - last);
			last = pairs;
			next += 1;
		}
	}
	return unused;
}

int main(void)
{
	pthread_t thread;

	say("ready");
	wait_for_line();
	if (pthread_create(&thread, NULL, work, NULL))
		abort();
	wait_for_end();
	over = 1;
	pthread_join(thread, NULL);
	return 0;
}
