/*
 * Blocks that the program can and cannot reach any more, one shape per allocation site. The first line from the harness
 * makes them, and starts threads that move reachable blocks about; the second frees what was hidden. An argument is the size
 * of a block that only makes the program larger, in MiB.
 */
#include "program.h"

#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>

#define TABLE 4096
#define ROTATED 2000
#define CACHED 500
#define IN_REGISTERS 9

struct node {
	struct node *next;
	struct node *other;
	char text[40];
};

struct node *global_list;
/* Not static: the compiler would see that nobody reads them. */
char *interior[19];
char *odd_interior[19];
uintptr_t coded[33];
static uintptr_t turned[31];
static int epoll_fd;
static void **shared, **frozen, **sealed;
static void *in_registers[IN_REGISTERS];
static volatile int registers_hold;
static char *filler;
static struct cached {
	struct cached *newer, *older;
	unsigned long key;
} *newest, *oldest;
static int cached;
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

SITE static void lose_many(void)
{
	for (int i = 0; i < 5000; i++)
		keep(malloc(72));
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

/* XOR with one key, as programs do that protect their pointers. */
SITE static void hide_coded(void)
{
	for (int i = 0; i < 33; i++)
		coded[i] = (uintptr_t)malloc(505) ^ 0x5a5a5a5a5a5a5a5aUL;
}

/* A code that nobody knows. */
static uintptr_t turn(uintptr_t address)
{
	return address << 40 | address >> 24;
}

static void *turn_back(uintptr_t code)
{
	return (void *)(code >> 40 | code << 24);
}

SITE static void hide_turned(void)
{
	for (int i = 0; i < 31; i++)
		turned[i] = turn((uintptr_t)malloc(606));
}

/* Only the kernel knows them, and gives them back. */
SITE static void keep_in_epoll(void)
{
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 0; i < 7; i++) {
		int ends[2];
		struct epoll_event event = { .events = EPOLLIN };

		event.data.ptr = malloc(707);
		if (pipe(ends) || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, ends[0], &event))
			abort();
	}
}

SITE static void keep_shared(void)
{
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 7; i++)
		shared[100 + i] = malloc(808);
}

/* In memory that is read-only by now. */
SITE static void keep_frozen(void)
{
	frozen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 7; i++)
		frozen[100 + i] = malloc(909);
	mprotect(frozen, 4096, PROT_READ);
}

/* In memory that not even the program may read at the moment. */
SITE static void keep_sealed(void)
{
	sealed = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 7; i++)
		sealed[100 + i] = malloc(707);
	mprotect(sealed, 4096, PROT_NONE);
}

SITE static void fill_registers(void)
{
	for (int i = 0; i < IN_REGISTERS; i++)
		in_registers[i] = malloc(1010);
}

/* A thread that has its blocks in registers only, for as long as it runs. */
static void *hold_in_registers(void *unused)
{
	fill_registers();
	scrub();
#ifdef __x86_64__
	__asm__ volatile("movq 0(%0), %%rbx\n\tmovq 8(%0), %%r8\n\tmovq 16(%0), %%r9\n\tmovq 24(%0), %%r10\n\t"
			 "movq 32(%0), %%r11\n\tmovq 40(%0), %%r12\n\tmovq 48(%0), %%r13\n\tmovq 56(%0), %%r14\n\t"
			 "movq 64(%0), %%r15\n\t"
			 "xorl %%eax, %%eax\n\tmovq $9, %%rcx\n\t"
			 "1: movq %%rax, -8(%0,%%rcx,8)\n\tloop 1b\n\t"
			 "movl $1, (%1)\n\t"
			 "2: pause\n\tcmpl $0, (%2)\n\tje 2b\n\t"
			 :
			 : "D"(in_registers), "S"(&registers_hold), "d"(&over)
			 : "rax", "rcx", "rbx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
#else
	registers_hold = 1;
	while (!over)
		usleep(1000);
#endif
	return unused;
}

SITE static struct cached *cache_entry(void)
{
	return malloc(200);
}

/* A cache with a bound: every new entry drops the one that was used longest ago. */
static void *use_cache(void *unused)
{
	for (unsigned long key = 1; !over; key++) {
		struct cached *e = cache_entry();

		e->key = key;
		e->newer = NULL;
		e->older = newest;
		if (newest)
			newest->newer = e;
		else
			oldest = e;
		newest = e;
		if (++cached > CACHED) {
			struct cached *last = oldest;

			oldest = last->newer;
			oldest->older = NULL;
			cached--;
			free(last);
		}
		/* A second or more in the cache: old enough to be judged. */
		if (key > CACHED)
			usleep(4000);
	}
	return unused;
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

int main(int argc, char **argv)
{
	void *on_stack[13];
	pthread_t threads[4];

	if (argc > 1) {
		size_t size = (size_t)atoi(argv[1]) << 20;

		filler = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(filler, 1, size);
	}
	say("ready");
	wait_for_line();
	lose();
	lose_many();
	lose_list();
	lose_ring();
	keep_global_list();
	keep_interior();
	keep_odd_interior();
	keep_thread_local();
	keep_on_stack(on_stack);
	hide_coded();
	hide_turned();
	keep_in_epoll();
	keep_shared();
	keep_frozen();
	keep_sealed();
	fill_rotated();
	scrub();
	if (pthread_create(&threads[0], NULL, grow, NULL) || pthread_create(&threads[1], NULL, rotate, NULL) ||
	    pthread_create(&threads[2], NULL, hold_in_registers, NULL) ||
	    pthread_create(&threads[3], NULL, use_cache, NULL))
		abort();
	while (!registers_hold)
		usleep(1000);
	say("done");
	wait_for_line();
	for (int i = 0; i < 31; i++)
		free(turn_back(turned[i]));
	say("freed");
	wait_for_end();
	over = 1;
	keep(on_stack);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	return 0;
}
