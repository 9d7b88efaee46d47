/*
 * Keeps a block at every single instruction of a call into a library and back: stubs of procedure linkage tables, before and
 * after the linker has bound them, prologues, a leaf, epilogues. The processor stops at each by its trap flag.
 */
#include "program.h"

#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

/* Changes the processor's flags on top of the stack. */
#define SET_FLAGS(change)                                                         \
	__asm__ volatile("pushf\n.cfi_adjust_cfa_offset 8\n" change ", (%%rsp)\n" \
			 "popf\n.cfi_adjust_cfa_offset -8\n" ::                   \
			     : "memory", "cc")
#define TRAP_FLAG "0x100"
/* More than a small library has. */
#define NEARBY 0x4000

void steps_outer(size_t n);
extern char __executable_start, etext;

static unsigned long kept;
static uintptr_t library;

static int is_ours(uintptr_t ip)
{
	if (ip >= (uintptr_t)&__executable_start && ip < (uintptr_t)&etext)
		return 1;
	return ip > library - NEARBY && ip < library + NEARBY;
}

SITE void on_step(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)info;
	/* Not in the linker, which binds the functions meanwhile. */
	if (is_ours((uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP])) {
		keep(malloc(43));
		kept++;
	}
}

SITE static void be_stepped(void)
{
	for (size_t i = 0; i < 2; i++) {
		SET_FLAGS("orq $" TRAP_FLAG);
		steps_outer(i);
		SET_FLAGS("andq $~" TRAP_FLAG);
	}
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };

	/* Not its name, which the linker would have to bind now. */
	library = (uintptr_t)dlsym(RTLD_DEFAULT, "steps_outer");
	if (sigaction(SIGTRAP, &action, NULL))
		abort();
	say("ready");
	wait_for_line();
	be_stepped();
	say_number("done", kept);
	wait_for_end();
	return 0;
}
