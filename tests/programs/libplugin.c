/* A library loaded while its program is being watched; it leaks through malloc. */
#include "program.h"

SITE void plugin_leak(void)
{
	for (int i = 0; i < 17; i++)
		keep(malloc(59));
}
