/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What hits cost the target. The trap is paid outside of the programs, at a price that the collector calibrates; what
 * happens in them depends on the depth of stacks and on caches, so a part of the hits is timed (a call to the clock is
 * 20-40 ns). When the program has done something else since the last hit, the code and data of the trap are no longer in the
 * CPU's nearest caches, and after a pause in none: such hits cost more, and are counted apart.
 */
#ifndef METER_BPF_H
#define METER_BPF_H

#include "track.bpf.h"

/* A hit so long after the last one on its CPU is a cool one, and a cold one. */
#define METER_COOL_NS 4000
#define METER_COLD_NS 100000
/* The longest that a program can plausibly take: beyond it, something else had the CPU meanwhile. */
#define METER_MOST_NS 100000

/* Of 2^32 hits so many are not timed. Set by the collector once it has calibrated. */
volatile u32 meter_untimed = 0;

static __always_inline void meter_begin(struct memleak_actor *actor)
{
	struct memleak_counters *row = bpf_map_lookup_elem(&counters, &actor->slot);

	u64 since;

	actor->hit = 0;
	actor->hit_ns = bpf_ktime_get_ns();
	if (!row)
		return;
	__sync_fetch_and_add(&row->values[COUNTER_HITS], 1);
	since = actor->hit_ns - row->last_hit_ns;
	if (since > METER_COOL_NS)
		__sync_fetch_and_add(&row->values[since > METER_COLD_NS ? COUNTER_HITS_COLD : COUNTER_HITS_COOL], 1);
	row->last_hit_ns = actor->hit_ns;
	actor->hit = row->values[COUNTER_HITS];
}

/*
 * Multiples of the golden ratio are spread evenly over all words, and so are those of any regular choice of hits: whatever
 * the order in which a program calls, each of its calls is timed as often as the others. (Decided here and not at the
 * begin, so that the verifier has one state less to follow through the program.)
 */
static __always_inline void meter_end(struct memleak_actor *actor)
{
	struct memleak_counters *row;
	u64 ns;

	if (actor->hit * 2654435769U < meter_untimed)
		return;
	row = bpf_map_lookup_elem(&counters, &actor->slot);
	if (!row)
		return;
	ns = bpf_ktime_get_ns() - actor->hit_ns;
	if (ns > METER_MOST_NS)
		ns = METER_MOST_NS;
	__sync_fetch_and_add(&row->values[COUNTER_TIMED_NS], ns);
}

#endif
