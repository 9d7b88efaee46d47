// C++ allocations: operator new rests on malloc, and must be counted once.
extern "C" {
#include "program.h"
}

struct Sized {
	char bytes[71];
};

SITE static void leak_new()
{
	for (int i = 0; i < 31; i++)
		keep(new Sized);
}

SITE static void leak_new_array()
{
	for (int i = 0; i < 29; i++)
		keep(new char[73]);
}

SITE static void churn_new()
{
	for (int i = 0; i < 23; i++) {
		Sized *p = new Sized;
		keep(p);
		delete p;
	}
}

static void work()
{
	leak_new();
	leak_new_array();
	churn_new();
}

MAIN(work)
