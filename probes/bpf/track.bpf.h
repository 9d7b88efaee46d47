/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The books: what happens to blocks, sites and stacks when memory is allocated and freed. Knows nothing of how the
 * calls were caught; userspace_alloc.bpf.c calls it, and so will every other object that counts blocks.
 *
 * Two rules keep the counters from drifting. A block is taken off its site exactly once: by whoever succeeds in
 * deleting its entry. An entry is copied before it is deleted: afterwards its memory belongs to somebody else.
 */
#ifndef TRACK_BPF_H
#define TRACK_BPF_H

#include "maps.bpf.h"

/* Who allocates or frees. */
struct memleak_actor {
	u64 pid_tgid;
	u32 instance;
	u32 slot;
	u32 domain;
	const struct memleak_target *target;
};

/* The low `bits` of a word. */
#define LOW(word, bits) ((word) & ((1ULL << (bits)) - 1))

static __always_inline u64 block_size(const struct memleak_block *block)
{
	return LOW(block->size_cohort, BLOCK_SIZE_BITS);
}

static __always_inline void set_block_size(struct memleak_block *block, u64 size)
{
	if (size >> BLOCK_SIZE_BITS)
		size = LOW(~0ULL, BLOCK_SIZE_BITS);
	block->size_cohort = (block->size_cohort & ~LOW(~0ULL, BLOCK_SIZE_BITS)) | size;
}

static __always_inline u32 block_cohort(const struct memleak_block *block)
{
	return LOW(block->size_cohort >> BLOCK_SIZE_BITS, BLOCK_COHORT_BITS);
}

static __always_inline u32 block_probe_set(const struct memleak_block *block)
{
	return block->birth_set >> BLOCK_BIRTH_BITS;
}

/* Age in nanoseconds, good to 2^BLOCK_BIRTH_SHIFT. */
static __always_inline u64 block_age(const struct memleak_block *block, u64 now)
{
	u64 birth = LOW(block->birth_set, BLOCK_BIRTH_BITS) << BLOCK_BIRTH_SHIFT;

	return now > birth ? now - birth : 0;
}

static __always_inline struct memleak_block new_block(u64 stack, u32 probe_set, u64 size, u64 now)
{
	struct memleak_block block = {
		.stack = stack,
		.size_cohort = LOW((u64)cohort_now, BLOCK_COHORT_BITS) << BLOCK_SIZE_BITS,
		.birth_set = (u64)probe_set << BLOCK_BIRTH_BITS | LOW(now >> BLOCK_BIRTH_SHIFT, BLOCK_BIRTH_BITS),
	};

	set_block_size(&block, size);
	return block;
}

static __always_inline u32 lifetime_class(u64 ns)
{
	u64 us = ns / 1000;
	u32 class = 0;

	if (us >= 1ULL << (MEMLEAK_LIFETIME_CLASSES - 2))
		return MEMLEAK_LIFETIME_CLASSES - 1;
	if (us >> 16) {
		us >>= 16;
		class += 16;
	}
	if (us >> 8) {
		us >>= 8;
		class += 8;
	}
	if (us >> 4) {
		us >>= 4;
		class += 4;
	}
	if (us >> 2) {
		us >>= 2;
		class += 2;
	}
	if (us >> 1) {
		us >>= 1;
		class += 1;
	}
	return class + (u32)us;
}

static __always_inline void emit(struct memleak_actor *actor, enum memleak_event_kind kind, u64 address, u64 size,
				 u64 now, u64 lifetime, u64 stack, u32 probe_set, u32 name)
{
	struct memleak_event *e;

	if (!trace_events)
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(actor->slot, COUNTER_EVENTS_DROPPED);
		return;
	}
	e->time_ns = now;
	e->address = address;
	e->size = size;
	e->lifetime_ns = lifetime;
	e->stack = stack;
	e->kind = kind;
	e->instance = actor->instance;
	e->probe_set = probe_set;
	e->name = name;
	e->pid = actor->pid_tgid >> 32;
	e->tid = actor->pid_tgid;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	bpf_ringbuf_submit(e, 0);
}

/*
 * Atomic subtraction. Hidden from clang, which would make a fetching one of it: Linux 5.10 knows none. (For the same
 * reason nothing here may add a constant 0: that becomes an atomic "or".)
 */
