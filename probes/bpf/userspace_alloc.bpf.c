// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Allocator calls of watched processes, caught by uprobes.
 *
 * One generic tracker: what a function does, and which of its arguments mean what, comes from `functions` by attach
 * cookie, so that an allocator is a manifest and not a program. Oldest kernel intended: 5.10 (there, one copy of the
 * programs per function, see fixed_function). Three ways in, of which the loader takes one: a session (one program
 * sees entry and return), multi links, perf events.
 *
 * Cost per event: the trap (0.5-1 us) plus 0.3-1 us for stack, hash and tables.
 */
#include "track.bpf.h"
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "compat.bpf.h"
#include "meter.bpf.h"
#include "operand.bpf.h"
#include "unwind.bpf.h"
#include "python.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* Keeps types that only the collector reads in this object's type information, from which its Rust twins are made. */
struct memleak_kept_types {
	enum memleak_role role;
	enum memleak_block_bits block_bits;
	enum memleak_sampler sampler;
	enum memleak_function_flags function_flags;
	enum memleak_operand_kind operand_kind;
	enum memleak_stack_end stack_end;
	enum memleak_unwind_cfa unwind_cfa;
	enum memleak_unwind_rbp unwind_rbp;
	enum memleak_counter counter;
	enum memleak_process_event_kind process_event_kind;
	enum memleak_event_kind event_kind;
	enum memleak_python_got python_got;
	struct memleak_share share;
	struct memleak_process_event process_event;
	struct memleak_event event;
	struct memleak_unwind_row unwind_row;
} kept_types;

/* Nested calls of one allocator stay within this distance below the outermost one; beyond it is another stack. */
#define NESTED_STACK_BYTES (256 * 1024)

const volatile bool can_hold_preemption = false;

/*
 * Since Linux 6.13 a program's stack may be one per CPU, and nothing keeps a second task from running the same uprobe program
 * there while the first one is preempted: each would write over the other's variables, and the kernel follows pointers among
 * them (a guest with 7.2 died of it). Nothing lies on the stack before and behind these calls.
 */
static __always_inline void hold_preemption(void)
{
	if (can_hold_preemption)
		bpf_preempt_disable();
}

static __always_inline void release_preemption(void)
{
	if (can_hold_preemption)
		bpf_preempt_enable();
}

/* A session program returns 1 to leave out the return probe of this call. */
enum { FOLLOW = 0, SKIP = 1 };

/* a * b, or ~0 when it does not fit. By halves: clang turns the usual checks into a 128-bit call that BPF lacks. */
static __always_inline u64 saturating_product(u64 a, u64 b)
{
	u64 big = a > b ? a : b, small = a > b ? b : a;
	u64 low, high;

	if (small >> 32)
		return ~0ULL;
	low = (big & 0xffffffff) * small;
	high = (big >> 32) * small + (low >> 32);
	if (high >> 32)
		return ~0ULL;
	return high << 32 | (low & 0xffffffff);
}

/* Requested bytes. What a hostile process asks for must not wrap to little. */
static __always_inline u64 requested_size(struct pt_regs *ctx, const struct memleak_function *function)
{
	u64 size;

	size = operand(ctx, &function->size);
	if (function->times.kind == OPERAND_NONE)
		return size;
	return saturating_product(size, operand(ctx, &function->times));
}

/* Where the function that was just entered will return to (0: not known); at a tracepoint, behind its instruction. */
static __always_inline u64 caller_of(struct pt_regs *ctx, struct memleak_actor *actor,
				     const struct memleak_function *function, u64 sp)
{
	u64 caller;

	if (function->flags & FUNCTION_INSIDE)
		return PT_REGS_IP(ctx) + 1;
	caller = return_address(ctx, sp);
	/* A tail call from a function whose return is probed. */
	if (is_return_trampoline(caller))
		caller = unwind_trampoline(actor->pid_tgid, sp);
	return caller;
}

/*
 * The stack at a function's entry, by unwind tables where the process has them, else by frame pointers. That walk
 * starts at the function itself, whose frame is not set up yet, and on most kernels leaves out its caller; the caller's
 * address is on top of the stack (x86-64) or in the link register. True: by tables.
 */
