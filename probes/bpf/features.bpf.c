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

SEC("uprobe.session")
int feature_session(struct pt_regs *ctx)
{
	if (session_is_return(ctx)) {
		__sync_fetch_and_add(&returns, 1);
		return 0;
	}
	cookie = bpf_get_attach_cookie(ctx);
	__sync_fetch_and_add(&entries, 1);
	return 0;
}

SEC("uprobe.multi")
int feature_multi_enter(struct pt_regs *ctx)
{
	cookie = bpf_get_attach_cookie(ctx);
	__sync_fetch_and_add(&entries, 1);
	return 0;
}

SEC("uretprobe.multi")
int feature_multi_return(struct pt_regs *ctx)
{
	__sync_fetch_and_add(&returns, 1);
	return 0;
}

SEC("uprobe")
int feature_perf_cookie(struct pt_regs *ctx)
{
	cookie = bpf_get_attach_cookie(ctx);
	__sync_fetch_and_add(&entries, 1);
	return 0;
}

SEC("uprobe")
int feature_perf_enter(struct pt_regs *ctx)
{
	__sync_fetch_and_add(&entries, 1);
	return 0;
}

SEC("uretprobe")
int feature_perf_return(struct pt_regs *ctx)
{
	__sync_fetch_and_add(&returns, 1);
	return 0;
}
