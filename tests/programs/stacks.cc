// Allocates from stacks of many shapes, all below work(), the same ones in every run: stacks PLUGIN shapes 300, or
// stacks PLUGIN deep 10000. Built without frame pointers. Nothing is freed: every stack must stay in the account.
#include <algorithm>
#include <alloca.h>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <vector>

#define FRAME __attribute__((noinline, noclone))

static unsigned state = 12345;
static void (*plugin)(void);

static unsigned pick(unsigned n)
{
	state = state * 1103515245 + 12345;
	return (state >> 16) % n;
}

FRAME static void take(size_t size)
{
	void *block = malloc(size);
	asm volatile("" : "+r"(block) : : "memory");
}

// Recursion; what lies between two calls differs in size.
FRAME static int recurse(unsigned depth)
{
	volatile char room[40];
	room[depth % 40] = 1;
	if (depth == 0)
		take(24);
	else
		recurse(depth - 1);
	return room[depth % 40];
}

// A frame whose size is known at run time only: it needs a frame pointer of its own.
FRAME static int variable(unsigned n)
{
	volatile char *room = static_cast<volatile char *>(alloca(16 + n * 8));
	room[n] = 1;
	recurse(n % 5);
	return room[n];
}

// A frame that is aligned: its caller is found through a saved pointer.
FRAME static int aligned(unsigned n)
{
	alignas(64) volatile char room[128];
	volatile char *more = static_cast<volatile char *>(alloca(16 + n));
	room[n % 128] = more[n] = 1;
	recurse(n % 4);
	return room[n % 128] + more[n];
}

static int by_value(const void *a, const void *b)
{
	take(40);
	return *static_cast<const int *>(a) - *static_cast<const int *>(b);
}

// Back and forth between the program and the C library.
FRAME static void sorted(void)
{
	int numbers[5] = { 5, 3, 4, 1, 2 };
	qsort(numbers, 5, sizeof(int), by_value);
}

FRAME static void throws(unsigned depth)
{
	if (depth == 0)
		throw std::runtime_error("a message that is too long to be kept without an allocation");
	throws(depth - 1);
	asm volatile("");
}

// Exceptions allocate while they unwind the stack themselves.
FRAME static void catches(unsigned depth)
{
	try {
		throws(depth);
	} catch (const std::exception &e) {
		new std::string(e.what());
		new std::exception_ptr(std::current_exception());
	}
}

FRAME static void containers(unsigned n)
{
	auto &map = *new std::map<std::string, std::vector<int>>;
	std::function<void(unsigned)> fill = [&](unsigned i) {
		map["a name that is long enough for the heap " + std::to_string(i)].resize(i + 1);
		if (i)
			fill(i - 1);
	};
	fill(n);
}

static void on_signal(int)
{
	recurse(2);
}

// The handler interrupts a system call.
FRAME static void signalled(unsigned depth)
{
	if (depth)
		signalled(depth - 1);
	else
		raise(SIGUSR1);
	asm volatile("");
}

static void *thread(void *argument)
{
	recurse(*static_cast<unsigned *>(argument));
	return NULL;
}

// One at a time, so that the order stays the same.
FRAME static void threaded(unsigned n)
{
	pthread_t id;
	if (pthread_create(&id, NULL, thread, &n) || pthread_join(id, NULL))
		abort();
}

FRAME static void work(unsigned rounds)
{
	for (unsigned i = 0; i < rounds; i++) {
		switch (pick(9)) {
		case 0:
			recurse(pick(40));
			break;
		case 1:
			variable(pick(30));
			break;
		case 2:
			aligned(pick(30));
			break;
		case 3:
			sorted();
			break;
		case 4:
			catches(pick(10));
			break;
		case 5:
			containers(pick(6));
			break;
		case 6:
			signalled(pick(4));
			break;
		case 7:
			threaded(pick(6));
			break;
		case 8:
			plugin();
			break;
		}
	}
	asm volatile("");
}

// Not work(): these stacks are looked at one by one.
FRAME static void dig(unsigned depth)
{
	recurse(depth);
	asm volatile("");
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	void *library = dlopen(argv[1], RTLD_NOW);
	plugin = library ? reinterpret_cast<void (*)(void)>(dlsym(library, "plugin_leak")) : NULL;
	if (!plugin)
		return 3;
	signal(SIGUSR1, on_signal);
	if (!strcmp(argv[2], "deep"))
		dig(atoi(argv[3]));
	else
		work(atoi(argv[3]));
	return 0;
}