static __always_inline bool walk(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_thread *thread,
				 u64 sp, u64 caller, const struct memleak_function *function, bool loop)
{
	struct memleak_stack *stack = &thread->stack;
	u32 bytes = max_frames * sizeof(u64);
	long got;
	u32 n;

	stack->name = function->name;
	if (unwind(ctx, actor, thread, function->flags & FUNCTION_INSIDE, sp, caller, loop))
		return true;
	if (bytes > MEMLEAK_MAX_FRAMES * sizeof(u64))
		bytes = MEMLEAK_MAX_FRAMES * sizeof(u64);
	stack->start = 0;
	stack->end = STACK_WALKED;
	got = bpf_get_stack(ctx, stack->addresses, bytes, BPF_F_USER_STACK);
	if (got < 8) {
		stack->end = STACK_UNREADABLE;
		stack->addresses[0] = caller;
		stack->count = caller ? 1 : 0;
		if (!caller)
			count(actor->slot, COUNTER_STACKS_FAILED);
		return false;
	}
	n = (u32)got / 8;
	if (n >= max_frames)
		stack->end = STACK_CUT;
	if (n > 1 && stack->addresses[1] == caller) {
		stack->start = 1;
		n -= 1;
	} else if (caller) {
		stack->addresses[0] = caller;
	}
	stack->count = n;
	return false;
}

/* Takes the stack, Python's frames included, and returns its hash. */
static __always_inline u64 take_stack(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_thread *thread,
				      u64 sp, u64 caller, const struct memleak_function *function, bool loop)
{
	bool by_tables = walk(ctx, actor, thread, sp, caller, function, loop);
	u64 hash = hash_stack(actor->target, &thread->stack, !by_tables, loop);
	u64 python = python_walk(actor);

	if (!python)
		return hash;
	hash = (hash ^ python) * 0xff51afd7ed558ccdULL;
	python_keep(actor->pid_tgid, hash, actor->instance, function->probe_set, actor->slot);
	return hash;
}

/*
 * The pending call was left without returning, or it returned while no probes were attached: what it took back is
 * gone, what it would hand out is unknown.
 */
static __always_inline void abandon(struct memleak_actor *actor, struct memleak_thread *thread)
{
	if (thread->window == actor->target->window)
		count(actor->slot, COUNTER_MISSED_RETURNS);
	if (thread->old_address)
		settle(&thread->old, actor->instance, actor->hit_ns);
	thread->old_address = 0;
	thread->sp = 0;
}

static __always_inline bool find_actor(struct memleak_actor *actor)
{
	struct memleak_target *target;
	u32 tgid;

	actor->pid_tgid = current_pid_tgid();
	tgid = actor->pid_tgid >> 32;
	target = bpf_map_lookup_elem(&targets, &tgid);
	if (!target)
		return false;
	actor->instance = target->instance;
	actor->slot = target->slot;
	actor->target = target;
	meter_begin(actor);
	return true;
}

static __always_inline struct memleak_thread *thread_of(struct memleak_actor *actor)
{
	struct memleak_thread_key key = { .pid_tgid = actor->pid_tgid, .domain = actor->domain };
	struct memleak_thread *thread = bpf_map_lookup_elem(&threads, &key);

	if (thread)
		return thread;
	bpf_map_update_elem(&threads, &key, &empty_thread, BPF_NOEXIST);
	thread = bpf_map_lookup_elem(&threads, &key);
	if (!thread)
		count(actor->slot, COUNTER_THREADS_FULL);
	return thread;
}

static __always_inline struct memleak_function *function_of(struct pt_regs *ctx, u32 *index)
{
	*index = fixed_function != ~0U ? fixed_function : (u32)bpf_get_attach_cookie(ctx);
	return bpf_map_lookup_elem(&functions, index);
}

/* The pending call has called another function of its domain: its return must always be followed. */
static __always_inline void note_nesting(const struct memleak_thread *thread)
{
	u32 index = thread->function;
	struct memleak_function *outer = bpf_map_lookup_elem(&functions, &index);

	if (outer && !outer->nests)
		outer->nests = 1;
}

/* Whether an allocation of `size` bytes is recorded; to be asked once for each. */
static __always_inline bool is_recorded(struct memleak_thread *thread, const struct memleak_function *function,
					u64 size)
{
	if (size < min_size)
		return false;
	if (!sample_bytes || function->flags & FUNCTION_UNSAMPLED)
		return true;
	if (!size)
		size = 1;
	if (!thread->until_sample)
		thread->until_sample = sample_distance(bpf_get_prandom_u32()) + 1;
	if (thread->until_sample > size) {
		thread->until_sample -= size;
		return false;
	}
	thread->until_sample = 0;
	return true;
}

