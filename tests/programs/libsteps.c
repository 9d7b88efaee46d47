/* A call from one function of a library to another, which is a leaf; see stepped_through.c. */
#include "program.h"

void steps_outer(size_t n);
size_t steps_leaf(size_t n);

SITE size_t steps_leaf(size_t n)
{
	return opaque(n) * 3;
}

SITE void steps_outer(size_t n)
{
	volatile size_t room[24];

	for (size_t i = 0; i < 2; i++)
		room[i] = steps_leaf(n + i);
	keep((void *)room[1]);
}
