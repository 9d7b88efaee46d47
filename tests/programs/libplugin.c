/* A library loaded while its program is being watched; it leaks through malloc. */
#include "program.h"

#ifndef ROOM
#define ROOM 1
#endif

SITE void plugin_leak(void)
{
	volatile char room[ROOM] = {};

	(void)room[0];
	for (int i = 0; i < 17; i++)
		keep(malloc(59));
}
