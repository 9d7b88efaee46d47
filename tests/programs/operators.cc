// Every form of operator new and of operator delete, called by name.
extern "C" {
#include "program.h"
}

#include <new>

enum { FREED = 59 };

// Defines leak_NAME, which loses `count` blocks, and churn_NAME, which frees FREED of them with `release`.
#define KIND(name, count, expression, release)      \
	SITE static void leak_##name()              \
	{                                           \
		for (int i = 0; i < (count); i++)   \
			keep(expression);           \
	}                                           \
	SITE static void churn_##name()             \
	{                                           \
		for (int i = 0; i < FREED; i++) {   \
			void *p = keep(expression); \
			release;                    \
		}                                   \
	}

static const std::align_val_t ALIGNED{ 128 };

KIND(plain, 101, ::operator new(17), ::operator delete(p))
KIND(array, 97, ::operator new[](19), ::operator delete[](p))
KIND(nothrow, 89, ::operator new(23, std::nothrow), ::operator delete(p, std::nothrow))
KIND(array_nothrow, 83, ::operator new[](29, std::nothrow), ::operator delete[](p, std::nothrow))
KIND(aligned, 79, ::operator new(31, ALIGNED), ::operator delete(p, ALIGNED))
KIND(array_aligned, 73, ::operator new[](37, ALIGNED), ::operator delete[](p, ALIGNED))
KIND(aligned_nothrow, 71, ::operator new(41, ALIGNED, std::nothrow), ::operator delete(p, ALIGNED, std::nothrow))
KIND(array_aligned_nothrow, 67, ::operator new[](43, ALIGNED, std::nothrow),
     ::operator delete[](p, ALIGNED, std::nothrow))
KIND(sized, 61, ::operator new(47), ::operator delete(p, 47))
KIND(array_sized, 53, ::operator new[](51), ::operator delete[](p, 51))
KIND(sized_aligned, 47, ::operator new(57, ALIGNED), ::operator delete(p, 57, ALIGNED))
KIND(array_sized_aligned, 43, ::operator new[](61, ALIGNED), ::operator delete[](p, 61, ALIGNED))

#define RUN(name)      \
	leak_##name(); \
	churn_##name()

static void work()
{
	RUN(plain);
	RUN(array);
	RUN(nothrow);
	RUN(array_nothrow);
	RUN(aligned);
	RUN(array_aligned);
	RUN(aligned_nothrow);
	RUN(array_aligned_nothrow);
	RUN(sized);
	RUN(array_sized);
	RUN(sized_aligned);
	RUN(array_sized_aligned);
}

MAIN(work)
