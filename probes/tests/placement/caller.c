// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Calls one allocator function so many times, checks all that it hands out, and exits with 0 when it was right.
 *
 *   caller FUNCTION TIMES
 *
 * Says so on standard output and waits for a byte on standard input before the calls, so that probes can be attached,
 * and again after them. Uses no stdio: nothing but the calls asked for may reach the allocator in between.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Weak: not every library has them all; what is missing is NULL. */
#define WEAK __attribute__((weak))
extern WEAK void *malloc(size_t);
extern WEAK void *calloc(size_t, size_t);
extern WEAK void *realloc(void *, size_t);
extern WEAK void *reallocarray(void *, size_t, size_t);
extern WEAK int posix_memalign(void **, size_t, size_t);
extern WEAK void *aligned_alloc(size_t, size_t);
extern WEAK void *memalign(size_t, size_t);
extern WEAK void *valloc(size_t);
extern WEAK void *pvalloc(size_t);
extern WEAK void free(void *);
extern WEAK void cfree(void *);
/* C++'s operators new, new[], with alignment, and their deletes. */
extern WEAK void *_Znwm(size_t);
extern WEAK void *_Znam(size_t);
extern WEAK void *_ZnwmSt11align_val_t(size_t, size_t);
extern WEAK void _ZdlPv(void *);
extern WEAK void _ZdaPv(void *);
extern WEAK void _ZdlPvm(void *, size_t);
extern WEAK void _ZdlPvSt11align_val_t(void *, size_t);

enum { SIZE = 77, ALIGNED_SIZE = 192, ALIGNMENT = 64, MOST = 4096 };

/* Exit codes. */
enum { WRONG_USE = 2, NO_SUCH_FUNCTION = 3, NO_BLOCK = 4, MISALIGNED = 5, DIRTY = 6, OVERLAP = 7 };

static unsigned char *blocks[MOST];

static void await(void)
{
	char byte = '.';

	if (write(STDOUT_FILENO, &byte, 1) != 1)
		_exit(WRONG_USE);
	if (read(STDIN_FILENO, &byte, 1) != 1)
		_exit(WRONG_USE);
}

/* One call of the function that hands out a block; NULL when the library has none of that name. */
static void *allocate(const char *name)
{
	void *block = NULL;

	if (!strcmp(name, "malloc") && malloc)
		return malloc(SIZE);
	if (!strcmp(name, "calloc") && calloc) {
		unsigned char *cleared = calloc(7, 11);

		for (int i = 0; cleared && i < SIZE; i++)
			if (cleared[i])
				_exit(DIRTY);
		return cleared;
	}
	if (!strcmp(name, "realloc") && realloc)
		return realloc(NULL, SIZE);
	if (!strcmp(name, "reallocarray") && reallocarray)
		return reallocarray(NULL, 7, 11);
	if (!strcmp(name, "posix_memalign") && posix_memalign)
		return posix_memalign(&block, ALIGNMENT, ALIGNED_SIZE) ? NULL : block;
	if (!strcmp(name, "aligned_alloc") && aligned_alloc)
		return aligned_alloc(ALIGNMENT, ALIGNED_SIZE);
	if (!strcmp(name, "memalign") && memalign)
		return memalign(ALIGNMENT, ALIGNED_SIZE);
	if (!strcmp(name, "valloc") && valloc)
		return valloc(SIZE);
	if (!strcmp(name, "pvalloc") && pvalloc)
		return pvalloc(SIZE);
	if (!strcmp(name, "_Znwm") && _Znwm)
		return _Znwm(SIZE);
	if (!strcmp(name, "_Znam") && _Znam)
		return _Znam(SIZE);
	if (!strcmp(name, "_ZnwmSt11align_val_t") && _ZnwmSt11align_val_t)
		return _ZnwmSt11align_val_t(ALIGNED_SIZE, ALIGNMENT);
	_exit(NO_SUCH_FUNCTION);
}

/* One call of the function that takes a block back; false when it is no such function. */
static int release(const char *name, void *block)
{
	if (!strcmp(name, "free") && free)
		free(block);
	else if (!strcmp(name, "cfree") && cfree)
		cfree(block);
	else if (!strcmp(name, "_ZdlPv") && _ZdlPv)
		_ZdlPv(block);
	else if (!strcmp(name, "_ZdaPv") && _ZdaPv)
		_ZdaPv(block);
	else if (!strcmp(name, "_ZdlPvm") && _ZdlPvm)
		_ZdlPvm(block, SIZE);
	else if (!strcmp(name, "_ZdlPvSt11align_val_t") && _ZdlPvSt11align_val_t)
		_ZdlPvSt11align_val_t(block, ALIGNMENT);
	else
		return 0;
	return 1;
}

/* Each block gets a pattern of its own: a block handed out twice shows when they are read back. */
static unsigned char pattern(int n)
{
	return (unsigned char)(n * 37 + 1);
}

int main(int argc, char **argv)
{
	int times = argc == 3 ? atoi(argv[2]) : 0;
	const char *name = argv[1];
	int frees = times && (!strncmp(name, "_Zd", 3) || strstr(name, "free"));
	int aligned = times && strstr(name, "align") != NULL;

	if (times < 1 || times > MOST)
		return WRONG_USE;
	for (int n = 0; frees && n < times; n++)
		blocks[n] = aligned ? aligned_alloc(ALIGNMENT, ALIGNED_SIZE) : malloc(SIZE);
	await();
	for (int n = 0; n < times; n++) {
		if (!frees)
			blocks[n] = allocate(name);
		if (!blocks[n])
			return NO_BLOCK;
		if (aligned && (uintptr_t)blocks[n] % ALIGNMENT)
			return MISALIGNED;
		memset(blocks[n], pattern(n), SIZE);
	}
	for (int n = 0; n < times; n++)
		for (int i = 0; i < SIZE; i++)
			if (blocks[n][i] != pattern(n))
				return OVERLAP;
	for (int n = 0; frees && n < times; n++)
		if (!release(name, blocks[n]))
			return NO_SUCH_FUNCTION;
	await();
	return 0;
}
