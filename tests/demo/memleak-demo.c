/*
 * memleak-demo: a small order service that leaks, for `make run` and for trying things out.
 *
 *   memleak-demo [SECONDS]      runs that long (default: until SIGTERM or SIGINT)
 *
 * What it does, and what a leak detector should make of it:
 *
 *   order workers   four threads parse, price and confirm about 400 orders a second in total. Each order costs a
 *                   handful of allocations, all freed within the order: heavy churn, no leak.
 *   catalogue cache bounded: fills in the first seconds, then every new entry replaces an old one. No leak.
 *   connections     a pool that opens more connections in steps during the first seconds, then stays. No leak.
 *   recent orders   a queue of the latest orders; every one of them leaves it in the end. No leak.
 *   discounts       remember_applied_discount() notes every discount in a list that nobody reads or empties: the LEAK,
 *                   some 20 KiB/s, reached through handle_order -> price_order -> apply_discounts.
 *
 * All work is simulated; nothing is read from outside and no socket is opened.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
	WORKERS = 4,
	ORDERS_PER_TICK = 2, /* per worker */
	TICK_MS = 20,
	MAX_LINES = 5, /* order lines, at most */
	PRODUCTS = 20000, /* far more than the cache holds */
	CACHE_ENTRIES = 512,
	RECENT_ORDERS = 512,
	CONNECTION_STEP = 16,
	CONNECTIONS = 64,
	CONNECTION_STEP_MS = 700,
	CONNECTION_BUFFER = 16384,
	DISCOUNT_EVERY = 2, /* one order in so many gets a discount */
};

/* Keeps a function in call stacks under its own name, whatever the optimiser would like. */
#define NAMED __attribute__((noinline, noclone, optimize("no-optimize-sibling-calls")))

struct order_line {
	struct order_line *next;
	unsigned product;
	unsigned quantity;
	char *description;
};

struct order {
	unsigned long number;
	char *customer;
	struct order_line *lines;
	unsigned long total_cents;
};

struct discount_note {
	struct discount_note *next;
	unsigned long order;
	char reason[88];
};

struct product {
	unsigned id;
	unsigned price_cents;
	char *name;
	char *details;
};

struct connection {
	struct connection *next;
	unsigned id;
	char *buffer;
};

static atomic_bool stopping;
static atomic_ulong orders_handled;
static atomic_ulong discounts_applied;

/* A small random number generator: each thread has its own state, so that runs of one thread repeat exactly. */
static unsigned next_random(unsigned *state)
{
	*state = *state * 1664525u + 1013904223u;
	return *state >> 8;
}

static void *allocate(void *block)
{
	if (!block) {
		fprintf(stderr, "memleak-demo: out of memory\n");
		exit(2);
	}
	return block;
}

/* strdup() of our own: the C library has no frame pointers, so its caller would be missing in call stacks. */
NAMED static char *copy_text(const char *text)
{
	size_t size = strlen(text) + 1;

	return memcpy(allocate(malloc(size)), text, size);
}

static void sleep_ms(long ms)
{
	struct timespec left = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&left, &left) && errno == EINTR && !stopping)
		;
}

/* ---- the catalogue cache: bounded, replaces on collision ---- */

static struct product *cache[CACHE_ENTRIES];
static pthread_mutex_t cache_lock = PTHREAD_MUTEX_INITIALIZER;

NAMED static struct product *load_product(unsigned id)
{
	struct product *product = allocate(malloc(sizeof(*product)));
	char name[32];

	snprintf(name, sizeof(name), "product %u", id);
	product->id = id;
	product->price_cents = 100 + id % 9900;
	product->name = copy_text(name);
	product->details = allocate(calloc(1, 200 + id % 300));
	return product;
}

static void drop_product(struct product *product)
{
	if (!product)
		return;
	free(product->name);
	free(product->details);
	free(product);
}

/* The price of a product, from the cache or loaded into it. */
NAMED static unsigned look_up_price(unsigned id)
{
	struct product **slot = &cache[id % CACHE_ENTRIES];
	unsigned price;

	pthread_mutex_lock(&cache_lock);
	if (!*slot || (*slot)->id != id) {
		drop_product(*slot);
		*slot = load_product(id);
	}
	price = (*slot)->price_cents;
	pthread_mutex_unlock(&cache_lock);
	return price;
}

/* ---- discounts: the leak ---- */

static struct discount_note *applied_discounts;
static pthread_mutex_t discounts_lock = PTHREAD_MUTEX_INITIALIZER;

/* Meant for an audit that was never written: the list only grows. */
NAMED static void remember_applied_discount(const struct order *order, unsigned percent)
{
	struct discount_note *note = allocate(malloc(sizeof(*note)));

	note->order = order->number;
	snprintf(note->reason, sizeof(note->reason), "%u %% for %.40s", percent, order->customer);
	pthread_mutex_lock(&discounts_lock);
	note->next = applied_discounts;
	applied_discounts = note;
	pthread_mutex_unlock(&discounts_lock);
	atomic_fetch_add(&discounts_applied, 1);
}

NAMED static void apply_discounts(struct order *order)
{
	unsigned percent = 5 + order->number % 3 * 5;

	if (order->number % DISCOUNT_EVERY)
		return;
	order->total_cents -= order->total_cents * percent / 100;
	remember_applied_discount(order, percent);
}

