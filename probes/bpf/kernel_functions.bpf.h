/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Functions of the kernel as a way in: where it has no tracepoint, and for what no tracepoint tells (blocks that are handed
 * to RCU to be freed later, or freed many at a time).
 *
 * kprobes: one program for all entries and one for all returns; the address says which function it is, and the place of
 * the return address which call. fentry and fexit: a copy of the program for each function, see fixed_function_of.
 */
#ifndef KERNEL_FUNCTIONS_BPF_H
#define KERNEL_FUNCTIONS_BPF_H

#include "kernel_track.bpf.h"

/* The function of this copy of the fentry and fexit programs. */
const volatile struct memleak_kernel_function this_function = {};

/* Functions by the addresses at which probes on them may be hit. Written by the collector before it attaches. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, KERNEL_FUNCTIONS * 4);
	__type(key, u64);
	__type(value, struct memleak_kernel_function);
} kernel_functions SEC(".maps");

/* Calls under way. Full: COUNTER_THREADS_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, struct memleak_kernel_pending);
} kernel_pending SEC(".maps");

/* Arguments of a function at its entry. */
struct memleak_arguments {
	u64 at[6];
};

static __always_inline void read_arguments(struct pt_regs *ctx, struct memleak_arguments *out)
{
	u64 value;

	/* Through barriers: clang would otherwise load from a computed place, which the verifier does not allow. */
	value = PT_REGS_PARM1(ctx);
	barrier_var(value);
	out->at[0] = value;
	value = PT_REGS_PARM2(ctx);
	barrier_var(value);
	out->at[1] = value;
	value = PT_REGS_PARM3(ctx);
	barrier_var(value);
	out->at[2] = value;
	value = PT_REGS_PARM4(ctx);
	barrier_var(value);
	out->at[3] = value;
	value = PT_REGS_PARM5(ctx);
	barrier_var(value);
	out->at[4] = value;
	value = PT_REGS_PARM6(ctx);
	barrier_var(value);
	out->at[5] = value;
}

/* Argument n; 5.10 reads no stack at a computed place. */
static __always_inline u64 register_argument(const struct memleak_arguments *arguments, u8 n)
{
	u64 value = 0;
	u32 i;

#pragma unroll
	for (i = 0; i < 6; i++) {
		u64 candidate = arguments->at[i];

		barrier_var(candidate);
		if (n == i)
			value = candidate;
	}
	return value;
}

/* Blocks are freed: one, several, or one whose head is known. */
static __always_inline void free_blocks(u32 role, u32 domain, u32 name, u64 block, u64 size, u64 count_of)
{
	u32 known = 0, i;

	count(0, COUNTER_HITS);
	if (role == KERNEL_ROLE_FREE) {
		kernel_free(domain, block, name);
	} else if (role == KERNEL_ROLE_FREE_AT) {
		kernel_free(domain, block ? block - size : size, name);
	} else {
		for (i = 0; i < KERNEL_BULK; i++) {
			u64 address = 0;

			if (i >= count_of)
				break;
			if (bpf_probe_read_kernel(&address, sizeof(address), (void *)(block + i * sizeof(u64))))
				count(0, COUNTER_POINTERS_UNREADABLE);
			else
				known |= kernel_free(domain, address, name);
		}
		/* The rest goes the same way as these, most likely: of no interest when none of them was recorded. */
		if (count_of > KERNEL_BULK && known)
			count(0, COUNTER_PARTIAL_RANGES);
	}
}

