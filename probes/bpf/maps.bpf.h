/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Maps and settings. Every hash map is bounded, its bound is set by the loader; an entry costs memory only while it
 * exists (BPF_F_NO_PREALLOC). A map that is full never blocks anything: the event is dropped and counted.
 */
#ifndef MAPS_BPF_H
#define MAPS_BPF_H

#include "kernel_types.bpf.h"
#include <bpf/bpf_helpers.h>
#include "memleak_types.h"

/* Settings, written before load: the verifier drops what they switch off. */
const volatile u32 max_frames = 64; /* most frames of a stack, 1 .. MEMLEAK_MAX_FRAMES */
const volatile u64 min_size = 0; /* smaller allocations are not recorded */
const volatile u64 sample_bytes = 0; /* mean bytes between two samples; 0: every allocation is recorded */
const volatile bool trace_events = false; /* emit every allocation and free into `events` */
const volatile u64 hash_seed = 0; /* random, so that no target can craft stacks that collide */
const volatile u64 pidns_dev = 0; /* the collector's pid namespace; 0: it is the kernel's first one */
const volatile u64 pidns_ino = 0;
const volatile u32 fixed_function = ~0U; /* the function of this copy of the programs; ~0: the attach cookie says */

/* Birth generation of what is allocated now; advanced by the collector after it has read `sites`. */
volatile u32 cohort_now = 0;

/* Watched processes by tgid. Written by the collector; removed here on exec and exit. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MEMLEAK_MAX_TARGETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, struct memleak_target);
} targets SEC(".maps");

/*
 * Children that the collector has launched, and with process_fork_stop their descendants: tgid -> 1; stopped at each exec
 * until the collector lets them go on. Full: the descendant is not stopped, and joined late.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MEMLEAK_MAX_TARGETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u32);
} launched SEC(".maps");

/* What each probed function does, by attach cookie. Written by the collector before it attaches. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MEMLEAK_MAX_FUNCTIONS);
	__type(key, u32);
	__type(value, struct memleak_function);
} functions SEC(".maps");

/* Outstanding allocations. Full: COUNTER_OUTSTANDING_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_block_key);
	__type(value, struct memleak_block);
} blocks SEC(".maps");

/* Totals per site; read by the collector in batches, removed by it when the process has ended. Full: COUNTER_SITES_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_site_key);
	__type(value, struct memleak_site);
} sites SEC(".maps");

/* Call stacks, written before their site; taken out by the collector once per new site. Full: COUNTER_STACKS_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_site_key);
	__type(value, struct memleak_stack);
} stacks SEC(".maps");

/* Pending calls; an entry stays until its thread exits, so that a call costs a lookup. Full: COUNTER_THREADS_FULL. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_thread_key);
	__type(value, struct memleak_thread);
} threads SEC(".maps");

/*
 * Where a process has code with unwind rows, by instance. Written by the collector, also when the process maps more.
 * Without an entry stacks are walked by frame pointers.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MEMLEAK_MAX_TARGETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, struct memleak_unwind_map);
} unwind_maps SEC(".maps");

/* Unwind rows of all files, in pages that exist while they are used. Written by the collector. */
struct unwind_page_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct memleak_unwind_page));
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MEMLEAK_UNWIND_PAGES);
	__type(key, u32);
	__array(values, struct unwind_page_map);
} unwind_pages SEC(".maps");

/* Rules looked up before, by hash of address and salt; overwritten without locks, see struct memleak_unwind_memo. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MEMLEAK_UNWIND_CACHE);
	__type(key, u32);
	__type(value, struct memleak_unwind_memo);
} unwind_memos SEC(".maps");

/* Processes that run Python, and where their interpreter keeps its frames. Written by the collector. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MEMLEAK_MAX_TARGETS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, struct memleak_python);
} python_targets SEC(".maps");

/* Python frames of threads; an entry stays until its thread exits. Full: COUNTER_PYTHON_LOST. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct memleak_python_stack);
} python_threads SEC(".maps");

/* As `stacks`, for those with Python frames. Full: COUNTER_PYTHON_LOST. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_site_key);
	__type(value, struct memleak_python_stack);
} python_stacks SEC(".maps");

/* Python functions that were seen in a stack. Full: they have no names, COUNTER_PYTHON_LOST. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MEMLEAK_PYTHON_CODES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct memleak_python_code_key);
	__type(value, struct memleak_python_code);
} python_codes SEC(".maps");

/* Counters by target slot; read by the collector, summed over CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MEMLEAK_MAX_TARGETS);
	__type(key, u32);
	__type(value, struct memleak_counters);
} counters SEC(".maps");

/* Starts, ends and loads of processes. Full: COUNTER_EVENTS_DROPPED; the collector also looks at /proc. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} process_events SEC(".maps");

/* Every allocation and free, only with trace_events. Full: COUNTER_EVENTS_DROPPED. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

static const struct memleak_site empty_site;
static const struct memleak_thread empty_thread;
static const struct memleak_python_stack empty_python_stack;
static const struct memleak_python_code empty_python_code;

static __always_inline void count(u32 slot, enum memleak_counter counter)
{
	struct memleak_counters *row = bpf_map_lookup_elem(&counters, &slot);

	if (row)
		__sync_fetch_and_add(&row->values[counter], 1);
}

/* Counts an allocation in whole. Needed only with sampling: otherwise the sites say the same. */
static __always_inline void count_allocation(u32 slot, u64 size)
{
	struct memleak_counters *row;

	if (!sample_bytes)
		return;
	row = bpf_map_lookup_elem(&counters, &slot);
	if (!row)
		return;
	__sync_fetch_and_add(&row->values[COUNTER_ALLOCATED_COUNT], 1);
	__sync_fetch_and_add(&row->values[COUNTER_ALLOCATED_BYTES], size);
}

/* tgid << 32 | tid in the collector's pid namespace; 0 when the task is not visible from there. */
static __always_inline u64 current_pid_tgid(void)
{
	struct bpf_pidns_info info = {};

	if (!pidns_ino)
		return bpf_get_current_pid_tgid();
	if (bpf_get_ns_current_pid_tgid(pidns_dev, pidns_ino, &info, sizeof(info)))
		return 0;
	return (u64)info.tgid << 32 | info.pid;
}

#endif
