/*
 * An allocator with a sampler of its own that tells of blocks by static tracepoints (USDT). The notes are written by
 * hand, with arguments in registers, constants and memory. Nothing is told as long as nobody listens.
 *
 * Lines from the harness: 1. work, 2. say what the counter of listeners is.
 */
#include "program.h"

volatile unsigned short alloc_listeners __attribute__((section(".probes")));
volatile unsigned short free_listeners __attribute__((section(".probes")));

/* A tracepoint of the provider otel_memory; `arguments` as the assembler writes them, with their widths. */
#define TRACEPOINT(name, listeners, arguments, ...)                   \
	__asm__ volatile("990: nop\n"                                 \
			 ".pushsection .note.stapsdt,\"\",\"note\"\n" \
			 ".balign 4\n"                                \
			 ".4byte 992f-991f, 994f-993f, 3\n"           \
			 "991: .asciz \"stapsdt\"\n"                  \
			 "992: .balign 4\n"                           \
			 "993: .8byte 990b, 0, " listeners "\n"       \
			 ".asciz \"otel_memory\"\n"                   \
			 ".asciz \"" name "\"\n"                      \
			 ".asciz \"" arguments "\"\n"                 \
			 "994: .balign 4\n"                           \
			 ".popsection\n"                              \
			 :                                            \
			 : __VA_ARGS__                                \
			 : "memory")

static char memory[1 << 20];
static size_t used;

static void *next(size_t size)
{
	used += (size + 15) & ~(size_t)15;
	return memory + used;
}

/* All in registers, the size in 32 bits with what was there before above them. */
SITE static void *sampled(unsigned size)
{
	void *p = next(size);
	unsigned long dirty = 0xdeadbeef00000000 | size;

	/* A function without a frame of its own hides its caller from a walk by frame pointers. */
	keep(__builtin_frame_address(0));

	if (alloc_listeners)
		TRACEPOINT("alloc", "alloc_listeners", "8@%0 4@%k1 4@%k2", "r"(p), "r"(dirty), "r"(dirty * 3));
	return p;
}

/* The block in memory, sizes as constants. */
SITE static void *sampled_in_memory(void)
{
	void *volatile p = next(53);

	if (alloc_listeners)
		TRACEPOINT("alloc", "alloc_listeners", "8@%0 -4@%1 -8@%2", "m"(p), "i"(53), "i"(1009));
	return p;
}

SITE static void give_back(void *p)
{
	if (free_listeners)
		TRACEPOINT("free", "free_listeners", "8@%0", "r"(p));
}

SITE static void leak_sampled(void)
{
	for (int i = 0; i < 31; i++)
		keep(sampled(79));
}

SITE static void churn_sampled(void)
{
	for (int i = 0; i < 29; i++)
		give_back(keep(sampled(83)));
}

SITE static void leak_in_memory(void)
{
	for (int i = 0; i < 23; i++)
		keep(sampled_in_memory());
}

int main(void)
{
	say("ready");
	wait_for_line();
	leak_sampled();
	churn_sampled();
	leak_in_memory();
	say("done");
	wait_for_line();
	say_number("listeners", alloc_listeners + free_listeners);
	wait_for_end();
	return 0;
}