SEC("kprobe")
int kp_enter(struct pt_regs *ctx)
{
	u64 ip = PT_REGS_IP(ctx), sp = PT_REGS_SP(ctx);
	struct memleak_kernel_pending pending = {};
	struct memleak_kernel_function *function;
	struct memleak_kernel_call call = {};
	struct memleak_actor actor = {};
	struct memleak_arguments arguments;

	function = bpf_map_lookup_elem(&kernel_functions, &ip);
	if (!function)
		return 0;
	read_arguments(ctx, &arguments);
	count(0, COUNTER_HITS);
	call.size = register_argument(&arguments, function->size);
	call.cache = register_argument(&arguments, function->cache);
	call.gfp = (u32)register_argument(&arguments, function->gfp);
	call.probe_set = function->probe_set;
	call.name = function->name;
	call.domain = function->domain;
	if (call.domain == 2)
		call.size *= cpus;
	if (bpf_probe_read_kernel(&call.caller, sizeof(call.caller), (void *)sp))
		call.caller = 0;
	/* A probed function passes the block on, which counts there: kmalloc_order below __kmalloc, up to 5.19. */
	if (!call.domain && is_inner(call.caller, 0))
		return 0;
	actor.domain = call.domain;
	pending.stack = prepare(ctx, &actor, &call);
	pending.size = call.size;
	pending.probe_set = call.probe_set;
	pending.name = call.name;
	pending.domain = call.domain;
	/* Nobody has seen the call return that was here before. */
	if (bpf_map_lookup_elem(&kernel_pending, &sp))
		count(0, COUNTER_MISSED_RETURNS);
	if (bpf_map_update_elem(&kernel_pending, &sp, &pending, BPF_ANY))
		count(0, COUNTER_THREADS_FULL);
	return 0;
}

SEC("kprobe")
int kp_free(struct pt_regs *ctx)
{
	u64 ip = PT_REGS_IP(ctx);
	struct memleak_kernel_function *function;
	struct memleak_arguments arguments;

	function = bpf_map_lookup_elem(&kernel_functions, &ip);
	if (!function)
		return 0;
	read_arguments(ctx, &arguments);
	free_blocks(function->role, function->domain, function->name, register_argument(&arguments, function->block),
		    register_argument(&arguments, function->size), register_argument(&arguments, function->count));
	return 0;
}

SEC("kretprobe")
int kp_return(struct pt_regs *ctx)
{
	/* `ret` has popped the return address. */
	u64 sp = PT_REGS_SP(ctx) - sizeof(u64), block = PT_REGS_RC(ctx);
	struct memleak_kernel_pending *found, pending;
	struct memleak_actor actor = {};

	count(0, COUNTER_HITS);
	found = bpf_map_lookup_elem(&kernel_pending, &sp);
	if (!found)
		return 0;
	pending = *found;
	bpf_map_delete_elem(&kernel_pending, &sp);
	if (!is_block(block))
		return 0;
	actor.domain = pending.domain;
	actor.pid_tgid = actor_id();
	commit(&actor, block, pending.size, pending.stack, pending.probe_set, pending.name);
	return 0;
}

static __always_inline u64 traced_argument(void *ctx, u8 n)
{
	u64 value = 0;

	if (n != KERNEL_NO_ARGUMENT)
		bpf_get_func_arg(ctx, n, &value);
	return value;
}

SEC("fentry")
int fn_enter(void *ctx)
{
	unsigned long flags;

	hold_cpu(&flags);
	free_blocks(this_function.role, this_function.domain, this_function.name,
		    traced_argument(ctx, this_function.block), traced_argument(ctx, this_function.size),
		    traced_argument(ctx, this_function.count));
	release_cpu(&flags);
	return 0;
}

SEC("fexit")
int fn_return(void *ctx)
{
	struct memleak_kernel_call call = {
		.size = traced_argument(ctx, this_function.size),
		.cache = traced_argument(ctx, this_function.cache),
		.gfp = (u32)traced_argument(ctx, this_function.gfp),
		.probe_set = this_function.probe_set,
		.name = this_function.name,
		.domain = this_function.domain,
	};

	if (call.domain == 2)
		call.size *= cpus;
	if (!bpf_get_func_ret(ctx, &call.address))
		held_alloc(ctx, &call);
	return 0;
}

#endif