static __always_inline void take_off(__s64 *from, u64 n)
{
	u64 less = -n;

	barrier_var(less);
	__sync_fetch_and_add(from, less);
}

/*
 * Takes `bytes` of a block that is no longer in `blocks` off its site; `whole` also ends the block itself. Pages cut
 * off the front of a mapping leave the rest of the block alive.
 */
static __always_inline void settle(const struct memleak_block *block, u32 instance, u64 now, u64 bytes, bool whole)
{
	struct memleak_site_key key = {
		.stack = block->stack,
		.instance = instance,
		.probe_set = block_probe_set(block),
	};
	struct memleak_site *site = bpf_map_lookup_elem(&sites, &key);
	u32 cohort = block_cohort(block);
	u32 slot = cohort % MEMLEAK_COHORTS;
	bool recent = LOW(cohort_now - cohort, BLOCK_COHORT_BITS) < MEMLEAK_COHORTS - 1;

	if (!site)
		return;
	__sync_fetch_and_add(&site->freed_bytes, bytes);
	if (recent)
		take_off(&site->cohorts[slot].bytes, bytes);
	else
		__sync_fetch_and_add(&site->older_freed_bytes, bytes);
	if (whole) {
		u32 class = lifetime_class(block_age(block, now));

		__sync_fetch_and_add(&site->freed_count, 1);
		if (recent)
			take_off(&site->cohorts[slot].count, 1);
		else
			__sync_fetch_and_add(&site->older_freed_count, 1);
		if (class < MEMLEAK_LIFETIME_CLASSES)
			__sync_fetch_and_add(&site->lifetimes[class], 1);
	}
}

/* Removes the block at `address`, copying it out. Its site still counts it: settle() or put_back() must follow. */
static __always_inline bool take(struct memleak_actor *actor, u64 address, struct memleak_block *out)
{
	struct memleak_block_key key = { .address = address, .instance = actor->instance, .domain = actor->domain };
	struct memleak_block *block = bpf_map_lookup_elem(&blocks, &key);

	if (!block)
		return false;
	*out = *block;
	return bpf_map_delete_elem(&blocks, &key) == 0;
}

/* Puts a block that was taken back where it was. */
static __always_inline void put_back(struct memleak_actor *actor, u64 address, const struct memleak_block *block,
				     u64 now)
{
	struct memleak_block_key key = { .address = address, .instance = actor->instance, .domain = actor->domain };

	if (bpf_map_update_elem(&blocks, &key, block, BPF_ANY)) {
		count(actor->slot, COUNTER_OUTSTANDING_FULL);
		settle(block, actor->instance, now, block_size(block), true);
	}
}

/* Whether code may lie at an address. */
static __always_inline bool is_code(const struct memleak_target *target, u64 address)
{
	u32 i;

	if (!target->code[0].end)
		return true;
#pragma unroll
	for (i = 0; i < MEMLEAK_CODE_RANGES; i++)
		if (address >= target->code[i].start && address < target->code[i].end)
			return true;
	return false;
}

/*
 * Hash of a stack and of the function that was called. Cuts the stack off where it leaves the program's code: without
 * frame pointers the walk follows whatever is in the register, and each stray value would make a site of its own.
 */
static __always_inline u64 hash_stack(const struct memleak_target *target, struct memleak_stack *stack)
{
	u64 hash = hash_seed ^ ((u64)stack->name + 1) * 0x9e3779b97f4a7c15ULL;
	u32 i;

	for (i = 0; i < MEMLEAK_MAX_FRAMES; i++) {
		u32 at = stack->start + i;

		if (i >= stack->count)
			break;
		/* The mask bounds the index for the verifier; the barrier keeps clang from turning it into a pointer walk. */
		barrier_var(at);
		at &= MEMLEAK_MAX_FRAMES;
		if (i && !is_code(target, stack->addresses[at])) {
			stack->count = i;
			stack->end = STACK_STRAYED;
			break;
		}
		hash = (hash ^ stack->addresses[at]) * 0xff51afd7ed558ccdULL;
		hash ^= hash >> 32;
	}
	return hash;
}

