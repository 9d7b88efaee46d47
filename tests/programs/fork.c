/*
 * A fork in the middle. Lines from the harness: 1. allocate and fork, 2. the child works, 3. the parent works.
 * The child frees its copies of the parent's blocks, which must not touch the parent's account.
 */
#include "program.h"

enum { BEFORE = 7, CHILD = 11, AFTER = 13 };

static void *before[BEFORE];

SITE static void before_fork(void)
{
	for (int i = 0; i < BEFORE; i++)
		before[i] = keep(malloc(31));
}

SITE static void in_child(void)
{
	for (int i = 0; i < CHILD; i++)
		keep(malloc(37));
}

SITE static void free_copies(void)
{
	for (int i = 0; i < BEFORE; i++)
		free(before[i]);
}

SITE static void in_parent(void)
{
	for (int i = 0; i < AFTER; i++)
		keep(malloc(41));
}

int main(void)
{
	int child_done[2], parent_ends[2];
	char c;

	if (pipe(child_done) || pipe(parent_ends))
		abort();
	say("ready");
	wait_for_line();
	before_fork();
	pid_t child = fork();
	if (child < 0)
		abort();
	if (child == 0) {
		close(child_done[0]);
		close(parent_ends[1]);
		say_number("child", (unsigned long)getpid());
		wait_for_line();
		free_copies();
		in_child();
		say("child-done");
		close(child_done[1]);
		/* Stays until the parent has gone, so that it can be looked at. */
		while (read(parent_ends[0], &c, 1) == 1)
			;
		_exit(0);
	}
	close(child_done[1]);
	while (read(child_done[0], &c, 1) == 1)
		;
	wait_for_line();
	in_parent();
	say("done");
	wait_for_end();
	return 0;
}
