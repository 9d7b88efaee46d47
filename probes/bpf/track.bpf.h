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
#include "sampler.h"

/* Who allocates or frees. */
struct memleak_actor {
	u64 pid_tgid;
	u32 instance;
	u32 slot;
	u32 domain;
	u32 hit; /* number of this hit, and when it began: see meter.bpf.h */
	u64 hit_ns; /* 0: not known */
	const struct memleak_target *target;
};

/* The time: that of the hit where it is known, for a call to the clock costs 20-40 ns. */
static __always_inline u64 time_of(const struct memleak_actor *actor)
{
	return actor->hit_ns ? actor->hit_ns : bpf_ktime_get_ns();
}

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

static __always_inline struct memleak_block new_block(const struct memleak_function *function, u64 stack, u64 size,
						      u64 now)
{
	bool sampled = sample_bytes && !(function->flags & FUNCTION_UNSAMPLED);
	struct memleak_block block = {
		.stack = stack,
		.size_cohort = (u64)sampled << BLOCK_SAMPLED_BIT | LOW((u64)cohort_now, BLOCK_COHORT_BITS)
								       << BLOCK_SIZE_BITS,
		.birth_set =
		    (u64)function->probe_set << BLOCK_BIRTH_BITS | LOW(now >> BLOCK_BIRTH_SHIFT, BLOCK_BIRTH_BITS),
	};

	set_block_size(&block, size);
	return block;
}

static __always_inline bool block_is_sampled(const struct memleak_block *block)
{
	return sample_bytes && block->size_cohort >> BLOCK_SAMPLED_BIT;
}

/* Global functions: the verifier looks at them once, and not at each of the many calls. */
__noinline u64 sample_weight(u64 size)
{
	return sampler_weight(size, sample_bytes);
}

__noinline u64 sample_distance(u32 random)
{
	return sampler_distance(random, sample_bytes);
}

