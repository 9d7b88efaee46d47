/*
 * What every test program shares.
 *
 * Protocol with the harness: print "ready", wait for a line, work, print "done", wait for the end of input.
 * Only read(2) and write(2) are used for it: the programs must not allocate anything that the tests do not count.
 */
#ifndef PROGRAM_H
#define PROGRAM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A function that must appear in call stacks under its own name. */
#define SITE __attribute__((noinline, noclone))

/* Makes the compiler believe that somebody uses the pointer: neither the call nor the block can be optimised away. */
__attribute__((always_inline)) static inline void *keep(void *p)
{
	__asm__ volatile("" : "+r"(p) : : "memory");
	return p;
}

/* A number that the compiler cannot know, so that it cannot warn about or fold senseless sizes. */
__attribute__((always_inline)) static inline size_t opaque(size_t n)
{
	__asm__ volatile("" : "+r"(n));
	return n;
}

static inline void say(const char *line)
{
	char text[128];
	size_t length = strlen(line);

	if (length > sizeof(text) - 1)
		abort();
	memcpy(text, line, length);
	text[length] = '\n';
	if (write(STDOUT_FILENO, text, length + 1) != (ssize_t)(length + 1))
		abort();
}

/* Prints a word and a number without stdio. */
static inline void say_number(const char *word, unsigned long number)
{
	char text[128], digits[24];
	size_t length = strlen(word), n = 0;

	if (length > 64)
		abort();
	memcpy(text, word, length);
	text[length++] = ' ';
	do {
		digits[n++] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	while (n)
		text[length++] = digits[--n];
	text[length] = '\0';
	say(text);
}

/* Waits for a line; the end of input ends the program: the harness has gone. */
static inline void wait_for_line(void)
{
	char c;

	do {
		if (read(STDIN_FILENO, &c, 1) != 1)
			_exit(0);
	} while (c != '\n');
}

static inline void wait_for_end(void)
{
	char c;

	while (read(STDIN_FILENO, &c, 1) == 1)
		;
}

/* The usual main(): one step of work between "ready" and "done". */
#define MAIN(work)               \
	int main(void)           \
	{                        \
		say("ready");    \
		wait_for_line(); \
		work();          \
		say("done");     \
		wait_for_end();  \
		return 0;        \
	}

#endif