/*
 * The site's totals; makes the site, and before it its stack, when it is new. NULL (and counted) when there is no
 * room.
 */
static __always_inline struct memleak_site *site_of(struct memleak_actor *actor, struct memleak_site_key *key,
						    const struct memleak_stack *stack)
{
	struct memleak_site *site = bpf_map_lookup_elem(&sites, key);

	if (site)
		return site;
	/* Another thread may make the same site at the same time: whoever comes second finds it. */
	if (!bpf_map_lookup_elem(&stacks, key) && bpf_map_update_elem(&stacks, key, stack, BPF_NOEXIST) &&
	    !bpf_map_lookup_elem(&stacks, key))
		count(actor->slot, COUNTER_STACKS_FULL);
	bpf_map_update_elem(&sites, key, &empty_site, BPF_NOEXIST);
	site = bpf_map_lookup_elem(&sites, key);
	if (!site)
		count(actor->slot, COUNTER_SITES_FULL);
	return site;
}

/* A block of `size` bytes at `address` has been handed out. */
static __always_inline void track_alloc(struct memleak_actor *actor, const struct memleak_function *function,
					u64 address, u64 size, u64 stack_hash, const struct memleak_stack *stack)
{
	struct memleak_block_key key = { .address = address, .instance = actor->instance, .domain = actor->domain };
	struct memleak_site_key site_key = { .stack = stack_hash,
					     .instance = actor->instance,
					     .probe_set = function->probe_set };
	u64 now = bpf_ktime_get_ns();
	struct memleak_block block = new_block(stack_hash, function->probe_set, size, now);
	struct memleak_block missed;
	struct memleak_site *site;
	u32 slot;

	/* The address is handed out again, so its last block is gone although nobody saw it being freed. */
	if (take(actor, address, &missed)) {
		count(actor->slot, COUNTER_IMPLICIT_FREES);
		settle(&missed, actor->instance, now, block_size(&missed), true);
		emit(actor, EVENT_IMPLICIT_FREE, address, block_size(&missed), now, block_age(&missed, now),
		     missed.stack, block_probe_set(&missed), 0);
	}
	site = site_of(actor, &site_key, stack);
	if (!site)
		return;
	if (bpf_map_update_elem(&blocks, &key, &block, BPF_ANY)) {
		count(actor->slot, COUNTER_OUTSTANDING_FULL);
		return;
	}
	size = block_size(&block);
	__sync_fetch_and_add(&site->allocated_bytes, size);
	__sync_fetch_and_add(&site->allocated_count, 1);
	slot = block_cohort(&block) % MEMLEAK_COHORTS;
	__sync_fetch_and_add(&site->cohorts[slot].bytes, size);
	__sync_fetch_and_add(&site->cohorts[slot].count, 1);
	site->last_allocation_ns = now;
	emit(actor, EVENT_ALLOC, address, size, now, 0, stack_hash, function->probe_set, function->name);
}

/* The block at `address` is given back. With FUNCTION_RANGE only `length` bytes from its start are. */
static __always_inline void track_free(struct memleak_actor *actor, const struct memleak_function *function,
				       u64 address, u64 length, u64 stack_hash)
{
	struct memleak_block block;
	u64 now;

	if (!take(actor, address, &block)) {
		count(actor->slot, COUNTER_UNMATCHED_FREES);
		return;
	}
	now = bpf_ktime_get_ns();
	if (function->flags & FUNCTION_RANGE) {
		/* The kernel unmaps whole pages. */
		u64 old_size = block_size(&block);
		u64 size = (old_size + 4095) & ~4095ULL;

		length = (length + 4095) & ~4095ULL;
		if (length > size)
			count(actor->slot, COUNTER_PARTIAL_RANGES);
		if (length < size) {
			set_block_size(&block, size - length);
			settle(&block, actor->instance, now, old_size - block_size(&block), false);
			put_back(actor, address + length, &block, now);
			return;
		}
	}
	settle(&block, actor->instance, now, block_size(&block), true);
	emit(actor, EVENT_FREE, address, block_size(&block), now, block_age(&block, now),
	     stack_hash ? stack_hash : block.stack, function->probe_set, function->name);
}

#endif
