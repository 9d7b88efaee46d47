/* An allocator without an instruction that the kernel emulates: wherever a probe is put, it must be single-stepped. */
#include "program.h"

void *stepped_take(size_t size);
void stepped_give(void *block);

__asm__(".data\n"
	"cursor: .quad arena\n"
	".bss\n"
	"arena: .skip 65536\n"
	".text\n"
	".globl stepped_take\n"
	".type stepped_take, @function\n"
	"stepped_take:\n"
	"	mov cursor(%rip), %rax\n"
	"	add %rax, %rdi\n"
	"	mov %rdi, cursor(%rip)\n"
	"	ret\n"
	".size stepped_take, . - stepped_take\n"
	".globl stepped_give\n"
	".type stepped_give, @function\n"
	"stepped_give:\n"
	"	xor %eax, %eax\n"
	"	ret\n"
	".size stepped_give, . - stepped_give\n");

SITE static void lose_stepped(size_t size)
{
	keep(stepped_take(size));
}

SITE static void churn_stepped(size_t size)
{
	stepped_give(keep(stepped_take(size)));
}

static void work(void)
{
	int n;

	for (n = 0; n < 31; n++) {
		lose_stepped(79);
		churn_stepped(83);
	}
}

MAIN(work)
