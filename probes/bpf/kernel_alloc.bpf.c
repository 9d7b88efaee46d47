// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Allocations of the kernel itself: slab, pages, per-CPU memory, vmalloc.
 *
 * Tracepoints are the cheapest way in and the least blind one: they tell the block, its size and the caller at once. Where
 * in a tracepoint's arguments these are differs between kernels, and the loader finds it in the type information (struct
 * memleak_kernel_layout). Programs here run wherever the kernel allocates, also in interrupts: all tables are allocated
 * beforehand, and what is kept per CPU knows how deep interrupts are nested. Oldest kernel intended: 5.10.
 *
 * Cost per event: about 0.1 us; 0.5 to 1.5 us more when an allocation is recorded, most of it for the stack.
 */
#include "track.bpf.h"
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "kernel_track.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* Keeps types that only the collector reads in this object's type information, from which its Rust twins are made. */
struct memleak_kept_types {
	enum memleak_kernel_probe probe;
	enum memleak_kernel_limits limits;
	enum memleak_kernel_role role;
} kept_types;

/* Number of the probe set that a tracepoint belongs to. */
const volatile u32 probe_sets[KERNEL_PROBES] = {};
/* Where each tracepoint has what. */
const volatile struct memleak_kernel_layout layouts[KERNEL_PROBES] = {};

/* In assembler: clang would make one load at a computed place of several, which the verifier does not allow. */
#define ARGUMENT(n)                                                                            \
	case n:                                                                                \
		asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"((n) * 8)); \
		break

/* Argument n of a raw tracepoint; n is known when the program is loaded, and only one case remains. */
static __always_inline u64 argument(const struct bpf_raw_tracepoint_args *ctx, u8 n)
{
	u64 value = 0;

	switch (n) {
		ARGUMENT(0);
		ARGUMENT(1);
		ARGUMENT(2);
		ARGUMENT(3);
		ARGUMENT(4);
		ARGUMENT(5);
		ARGUMENT(6);
		ARGUMENT(7);
		ARGUMENT(8);
		ARGUMENT(9);
		ARGUMENT(10);
	}
	return value;
}

static __always_inline u32 domain_of(enum memleak_kernel_probe probe)
{
	if (probe >= KERNEL_VMAP_ALLOC)
		return 3;
	if (probe >= KERNEL_PERCPU_ALLOC)
		return 2;
	return probe >= KERNEL_PAGE_ALLOC;
}

static __always_inline int on_tracepoint_alloc(struct bpf_raw_tracepoint_args *ctx, enum memleak_kernel_probe probe)
{
	const volatile struct memleak_kernel_layout *at = &layouts[probe];
	struct memleak_kernel_call call = {
		.probe_set = probe_sets[probe],
		.name = probe,
		.domain = domain_of(probe),
		.address = argument(ctx, at->block),
		.size = argument(ctx, at->size),
		.object_bytes = argument(ctx, at->object),
		.cache = argument(ctx, at->cache),
		.gfp = (u32)argument(ctx, at->gfp),
		.caller = argument(ctx, at->caller),
	};

	held_alloc(ctx, &call);
	return 0;
}

static __always_inline int on_tracepoint_free(struct bpf_raw_tracepoint_args *ctx, enum memleak_kernel_probe probe)
{
	unsigned long flags;

	hold_cpu(&flags);
	count(0, COUNTER_HITS);
	kernel_free(domain_of(probe), argument(ctx, layouts[probe].block), probe);
	release_cpu(&flags);
	return 0;
}

SEC("raw_tp/kmalloc")
int tp_kmalloc(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_alloc(ctx, KERNEL_KMALLOC);
}

SEC("raw_tp/kmalloc_node")
int tp_kmalloc_node(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_alloc(ctx, KERNEL_KMALLOC_NODE);
}

SEC("raw_tp/kmem_cache_alloc")
int tp_kmem_cache_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_alloc(ctx, KERNEL_CACHE_ALLOC);
}

SEC("raw_tp/kmem_cache_alloc_node")
int tp_kmem_cache_alloc_node(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_alloc(ctx, KERNEL_CACHE_ALLOC_NODE);
}

SEC("raw_tp/kfree")
int tp_kfree(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_free(ctx, KERNEL_KFREE);
}

SEC("raw_tp/kmem_cache_free")
int tp_kmem_cache_free(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_free(ctx, KERNEL_CACHE_FREE);
}

SEC("raw_tp/mm_page_alloc")
int tp_mm_page_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	const volatile struct memleak_kernel_layout *at = &layouts[KERNEL_PAGE_ALLOC];
	u32 order = argument(ctx, at->size);
	struct memleak_kernel_call call = {
		.probe_set = probe_sets[KERNEL_PAGE_ALLOC],
		.name = KERNEL_PAGE_ALLOC,
		.domain = domain_of(KERNEL_PAGE_ALLOC),
		.address = argument(ctx, at->block),
		.gfp = (u32)argument(ctx, at->gfp),
		.order = order,
		.migrate_type = (u32)argument(ctx, at->migrate_type),
	};

	call.size = call.object_bytes = page_bytes << (order & 31);
	/* A failed allocation is reported, too. */
	if (call.address && !(movable_type >= 0 && call.migrate_type == (u32)movable_type))
		held_alloc(ctx, &call);
	else
		count(0, COUNTER_HITS);
	return 0;
}

SEC("raw_tp/mm_page_free")
int tp_mm_page_free(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_free(ctx, KERNEL_PAGE_FREE);
}

SEC("raw_tp/percpu_alloc_percpu")
int tp_percpu_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	const volatile struct memleak_kernel_layout *at = &layouts[KERNEL_PERCPU_ALLOC];
	struct memleak_kernel_call call = {
		.probe_set = probe_sets[KERNEL_PERCPU_ALLOC],
		.name = KERNEL_PERCPU_ALLOC,
		.domain = domain_of(KERNEL_PERCPU_ALLOC),
		.address = argument(ctx, at->block),
		.size = argument(ctx, at->size) * cpus,
		.object_bytes = argument(ctx, at->object),
		.gfp = (u32)argument(ctx, at->gfp),
		.caller = argument(ctx, at->caller),
	};

	held_alloc(ctx, &call);
	return 0;
}

SEC("raw_tp/percpu_free_percpu")
int tp_percpu_free(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_free(ctx, KERNEL_PERCPU_FREE);
}

SEC("raw_tp/alloc_vmap_area")
int tp_vmap_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	const volatile struct memleak_kernel_layout *at = &layouts[KERNEL_VMAP_ALLOC];
	struct memleak_kernel_call call = {
		.probe_set = probe_sets[KERNEL_VMAP_ALLOC],
		.name = KERNEL_VMAP_ALLOC,
		.domain = domain_of(KERNEL_VMAP_ALLOC),
		.address = argument(ctx, at->block),
		.size = argument(ctx, at->size),
	};

	call.object_bytes = call.size;
	/* The guard page behind an area is address space, not memory. */
	if (call.size > page_bytes)
		call.size -= page_bytes;
	if (!(u32)argument(ctx, at->failed))
		held_alloc(ctx, &call);
	else
		count(0, COUNTER_HITS);
	return 0;
}

SEC("raw_tp/free_vmap_area_noflush")
int tp_vmap_free(struct bpf_raw_tracepoint_args *ctx)
{
	return on_tracepoint_free(ctx, KERNEL_VMAP_FREE);
}

#include "kernel_functions.bpf.h"