/* What a block adds to the sums of its site and takes off them when it is freed. */
static __always_inline void share_of(const struct memleak_block *block, struct memleak_share *out)
{
	if (block_is_sampled(block)) {
		sampler_share(block_size(block), sample_bytes, sample_weight(block_size(block)), out);
		return;
	}
	out->bytes = block_size(block);
	out->count = sample_bytes ? 1 << SAMPLER_WEIGHT_BITS : 1;
	out->bytes_variance = 0;
	out->count_variance = 0;
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
	e->cgroup = bpf_get_current_cgroup_id();
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

/* Takes bytes, and blocks unless `count` is 0, of one generation off a site. */
static __always_inline void take_off_site(struct memleak_site *site, u32 cohort, u64 bytes, u64 count)
{
	u32 slot = cohort % MEMLEAK_COHORTS;
	bool recent = LOW(cohort_now - cohort, BLOCK_COHORT_BITS) < MEMLEAK_COHORTS - 1;

	__sync_fetch_and_add(&site->freed_bytes, bytes);
	if (recent)
		take_off(&site->cohorts[slot].bytes, bytes);
	else
		__sync_fetch_and_add(&site->older_freed_bytes, bytes);
	if (!count)
		return;
	__sync_fetch_and_add(&site->freed_count, count);
	if (recent)
		take_off(&site->cohorts[slot].count, count);
	else
		__sync_fetch_and_add(&site->older_freed_count, count);
}

static __always_inline struct memleak_site *site_of_block(const struct memleak_block *block, u32 instance)
{
	struct memleak_site_key key = {
		.stack = block->stack,
		.instance = instance,
		.probe_set = block_probe_set(block),
	};

	return bpf_map_lookup_elem(&sites, &key);
}

/* Takes a block that is no longer in `blocks` off its site, and returns for how many blocks it stood there. */
static __always_inline u64 settle(const struct memleak_block *block, u32 instance, u64 now)
{
	struct memleak_site *site = site_of_block(block, instance);
	u32 class = lifetime_class(block_age(block, now));
	struct memleak_share share;

	if (!site)
		return 0;
	share_of(block, &share);
	take_off_site(site, block_cohort(block), share.bytes, share.count);
	if (block_is_sampled(block)) {
		take_off((__s64 *)&site->bytes_variance, share.bytes_variance);
		take_off((__s64 *)&site->count_variance, share.count_variance);
	}
	if (class < MEMLEAK_LIFETIME_CLASSES)
		__sync_fetch_and_add(&site->lifetimes[class], share.count);
	return share.count;
}

/* Takes the first `bytes` of a block that is not sampled off its site; the rest of it stays alive. */
static __always_inline void settle_part(const struct memleak_block *block, u32 instance, u64 bytes)
{
	struct memleak_site *site = site_of_block(block, instance);

	if (site)
		take_off_site(site, block_cohort(block), bytes, 0);
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
		settle(block, actor->instance, now);
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
 * Hash of a stack and of the function that was called. Cuts a stack that was walked by frame pointers off where it leaves
 * the program's code: without them the walk follows whatever is in the register, and each stray value would make a site of
 * its own. (Unwind rows do not lead astray, and a library that has just been loaded may not be known as code yet.)
 */
struct memleak_hashing {
	const struct memleak_target *target;
	struct memleak_stack *stack;
	u64 hash;
	bool walked;
};

/* Takes frame `i` in; false when there is none. */
static __always_inline bool hash_frame(struct memleak_hashing *hashing, u32 i)
{
	struct memleak_stack *stack = hashing->stack;
	u32 at = stack->start + i;

	if (i >= stack->count)
		return false;
	/* The mask bounds the index for the verifier; the barrier keeps clang from turning it into a pointer walk. */
	barrier_var(at);
	at &= MEMLEAK_MAX_FRAMES;
	if (hashing->walked && i && !is_code(hashing->target, stack->addresses[at])) {
		stack->count = i;
		stack->end = STACK_STRAYED;
		return false;
	}
	hashing->hash = (hashing->hash ^ stack->addresses[at]) * 0xff51afd7ed558ccdULL;
	hashing->hash ^= hashing->hash >> 32;
	return true;
}

static long hash_turn(u32 i, struct memleak_hashing *hashing)
{
	return !hash_frame(hashing, i);
}

/* `loop`: the kernel has bpf_loop(), with which the verifier looks at one frame and not at all. */
static __always_inline u64 hash_stack(const struct memleak_target *target, struct memleak_stack *stack, bool walked,
				      bool loop)
{
	struct memleak_hashing hashing = {
		.target = target,
		.stack = stack,
		.hash = hash_seed ^ ((u64)stack->name + 1) * 0x9e3779b97f4a7c15ULL,
		.walked = walked,
	};
	u32 i;

	if (loop) {
		bpf_loop(MEMLEAK_MAX_FRAMES, hash_turn, &hashing, 0);
		return hashing.hash;
	}
	for (i = 0; i < MEMLEAK_MAX_FRAMES; i++)
		if (!hash_frame(&hashing, i))
			break;
	return hashing.hash;
}

/*
 * The site's totals; makes the site, and before it its stack, when it is new. NULL (and counted) when there is no
 * room.
 */
static __always_inline struct memleak_site *site_of(struct memleak_actor *actor, struct memleak_site_key *key,
						    struct memleak_stack *stack)
{
	struct memleak_site *site = bpf_map_lookup_elem(&sites, key);

	if (site)
		return site;
	stack->tid = actor->pid_tgid;
	bpf_get_current_comm(stack->comm, sizeof(stack->comm));
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

/* `address` is handed out again, so its last block, if there is one, is gone although nobody saw it being freed. */
static __always_inline void end_missed(struct memleak_actor *actor, u64 address, u64 now)
{
	struct memleak_block missed;
	struct memleak_site *site;
	u64 blocks_of;

	if (!take(actor, address, &missed))
		return;
	count(actor->slot, COUNTER_IMPLICIT_FREES);
	/* In the same measure as the frees of the site. */
	blocks_of = settle(&missed, actor->instance, now);
	site = site_of_block(&missed, actor->instance);
	if (site && blocks_of)
		__sync_fetch_and_add(&site->unseen_frees, blocks_of);
	emit(actor, EVENT_IMPLICIT_FREE, address, block_size(&missed), now, block_age(&missed, now), missed.stack,
	     block_probe_set(&missed), 0);
}

/* Puts a block into the table; false when there is no room. */
static __always_inline bool put_block(struct memleak_actor *actor, const struct memleak_block_key *key,
				      const struct memleak_block *block, u64 now)
{
	if (!bpf_map_update_elem(&blocks, key, block, BPF_NOEXIST))
		return true;
	end_missed(actor, key->address, now);
	return !bpf_map_update_elem(&blocks, key, block, BPF_ANY);
}

/* A block of `size` bytes at `address` has been handed out at a site. */
static __always_inline void book_alloc(struct memleak_actor *actor, const struct memleak_function *function,
				       u64 address, u64 size, u64 stack_hash, struct memleak_site *site, u64 now)
{
	struct memleak_block_key key = { .address = address, .instance = actor->instance, .domain = actor->domain };
	struct memleak_block block = new_block(function, stack_hash, size, now);
	struct memleak_share share;
	u32 slot;

	if (!put_block(actor, &key, &block, now)) {
		count(actor->slot, COUNTER_OUTSTANDING_FULL);
		return;
	}
	share_of(&block, &share);
	__sync_fetch_and_add(&site->allocated_bytes, share.bytes);
	__sync_fetch_and_add(&site->allocated_count, share.count);
	slot = block_cohort(&block) % MEMLEAK_COHORTS;
	__sync_fetch_and_add(&site->cohorts[slot].bytes, share.bytes);
	__sync_fetch_and_add(&site->cohorts[slot].count, share.count);
	if (block_is_sampled(&block)) {
		__sync_fetch_and_add(&site->bytes_variance, share.bytes_variance);
		__sync_fetch_and_add(&site->count_variance, share.count_variance);
	}
	site->last_allocation_ns = now;
	emit(actor, EVENT_ALLOC, address, block_size(&block), now, 0, stack_hash, function->probe_set, function->name);
}

/* A block of `size` bytes at `address` has been handed out. */
static __always_inline void track_alloc(struct memleak_actor *actor, const struct memleak_function *function,
					u64 address, u64 size, u64 stack_hash, struct memleak_stack *stack)
{
	struct memleak_site_key site_key = { .stack = stack_hash,
					     .instance = actor->instance,
					     .probe_set = function->probe_set };
	u64 now = time_of(actor);
	struct memleak_site *site;

	site = site_of(actor, &site_key, stack);
	if (site)
		book_alloc(actor, function, address, size, stack_hash, site, now);
	else
		end_missed(actor, address, now);
}

/*
 * The block at `address` is given back. With FUNCTION_RANGE only `length` bytes from its start are. True when it was in the
 * table.
 */
static __always_inline bool track_free(struct memleak_actor *actor, const struct memleak_function *function,
				       u64 address, u64 length, u64 stack_hash)
{
	struct memleak_block block;
	u64 now;

	if (!take(actor, address, &block)) {
		/* With sampling nothing follows from it: most blocks are not in the table. */
		if (!sample_bytes)
			count(actor->slot, COUNTER_UNMATCHED_FREES);
		return false;
	}
	now = time_of(actor);
	if (function->flags & FUNCTION_RANGE) {
		/* The kernel unmaps whole pages. */
		u64 old_size = block_size(&block);
		u64 size = (old_size + 4095) & ~4095ULL;

		length = (length + 4095) & ~4095ULL;
		/* A sampled block here means that a set without ranges shares their domain: it goes as a whole. */
		if (length > size || (length < size && block_is_sampled(&block)))
			count(actor->slot, COUNTER_PARTIAL_RANGES);
		if (length < size && !block_is_sampled(&block)) {
			settle_part(&block, actor->instance, old_size - (size - length));
			set_block_size(&block, size - length);
			put_back(actor, address + length, &block, now);
			return true;
		}
	}
	settle(&block, actor->instance, now);
	emit(actor, EVENT_FREE, address, block_size(&block), now, block_age(&block, now),
	     stack_hash ? stack_hash : block.stack, stack_hash ? function->probe_set : block_probe_set(&block),
	     function->name);
	return true;
}

#endif