/* ---- orders ---- */

NAMED static struct order *parse_order(unsigned long number, unsigned *state)
{
	struct order *order = allocate(calloc(1, sizeof(*order)));
	unsigned lines = 1 + next_random(state) % MAX_LINES;
	char text[64];

	order->number = number;
	snprintf(text, sizeof(text), "customer-%u@shop.example", next_random(state) % 100000);
	order->customer = copy_text(text);
	while (lines--) {
		struct order_line *line = allocate(malloc(sizeof(*line)));

		/* Most orders are for a few popular products. */
		line->product = next_random(state) % 10 ? next_random(state) % 400 : next_random(state) % PRODUCTS;
		line->quantity = 1 + next_random(state) % 4;
		snprintf(text, sizeof(text), "%u x product %u", line->quantity, line->product);
		line->description = copy_text(text);
		line->next = order->lines;
		order->lines = line;
	}
	return order;
}

NAMED static void price_order(struct order *order)
{
	for (struct order_line *line = order->lines; line; line = line->next)
		order->total_cents += (unsigned long)line->quantity * look_up_price(line->product);
	apply_discounts(order);
}

/* Writes the confirmation into a buffer that grows as needed. */
NAMED static void confirm_order(const struct order *order)
{
	size_t capacity = 32, length = 0;
	char *text = allocate(malloc(capacity));

	for (const struct order_line *line = order->lines; line; line = line->next) {
		size_t need = strlen(line->description) + 1;

		while (length + need > capacity)
			text = allocate(realloc(text, capacity *= 2));
		memcpy(text + length, line->description, need);
		length += need;
	}
	free(text);
}

static void drop_order(struct order *order)
{
	if (!order)
		return;
	while (order->lines) {
		struct order_line *line = order->lines;

		order->lines = line->next;
		free(line->description);
		free(line);
	}
	free(order->customer);
	free(order);
}

/* The latest orders, oldest replaced first. */
static struct order *recent[RECENT_ORDERS];
static unsigned long recent_next;
static pthread_mutex_t recent_lock = PTHREAD_MUTEX_INITIALIZER;

static void keep_as_recent(struct order *order)
{
	struct order *oldest;

	pthread_mutex_lock(&recent_lock);
	oldest = recent[recent_next % RECENT_ORDERS];
	recent[recent_next++ % RECENT_ORDERS] = order;
	pthread_mutex_unlock(&recent_lock);
	drop_order(oldest);
}

NAMED static void handle_order(unsigned long number, unsigned *state)
{
	struct order *order = parse_order(number, state);

	price_order(order);
	confirm_order(order);
	keep_as_recent(order);
}

static void *order_worker(void *argument)
{
	unsigned state = 12345u + (unsigned)(uintptr_t)argument;

	while (!stopping) {
		for (int i = 0; i < ORDERS_PER_TICK; i++)
			handle_order(atomic_fetch_add(&orders_handled, 1) + 1, &state);
		sleep_ms(TICK_MS);
	}
	return NULL;
}

/* ---- connections: a pool that grows in steps and levels off ---- */

NAMED static struct connection *open_connection(unsigned id, struct connection *next)
{
	struct connection *connection = allocate(malloc(sizeof(*connection)));

	connection->id = id;
	connection->buffer = allocate(calloc(1, CONNECTION_BUFFER));
	connection->next = next;
	return connection;
}

static void *connection_pool(void *unused)
{
	struct connection *open = NULL;
	unsigned count = 0;

	(void)unused;
	while (!stopping) {
		for (int i = 0; i < CONNECTION_STEP && count < CONNECTIONS; i++)
			open = open_connection(++count, open);
		sleep_ms(CONNECTION_STEP_MS);
	}
	while (open) {
		struct connection *next = open->next;

		free(open->buffer);
		free(open);
		open = next;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t workers[WORKERS], pool;
	struct timespec limit = { 0, 0 };
	sigset_t ends;
	char *rest = "";

	if (argc > 1) {
		limit.tv_sec = strtol(argv[1], &rest, 10);
		if (argc > 2 || *rest || limit.tv_sec <= 0) {
			fprintf(stderr, "usage: memleak-demo [SECONDS]\n");
			return 2;
		}
	}
	sigemptyset(&ends);
	sigaddset(&ends, SIGTERM);
	sigaddset(&ends, SIGINT);
	/* Blocked in every thread: the main thread waits for them below. */
	pthread_sigmask(SIG_BLOCK, &ends, NULL);

	printf("%d\n", (int)getpid());
	fflush(stdout);
	for (uintptr_t i = 0; i < WORKERS; i++)
		if (pthread_create(&workers[i], NULL, order_worker, (void *)i))
			abort();
	if (pthread_create(&pool, NULL, connection_pool, NULL))
		abort();

	while (sigtimedwait(&ends, NULL, limit.tv_sec ? &limit : NULL) < 0 && errno == EINTR)
		;
	stopping = true;
	for (int i = 0; i < WORKERS; i++)
		pthread_join(workers[i], NULL);
	pthread_join(pool, NULL);
	fprintf(stderr, "memleak-demo: %lu orders handled, %lu discounts applied\n", orders_handled, discounts_applied);
	return 0;
}
