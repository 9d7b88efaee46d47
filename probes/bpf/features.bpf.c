// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The least programs that show whether a way to attach works here: each is loaded alone and attached to a function
 * of our own, which is then called. Some kernels load a program of a kind that they cannot attach.
 */
#include "kernel_types.bpf.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "compat.bpf.h"

char LICENSE[] SEC("license") = "GPL";

volatile u64 entries = 0;
volatile u64 returns = 0;
volatile u64 cookie = 0;
/* Who made the last call, as the kernel numbers threads. */
volatile u64 caller = 0;

static __always_inline void note_entry(void)
{
	caller = bpf_get_current_pid_tgid();
	__sync_fetch_and_add(&entries, 1);
}

/*
 * Older kernels, such as 5.10, tell a return probe of the returns in other processes, too, when these are probed at the same
 * place: by another memleak that is starting.
 */
static __always_inline void note_return(void)
{
	if (bpf_get_current_pid_tgid() == caller)
		__sync_fetch_and_add(&returns, 1);
}

/* What the verifier is asked about: a global function that is called while interrupts are held off. */
__noinline int feature_global(int value)
{
	return value + 1;
}

SEC("raw_tp")
int feature_hold_cpu(void *ctx)
{
	unsigned long flags;
	int got;

	bpf_local_irq_save(&flags);
	got = feature_global(entries);
	bpf_local_irq_restore(&flags);
	return got;
}

SEC("uprobe.session")
int feature_session(struct pt_regs *ctx)
{
	if (session_is_return(ctx)) {
		note_return();
		return 0;
	}
	cookie = bpf_get_attach_cookie(ctx);
	note_entry();
	return 0;
}

SEC("uprobe.multi")
int feature_multi_enter(struct pt_regs *ctx)
{
	cookie = bpf_get_attach_cookie(ctx);
	note_entry();
	return 0;
}

SEC("uretprobe.multi")
int feature_multi_return(struct pt_regs *ctx)
{
	note_return();
	return 0;
}

SEC("uprobe")
int feature_perf_cookie(struct pt_regs *ctx)
{
	cookie = bpf_get_attach_cookie(ctx);
	note_entry();
	return 0;
}

SEC("uprobe")
int feature_perf_enter(struct pt_regs *ctx)
{
	note_entry();
	return 0;
}

SEC("uretprobe")
int feature_perf_return(struct pt_regs *ctx)
{
	note_return();
	return 0;
}
