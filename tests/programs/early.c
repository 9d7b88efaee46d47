/* Allocates before main() and right at its start, then ends: for launched commands, watched from the beginning. */
#include "program.h"

SITE __attribute__((constructor)) static void before_main(void)
{
	for (int i = 0; i < 3; i++)
		keep(malloc(71));
}

SITE static void first_thing(void)
{
	for (int i = 0; i < 5; i++)
		keep(malloc(73));
}

int main(int argc, char **argv)
{
	first_thing();
	/* The exit code proves that the arguments arrived unchanged. */
	return argc > 1 && strcmp(argv[1], "two words") == 0 ? 0 : 3;
}