/*
 * Whether the return of an allocation that is not recorded may be left out. Not when the function calls others that are
 * probed: once nothing is pending they would count as calls of the program. Sampled calls are always followed, so a
 * function that nests only at times is found out, too. Not in windows either: an address that is handed out again is
 * what proves there that its last block is gone. (Elsewhere all frees are seen, and with what is left out goes only the
 * notice of one that was missed: the books are right again when the address is freed or recorded the next time.)
 */
static __always_inline bool may_skip(const struct memleak_actor *actor, const struct memleak_function *function)
{
	return !function->nests && function->followed >= MEMLEAK_LEAF_CALLS && !actor->target->record_until_ns;
}

/* In a trace, frees show the stack that freed; otherwise nobody needs it. */
static __always_inline u64 stack_of_free(struct pt_regs *ctx, struct memleak_actor *actor,
					 const struct memleak_function *function, bool loop)
{
	struct memleak_site_key key = { .instance = actor->instance, .probe_set = function->probe_set };
	struct memleak_thread *thread;
	u64 sp = PT_REGS_SP(ctx) + function->sp_offset;

	if (!trace_events)
		return 0;
	thread = thread_of(actor);
	/* A pending call's stack is still needed for what it hands out. */
	if (!thread || thread->sp)
		return 0;
	key.stack = take_stack(ctx, actor, thread, sp, caller_of(ctx, actor, function, sp), function, loop);
	bpf_map_update_elem(&stacks, &key, &thread->stack, BPF_NOEXIST);
	return key.stack;
}

/* `session`: SKIP is heeded; `loop`: the kernel has bpf_loop(). */
static __always_inline int enter(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_function *function,
				 u32 index, bool session, bool loop)
{
	struct memleak_thread *thread;
	u64 sp, block;

	block = operand(ctx, &function->block);
	if (function->role == ROLE_FREE) {
		if (block)
			track_free(actor, function, block, requested_size(ctx, function),
				   stack_of_free(ctx, actor, function, loop));
		return SKIP;
	}
	sp = PT_REGS_SP(ctx) + function->sp_offset;
	thread = 0;
	if (!actor->target->record_until_ns || actor->hit_ns < actor->target->record_until_ns)
		thread = thread_of(actor);
	if (!thread) {
		struct memleak_block old;

		/* What it hands out will be unknown; what it takes back must not stay. */
		if (function->role == ROLE_REALLOC && block && take(actor, block, &old))
			settle(&old, actor->instance, actor->hit_ns);
		return SKIP;
	}
	if (thread->sp && thread->window != actor->target->window)
		abandon(actor, thread);
	if (thread->sp) {
		/* Stacks grow down: a nested call is below the pending one, and not far. */
		if (sp < thread->sp && thread->sp - sp < NESTED_STACK_BYTES) {
			note_nesting(thread);
			return SKIP;
		}
		/* A tail call takes over the frame, with the return address that our return probe has put there. */
		if (sp == thread->sp && is_return_trampoline(return_address(ctx, sp))) {
			note_nesting(thread);
			return SKIP;
		}
		abandon(actor, thread);
	}
	thread->size = requested_size(ctx, function);
	thread->out_pointer = function->flags & FUNCTION_IN_PLACE ? block : operand(ctx, &function->out);
	thread->filtered = !is_recorded(thread, function, thread->size);
	thread->function = index;
	thread->window = actor->target->window;
	thread->old_address = 0;
	/* Taken back at entry: as soon as the call runs, another thread may own the address. */
	if (function->role == ROLE_REALLOC && block && take(actor, block, &thread->old))
		thread->old_address = block;
	if (session && thread->filtered && !thread->old_address && may_skip(actor, function)) {
		count_allocation(actor->slot, thread->size);
		return SKIP;
	}
	thread->caller = caller_of(ctx, actor, function, sp);
	if (!thread->filtered)
		thread->stack_hash = take_stack(ctx, actor, thread, sp, thread->caller, function, loop);
	if (function->flags & FUNCTION_AT_ENTRY) {
		if (!block)
			return SKIP;
		count_allocation(actor->slot, thread->size);
		if (thread->filtered)
			end_missed(actor, block, actor->hit_ns);
		else
			track_alloc(actor, function, block, thread->size, thread->stack_hash, &thread->stack);
		return SKIP;
	}
	thread->sp = sp;
	return FOLLOW;
}

