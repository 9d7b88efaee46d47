/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What happens when the kernel allocates or frees: whether it is recorded, its call stack, its books. Knows nothing of how
 * the call was caught; the books themselves are those of track.bpf.h.
 */
#ifndef KERNEL_TRACK_BPF_H
#define KERNEL_TRACK_BPF_H

#include "track.bpf.h"
#include "compat.bpf.h"
#include <bpf/bpf_core_read.h>

/* Settings, written before load. */
const volatile u32 own_tgid = 0; /* the collector, whose own allocations are not recorded */
const volatile u32 only_tgids[KERNEL_TGIDS] = {}; /* record allocations of these processes only; 0 ends the list */
const volatile u64 only_cgroup = 0; /* record allocations in this cgroup and below it only; its id */
const volatile u32 only_cgroup_level = 0; /* how deep that cgroup lies */
const volatile u64 only_gfp = 0; /* record allocations with all of these flags only */
const volatile u64 page_bytes = 4096;
const volatile u64 cpus = 1; /* how often per-CPU memory exists */
const volatile int movable_type = -1; /* migrate type of pages that are not recorded: those of programs and files */
const volatile struct memleak_kernel_range inner[KERNEL_INNER] = {}; /* code whose allocations below count elsewhere */
const volatile u32 inner_count = 0;
const volatile bool can_hold_cpu = false; /* see hold_cpu() */

/* What a program needs in the middle of something. */
struct memleak_kernel_level {
	u64 users; /* 1: taken */
	struct memleak_stack stack;
	struct memleak_kernel_origin origin;
};

/* Per CPU; a level for each program that others have interrupted. */
struct memleak_kernel_cpu {
	u64 until_sample; /* as in struct memleak_thread */
	u64 zero; /* what the verifier does not know */
	struct memleak_kernel_level levels[KERNEL_LEVELS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct memleak_kernel_cpu);
} kernel_cpus SEC(".maps");

/* What is known of a site beside its stack; taken out by the collector once per site. Full: shown as unknown. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct memleak_site_key);
	__type(value, struct memleak_kernel_origin);
} origins SEC(".maps");

/*
 * While a program runs, the kernel keeps from it what happens on its CPU; a preempted one would miss all that other tasks do
 * until it goes on (tracepoints since Linux 7.0, and trampolines, leave preemption on). So each keeps its CPU to itself.
 */
static __always_inline void hold_cpu(unsigned long *flags)
{
	if (can_hold_cpu)
		bpf_local_irq_save(flags);
}

static __always_inline void release_cpu(unsigned long *flags)
{
	if (can_hold_cpu)
		bpf_local_irq_restore(flags);
}

/*
 * A level that nobody uses, to be given back; NULL when there is none. Programs need not end in the opposite order of their
 * beginning: where they cannot hold their CPU, tracepoints (since Linux 7.0) and trampolines leave preemption on. Whoever adds first has the level; of two that
 * add at once neither has it, and both look further.
 */
static __always_inline struct memleak_kernel_level *take_level(struct memleak_kernel_cpu *cpu)
{
	struct memleak_kernel_level *level;
	u32 got = KERNEL_LEVELS, i;

#pragma unroll
	for (i = 0; i < KERNEL_LEVELS; i++) {
		__sync_fetch_and_add(&cpu->levels[i].users, 1);
		if (*(volatile u64 *)&cpu->levels[i].users == 1) {
			got = i;
			break;
		}
		take_off((__s64 *)&cpu->levels[i].users, 1);
	}
	/* The verifier would go through everything that follows once for each level. */
	got += (u32)cpu->zero;
	barrier_var(got);
	if (got >= KERNEL_LEVELS)
		return 0;
	level = &cpu->levels[got];
	barrier_var(level);
	return level;
}

static __always_inline bool is_wanted(const struct memleak_kernel_call *call)
{
	u32 tgid = current_pid_tgid() >> 32;
	u32 i;

	if (tgid == own_tgid || (call->gfp & only_gfp) != only_gfp || call->size < min_size)
		return false;
	if (only_cgroup && bpf_get_current_ancestor_cgroup_id(only_cgroup_level) != only_cgroup)
		return false;
	if (!only_tgids[0])
		return true;
	for (i = 0; i < KERNEL_TGIDS; i++) {
		if (only_tgids[i] && only_tgids[i] == tgid)
			return true;
	}
	return false;
}

/* As is_recorded() in userspace_alloc.bpf.c, with the bytes of a CPU instead of those of a thread. */
static __always_inline bool is_sampled(struct memleak_kernel_cpu *cpu, u64 size)
{
	if (!sample_bytes)
		return true;
	if (!size)
		size = 1;
	if (!cpu->until_sample)
		cpu->until_sample = sample_distance(bpf_get_prandom_u32()) + 1;
	if (cpu->until_sample > size) {
		cpu->until_sample -= size;
		return false;
	}
	cpu->until_sample = 0;
	return true;
}

/*
 * True for code of an allocator that takes what it hands out from another one: the block is counted there. A global function:
 * the verifier of 5.10 gives up on a loop in a loop of so many rounds.
 */
__noinline int is_inner(u64 address, u32 domain)
{
	u32 i;

	for (i = 0; i < KERNEL_INNER; i++) {
		if (i >= inner_count)
			break;
		if (inner[i].domain == domain && address >= inner[i].start && address < inner[i].end)
			return true;
	}
	return false;
}

/*
 * The stack from the caller on. What lies above it is this program and what led to it, up to the frame that returns to
 * `caller`; without one, the collector cuts off what it knows to be the tracer's or the allocator's.
 */
static __always_inline void kernel_walk(void *ctx, struct memleak_stack *stack, u64 caller)
{
	u32 bytes = max_frames * sizeof(u64);
	long got;
	u32 i;

	if (bytes > MEMLEAK_MAX_FRAMES * sizeof(u64))
		bytes = MEMLEAK_MAX_FRAMES * sizeof(u64);
	stack->start = 0;
	stack->count = 0;
	stack->end = STACK_UNREADABLE;
	got = bpf_get_stack(ctx, stack->addresses, bytes, 0);
	if (got < 8)
		return;
	stack->count = (u32)got / 8;
	stack->end = stack->count >= max_frames ? STACK_CUT : STACK_COMPLETE;
	for (i = 0; i < KERNEL_TRACER_FRAMES; i++) {
		if (i >= stack->count)
			break;
		if (caller && stack->addresses[i] == caller) {
			stack->start = i;
			stack->count -= i;
			break;
		}
	}
}

/* Hash of a stack and of what it allocates from; 0 when the block is counted elsewhere. */
static __always_inline u64 kernel_hash(const struct memleak_stack *stack, const struct memleak_kernel_call *call)
{
	u32 domain = call->domain;
	u64 hash = hash_seed ^ ((u64)call->name + 1) * 0x9e3779b97f4a7c15ULL;
	u32 i;

	hash = (hash ^ call->cache) * 0xff51afd7ed558ccdULL;
	hash = (hash ^ call->object_bytes) * 0xff51afd7ed558ccdULL;
	hash = (hash ^ call->gfp) * 0xff51afd7ed558ccdULL;
	for (i = 0; i < MEMLEAK_MAX_FRAMES; i++) {
		u32 at = stack->start + i;
		u64 address;

		if (i >= stack->count)
			break;
		barrier_var(at);
		at &= MEMLEAK_MAX_FRAMES;
		address = stack->addresses[at];
		if (domain && i < KERNEL_INNER_FRAMES && is_inner(address, domain))
			return 0;
		hash = (hash ^ address) * 0xff51afd7ed558ccdULL;
		hash ^= hash >> 32;
	}
	return hash ? hash : 1;
}

/* Writes down what is known of a new site. */
static __always_inline void note_origin(struct memleak_kernel_origin *origin, const struct memleak_site_key *key,
					const struct memleak_kernel_call *call)
{
	const struct kmem_cache *cache = (const void *)call->cache;
	u64 pid_tgid = current_pid_tgid();
	const char *name = 0;

	origin->object_bytes = call->object_bytes;
	origin->gfp = call->gfp;
	origin->pid = pid_tgid >> 32;
	origin->tid = pid_tgid;
	origin->cgroup = bpf_get_current_cgroup_id();
	origin->order = call->order;
	origin->migrate_type = call->migrate_type;
	bpf_get_current_comm(origin->comm, sizeof(origin->comm));
	origin->cache[0] = 0;
	if (cache)
		name = BPF_CORE_READ(cache, name);
	if (name)
		bpf_probe_read_kernel_str(origin->cache, sizeof(origin->cache), name);
	bpf_map_update_elem(&origins, key, origin, BPF_NOEXIST);
}

/*
 * What kmalloc hands out for a request: a power of two, except for two caches in between. Without a loop, whose rounds the
 * verifier would follow one by one.
 */
static __always_inline u64 kmalloc_bytes(u64 size)
{
	u64 bits = size - 1;

	if (size > 64 && size <= 96)
		return 96;
	if (size > 128 && size <= 192)
		return 192;
	if (size <= 8)
		return 8;
	bits |= bits >> 1;
	bits |= bits >> 2;
	bits |= bits >> 4;
	bits |= bits >> 8;
	bits |= bits >> 16;
	bits |= bits >> 32;
	return bits + 1;
}