static __always_inline int on_enter(struct pt_regs *ctx, bool session, bool loop)
{
	struct memleak_function *function;
	struct memleak_actor actor;
	int next;
	u32 index;

	function = function_of(ctx, &index);
	if (!function || !find_actor(&actor))
		return SKIP;
	if (function->flags & FUNCTION_STEPPED)
		count(actor.slot, COUNTER_HITS_STEPPED);
	actor.domain = function->domain;
	next = enter(ctx, &actor, function, index, session, loop);
	meter_end(&actor);
	return next;
}

static __always_inline void leave(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_function *function,
				  u32 index)
{
	struct memleak_thread_key key = {};
	struct memleak_thread *thread;
	u64 sp, block, old_address, now = actor->hit_ns;
	bool failed;

	key.pid_tgid = actor->pid_tgid;
	key.domain = actor->domain;
	thread = bpf_map_lookup_elem(&threads, &key);
	if (!thread || !thread->sp || thread->window != actor->target->window)
		return; /* entered before the probes were there */
	sp = PT_REGS_SP(ctx) - RETURN_SP_RISE;
	if (sp != thread->sp) {
		if (sp > thread->sp)
			abandon(actor, thread);
		return; /* a nested call returns */
	}
	if (index != thread->function)
		return; /* a tail call returns, together with the function that made it */
	if (function->followed < MEMLEAK_LEAF_CALLS)
		function->followed++;
	thread->sp = 0;
	old_address = thread->old_address;
	thread->old_address = 0;
	block = PT_REGS_RC(ctx);
	if (function->flags & FUNCTION_IN_PLACE) {
		failed = block < thread->size;
		block = thread->out_pointer;
	} else if (function->out.kind != OPERAND_NONE) {
		failed = (u32)block != (u32)function->expect;
		block = 0;
		if (!failed && bpf_probe_read_user(&block, sizeof(block), (void *)thread->out_pointer)) {
			count(actor->slot, COUNTER_POINTERS_UNREADABLE);
			failed = true;
		}
		failed = failed || !block;
	} else {
		failed = block == function->expect;
	}
	if (failed) {
		if (!old_address)
			return;
		/* realloc(p, 0) frees and returns NULL; any other failure leaves the old block as it was. */
		if (thread->size) {
			put_back(actor, old_address, &thread->old, now);
		} else {
			settle(&thread->old, actor->instance, now);
			emit(actor, EVENT_FREE, old_address, block_size(&thread->old), now,
			     block_age(&thread->old, now), thread->stack_hash, function->probe_set, function->name);
		}
		return;
	}
	if (old_address) {
		settle(&thread->old, actor->instance, now);
		emit(actor, EVENT_FREE, old_address, block_size(&thread->old), now, block_age(&thread->old, now),
		     thread->stack_hash, function->probe_set, function->name);
	}
	count_allocation(actor->slot, thread->size);
	if (thread->filtered)
		end_missed(actor, block, actor->hit_ns);
	else
		track_alloc(actor, function, block, thread->size, thread->stack_hash, &thread->stack);
}

static __always_inline int on_return(struct pt_regs *ctx)
{
	struct memleak_function *function;
	struct memleak_actor actor;
	u32 index;

	function = function_of(ctx, &index);
	if (!function || !find_actor(&actor))
		return 0;
	actor.domain = function->domain;
	leave(ctx, &actor, function, index);
	meter_end(&actor);
	return 0;
}

SEC("uprobe.session")
int alloc_session(struct pt_regs *ctx)
{
	int next;

	hold_preemption();
	next = session_is_return(ctx) ? on_return(ctx) : on_enter(ctx, true, true);
	release_preemption();
	return next;
}

SEC("uprobe.multi")
int alloc_multi_enter(struct pt_regs *ctx)
{
	hold_preemption();
	on_enter(ctx, false, true);
	release_preemption();
	return 0;
}

SEC("uretprobe.multi")
int alloc_multi_return(struct pt_regs *ctx)
{
	hold_preemption();
	on_return(ctx);
	release_preemption();
	return 0;
}

SEC("uprobe")
int alloc_perf_enter(struct pt_regs *ctx)
{
	hold_preemption();
	on_enter(ctx, false, false);
	release_preemption();
	return 0;
}

SEC("uretprobe")
int alloc_perf_return(struct pt_regs *ctx)
{
	hold_preemption();
	on_return(ctx);
	release_preemption();
	return 0;
}

#include "process.bpf.h"