/*
 * Makes sure that the site of an allocation exists, and returns its stack's hash; 0 when the allocation is not recorded.
 */
static __always_inline u64 prepare_at(void *ctx, struct memleak_actor *actor, struct memleak_kernel_level *level,
				      struct memleak_kernel_call *call)
{
	struct memleak_site_key key = { .probe_set = call->probe_set };
	const struct kmem_cache *cache = (const void *)call->cache;
	struct memleak_stack *stack = &level->stack;

	if (cache && !call->object_bytes)
		call->object_bytes = BPF_CORE_READ(cache, size);
	/* Functions do not tell. */
	if (!call->object_bytes)
		call->object_bytes = call->domain ? call->size : kmalloc_bytes(call->size);
	stack->name = call->name;
	kernel_walk(ctx, stack, call->caller);
	if (!stack->count)
		count(0, COUNTER_STACKS_FAILED);
	key.stack = kernel_hash(stack, call);
	if (!key.stack || bpf_map_lookup_elem(&sites, &key))
		return key.stack;
	note_origin(&level->origin, &key, call);
	return site_of(actor, &key, stack) ? key.stack : 0;
}

/* As prepare_at(), for an allocation that the filters and the sampler let through; 0 for others. */
static __always_inline u64 prepare(void *ctx, struct memleak_actor *actor, struct memleak_kernel_call *call)
{
	const struct kmem_cache *cache = (const void *)call->cache;
	struct memleak_kernel_level *level;
	struct memleak_kernel_cpu *cpu;
	u32 zero = 0;
	u64 hash;

	cpu = bpf_map_lookup_elem(&kernel_cpus, &zero);
	if (!cpu)
		return 0;
	if (cache && !call->size)
		call->size = BPF_CORE_READ(cache, object_size);
	if (!is_wanted(call))
		return 0;
	count_allocation(0, call->size);
	if (!is_sampled(cpu, call->size))
		return 0;
	level = take_level(cpu);
	if (!level) {
		count(0, COUNTER_THREADS_FULL);
		return 0;
	}
	hash = prepare_at(ctx, actor, level, call);
	take_off((__s64 *)&level->users, 1);
	return hash;
}

/* A block has been handed out, at the site with that hash, or not recorded. */
static __always_inline void commit(struct memleak_actor *actor, u64 address, u64 size, u64 hash, u32 probe_set,
				   u32 name)
{
	struct memleak_function function = { .probe_set = probe_set, .name = name };
	struct memleak_block_key key = { .address = address, .domain = actor->domain };
	struct memleak_site_key site_key = { .stack = hash, .probe_set = probe_set };
	struct memleak_site *site;
	u64 now;

	/* Whatever was recorded there is gone, though nobody saw it being freed. */
	if (bpf_map_lookup_elem(&blocks, &key))
		end_missed(actor, address, bpf_ktime_get_ns());
	if (!hash)
		return;
	now = bpf_ktime_get_ns();
	site = bpf_map_lookup_elem(&sites, &site_key);
	if (site)
		book_alloc(actor, &function, address, size, hash, site, now);
	else
		count(0, COUNTER_SITES_FULL);
}

/* Who allocates or frees; only a trace tells of each. */
static __always_inline u64 actor_id(void)
{
	return trace_events ? current_pid_tgid() : 0;
}

/* NULL, or ZERO_SIZE_PTR: no memory. Errors in place of pointers are none either. */
static __always_inline bool is_block(u64 address)
{
	return address > 16 && address < -4095ULL;
}

/* The kernel has handed out a block. */
static __always_inline void kernel_alloc(void *ctx, struct memleak_kernel_call *call)
{
	struct memleak_actor actor = { .domain = call->domain, .pid_tgid = actor_id() };
	u64 hash;

	/* Every run has its price, whatever comes of it. */
	count(0, COUNTER_HITS);
	if (!is_block(call->address))
		return;
	hash = prepare(ctx, &actor, call);
	commit(&actor, call->address, call->size, hash, call->probe_set, call->name);
}

static __always_inline void held_alloc(void *ctx, struct memleak_kernel_call *call)
{
	unsigned long flags;

	hold_cpu(&flags);
	kernel_alloc(ctx, call);
	release_cpu(&flags);
}

/*
 * The kernel has taken a block back; true when it was in the table. A global function: the verifier looks at it once, and
 * not at each of many calls.
 */
__noinline int kernel_free(u32 domain, u64 address, u32 name)
{
	struct memleak_function function = { .name = name };
	struct memleak_actor actor = { .domain = domain, .pid_tgid = actor_id() };

	if (!is_block(address))
		return 0;
	return track_free(&actor, &function, address, 0, 0);
}

#endif
