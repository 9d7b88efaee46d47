/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Call stacks of code without frame pointers: per frame, the row of the unwind tables that covers the address says
 * where the caller's frame is. The rows come from the collector (core/src/unwind). Code without rows (JIT) is
 * walked by frame pointers. Registers other than ip, rsp and rbp are not followed: what needs them ends the stack, and
 * every stack says why it ends.
 *
 * Everything read from the process is hostile: an address is only ever looked up or read with bpf_probe_read_user(),
 * and each frame must lie above the one before.
 *
 * Cost per frame: for an address that was seen before one lookup in an array, else two binary searches; and its words of
 * the stack, of which a few frames' are read at once, because a read costs far more than the words in it. The searches have no branches, or the verifier would follow every path.
 */
#ifndef UNWIND_BPF_H
#define UNWIND_BPF_H

#include "maps.bpf.h"
#include "compat.bpf.h"
#include "track.bpf.h"

#if defined(__TARGET_ARCH_x86)

/* What unwinding one frame led to. */
enum unwind_result { UNWIND_ON = 0, UNWIND_ENDED = 1 };

/* Offsets from the stack pointer in the kernel's signal frame: struct ucontext lies on top, see sigcontext.h. */
#define SIGNAL_RBP 120
#define SIGNAL_RSP 160
#define SIGNAL_RIP 168

/* An unwinding under way. */
struct unwind_state {
	struct memleak_unwind_regs regs;
	struct memleak_actor *actor;
	struct memleak_thread *thread;
};

/*
 * 1 when a < b, else 0; both below 2^63. The barrier keeps clang from making a branch of it. (A mask of all bits would do as
 * well, but newer verifiers follow both of its values, which in a search of 26 steps makes 75 % of all that they look at.)
 */
static __always_inline u64 is_below(u64 a, u64 b)
{
	u64 below = (a - b) >> 63;

	barrier_var(below);
	return below;
}

/*
 * The row's cfa, rule and rbp in the upper half of a number; 0: no row covers the address. A global function, as the
 * others below: the verifier looks at it once, however often it is called. On Linux 5.10 its arguments can only be
 * numbers.
 */
__noinline u64 unwind_search(u32 instance, u64 ip)
{
	const struct memleak_unwind_map *map = bpf_map_lookup_elem(&unwind_maps, &instance);
	const struct memleak_unwind_segment *segment;
	const struct memleak_unwind_page *page;
	const struct memleak_unwind_row *row;
	u64 at = 0, below, first, count, pc, step;
	u32 number, zero = 0;
	void *inner;

	if (!map)
		return 0;
#pragma unroll
	for (step = MEMLEAK_UNWIND_SEGMENTS / 2; step; step >>= 1) {
		u64 next = at + step - 1;

		/* Without the barrier clang leaves out the mask, which it does not need; the verifier of 5.10 does. */
		barrier_var(next);
		next &= MEMLEAK_UNWIND_SEGMENTS - 1;
		at += step * is_below(map->segments[next].start, ip + 1);
	}
	if (!at)
		return 0;
	segment = &map->segments[(at - 1) & (MEMLEAK_UNWIND_SEGMENTS - 1)];
	if (ip - segment->start >= segment->size)
		return 0;
	number = segment->page;
	inner = bpf_map_lookup_elem(&unwind_pages, &number);
	if (!inner)
		return 0;
	page = bpf_map_lookup_elem(inner, &zero);
	if (!page)
		return 0;
	pc = segment->pc + (ip - segment->start);
	first = segment->first;
	count = segment->count;
	at = 0;
#pragma unroll
	for (step = MEMLEAK_UNWIND_PAGE_ROWS / 2; step; step >>= 1) {
		u64 next = at + step - 1;

		below = is_below(next, count);
		row = &page->rows[(first + next) & (MEMLEAK_UNWIND_PAGE_ROWS - 1)];
		below &= is_below(row->pc, pc + 1);
		at += step * below;
	}
	if (!at)
		return 0;
	row = &page->rows[(first + at - 1) & (MEMLEAK_UNWIND_PAGE_ROWS - 1)];
	return (u64)(__u16)row->cfa << 32 | (u64)row->rule << 48 | (u64)(__u8)row->rbp << 56;
}

/* As unwind_search(), from memory where possible. */
static __always_inline u64 find_rule(u32 instance, u64 salt, u64 ip)
{
	u64 tag = ip ^ salt, rule;
	u32 at = (tag * 0x9e3779b97f4a7c15ULL) >> 40 & (MEMLEAK_UNWIND_CACHE - 1);
	struct memleak_unwind_memo *memo = bpf_map_lookup_elem(&unwind_memos, &at);

	if (!memo)
		return 0;
	rule = *(volatile u64 *)&memo->rule;
	if ((*(volatile u64 *)&memo->check ^ rule) == tag)
		return rule;
	rule = unwind_search(instance, ip);
	*(volatile u64 *)&memo->check = tag ^ rule;
	*(volatile u64 *)&memo->rule = rule;
	return rule;
}

static __always_inline bool read_word(u64 address, u64 *out)
{
	return !bpf_probe_read_user(out, sizeof(*out), (void *)address);
}

#define NEAR_BYTES (MEMLEAK_NEAR_WORDS * sizeof(u64))

/*
 * The two words below `cfa`, the end of a frame that begins at `sp`, from what is near: read ahead, together with what may be
 * the next frames. False when the frame is too large for that, or cannot be read so.
 */
static __always_inline bool near_words(struct memleak_thread *near, u64 sp, u64 cfa, u64 *words)
{
	u64 at;

	if (cfa - near->near_from > NEAR_BYTES) {
		if (cfa - sp > NEAR_BYTES - 8)
			return false;
		/* The smallest frame is its return address: then the other word is below it. */
		near->near_from = sp - 8;
		if (bpf_probe_read_user(near->near, sizeof(near->near), (void *)(sp - 8))) {
			near->near_from = 0;
			return false;
		}
	}
	at = cfa - 16 - near->near_from;
	if (at & 7 || at > NEAR_BYTES - 16)
		return false;
	at /= 8;
	barrier_var(at);
	words[0] = near->near[at & (MEMLEAK_NEAR_WORDS - 1)];
	words[1] = near->near[(at + 1) & (MEMLEAK_NEAR_WORDS - 1)];
	return true;
}

/* A word of the stack, from what is near where possible. */
static __always_inline bool stack_word(struct memleak_thread *near, u64 address, u64 *out)
{
	u64 at = near ? address - near->near_from : ~0ULL;

	if (at & 7 || at > NEAR_BYTES - 8)
		return read_word(address, out);
	at /= 8;
	barrier_var(at);
	*out = near->near[at & (MEMLEAK_NEAR_WORDS - 1)];
	return true;
}

/*
 * The return address behind a trampoline: known when the return probe is our own, in a call of another domain that is
 * still under way (an allocator that calls mmap). `slot` is where it was on the stack; 0: not known.
 */
__noinline u64 unwind_trampoline(u64 pid_tgid, u64 slot)
{
	struct memleak_thread_key key = { .pid_tgid = pid_tgid };
	u64 caller = 0;
	u32 domain;

	for (domain = 0; domain < MEMLEAK_MAX_DOMAINS; domain++) {
		struct memleak_thread *thread;

		key.domain = domain;
		thread = bpf_map_lookup_elem(&threads, &key);
		if (thread && thread->sp == slot && thread->caller)
			caller = thread->caller;
	}
	return caller;
}

/*
 * Whether code is what a signal handler returns to: `mov $15, %rax; syscall`, which asks for sigreturn. Debuggers know it
 * by its bytes, too, for musl has no unwind rows for it.
 */
static __always_inline bool is_signal_return(u64 ip)
{
	u64 code[2] = {};

	return !bpf_probe_read_user(code, 9, (void *)ip) && code[0] == 0x0f0000000fc0c748ULL && code[1] == 0x05;
}

/*
 * The caller of the frame in `regs`; the stack's end, when it ends here, goes to `end`. `near`: where to read ahead; NULL
 * spares the verifier the ways there.
 */
static __always_inline enum unwind_result unwind_frame(struct memleak_unwind_regs *regs, struct memleak_actor *actor,
						       struct memleak_thread *near, u32 *end)
{
	u64 rule = find_rule(actor->instance, regs->salt, regs->ip - !regs->exact);
	__s64 cfa_offset = (__s16)(rule >> 32) * 8LL, rbp_offset = (__s8)(rule >> 56) * 8LL;
	u32 cfa_kind = rule >> 48 & 15, rbp_kind = rule >> 48 & 0xf0;
	u64 cfa, saved[2], bp;

	if (cfa_kind == UNWIND_NONE && is_signal_return(regs->ip))
		cfa_kind = UNWIND_SIGNAL;
	*end = STACK_UNREADABLE;
	switch (cfa_kind) {
	case UNWIND_RSP:
		cfa = regs->sp + cfa_offset;
		break;
	case UNWIND_RBP:
		cfa = regs->bp + cfa_offset;
		break;
	case UNWIND_RBP_DEREF:
		if (!read_word(regs->bp + cfa_offset, &cfa))
			return UNWIND_ENDED;
		break;
	case UNWIND_PLT:
		cfa = regs->sp + 8 + ((regs->ip & 15) >= (u64)(cfa_offset >> 3) ? 8 : 0);
		break;
	case UNWIND_SIGNAL:
		cfa = regs->sp;
		if (!read_word(cfa + SIGNAL_RIP, &regs->ip) || !read_word(cfa + SIGNAL_RSP, &regs->sp) ||
		    !read_word(cfa + SIGNAL_RBP, &regs->bp))
			return UNWIND_ENDED;
		regs->exact = 1;
		return UNWIND_ON;
	case UNWIND_OUTERMOST:
		*end = STACK_COMPLETE;
		return UNWIND_ENDED;
	case UNWIND_UNSUPPORTED:
		*end = STACK_UNSUPPORTED;
		return UNWIND_ENDED;
	default:
		/* By convention the outermost frame has no frame pointer. */
		*end = regs->bp ? STACK_NO_TABLE : STACK_COMPLETE;
		if (regs->bp < regs->sp || regs->bp & 7)
			return UNWIND_ENDED;
		cfa = regs->bp + 16;
		rbp_kind = UNWIND_RBP_AT_CFA;
		rbp_offset = -16;
		break;
	}
	*end = STACK_LOST;
	if (cfa <= regs->sp)
		return UNWIND_ENDED;
	*end = STACK_UNREADABLE;
	/* Most often the return address and rbp lie side by side. */
	if (!(near && near_words(near, regs->sp, cfa, saved)) &&
	    bpf_probe_read_user(saved, sizeof(saved), (void *)(cfa - 16)) && !read_word(cfa - 8, &saved[1]))
		return UNWIND_ENDED;
	bp = regs->bp;
	if (rbp_kind == UNWIND_RBP_AT_CFA && rbp_offset == -16) {
		bp = saved[0];
	} else if (rbp_kind == UNWIND_RBP_AT_CFA || rbp_kind == UNWIND_RBP_AT_RBP) {
		if (!stack_word(near, (rbp_kind == UNWIND_RBP_AT_CFA ? cfa : regs->bp) + rbp_offset, &bp))
			return UNWIND_ENDED;
	}
	/* A lost rbp stays what it was: the next frame that uses it is not found, and says so. */
	if (!saved[1]) {
		*end = STACK_COMPLETE;
		return UNWIND_ENDED;
	}
	if (is_return_trampoline(saved[1])) {
		saved[1] = unwind_trampoline(actor->pid_tgid, cfa - 8);
		*end = STACK_TRAMPOLINE;
		if (!saved[1])
			return UNWIND_ENDED;
	}
	if (cfa_kind == UNWIND_NONE && !is_code(actor->target, saved[1])) {
		*end = STACK_NO_TABLE;
		return UNWIND_ENDED;
	}
	regs->ip = saved[1];
	regs->sp = cfa;
	regs->bp = bp;
	regs->exact = 0;
	return UNWIND_ON;
}

/*
 * Adds a frame. Whoever names it looks at the byte before its address, where the call is. Code that a signal has interrupted
 * has called nothing, and may stand at the first instruction of a function: it is kept with an address one higher. So is
 * the code that the handler returns to, which is known only now: it is entered at its first instruction.
 */
static __always_inline void keep_frame(struct memleak_stack *stack, u32 at, const struct memleak_unwind_regs *regs)
{
	u32 before = at - 1;

	barrier_var(at);
	barrier_var(before);
	stack->addresses[at & MEMLEAK_MAX_FRAMES] = regs->ip + regs->exact;
	if (regs->exact)
		stack->addresses[before & MEMLEAK_MAX_FRAMES] += 1;
	stack->count = at + 1;
}

/* One turn of unwind_by_loop(): frame `index` is known, the next one is looked for. */
static long unwind_turn(u32 index, struct unwind_state *state)
{
	struct memleak_stack *stack = &state->thread->stack;
	u32 at = index + 1, end;

	if (unwind_frame(&state->regs, state->actor, state->thread, &end) == UNWIND_ENDED) {
		stack->end = end;
		return 1;
	}
	if (at >= max_frames || at >= MEMLEAK_MAX_FRAMES)
		return 1; /* STACK_CUT, as it was set before */
	keep_frame(stack, at, &state->regs);
	return 0;
}

/* For programs that only newer kernels run: bpf_loop() came with Linux 5.17. */
static __always_inline void unwind_by_loop(struct memleak_actor *actor, struct memleak_thread *thread)
{
	struct unwind_state state = { .regs = thread->regs, .actor = actor, .thread = thread };

	bpf_loop(MEMLEAK_MAX_FRAMES, unwind_turn, &state, 0);
}

/* Frames that one call of unwind_some() unwinds. */
#define SOME_FRAMES 16

/* A few frames of the stack of the thread's pending call. */
__noinline int unwind_some(u64 pid_tgid, u32 tgid, u32 domain)
{
	struct memleak_thread_key key = { .pid_tgid = pid_tgid, .domain = domain };
	struct memleak_thread *thread = bpf_map_lookup_elem(&threads, &key);
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);
	struct memleak_actor actor = { .pid_tgid = pid_tgid, .domain = domain, .target = target };
	struct memleak_unwind_regs regs;
	u32 i, end;

	if (!thread || !target)
		return UNWIND_ENDED;
	actor.instance = target->instance;
	regs = thread->regs;
	for (i = 0; i < SOME_FRAMES; i++) {
		u32 at = thread->stack.count;

		if (unwind_frame(&regs, &actor, 0, &end) == UNWIND_ENDED) {
			thread->stack.end = end;
			return UNWIND_ENDED;
		}
		if (at >= max_frames || at >= MEMLEAK_MAX_FRAMES)
			return UNWIND_ENDED;
		keep_frame(&thread->stack, at, &regs);
	}
	thread->regs = regs;
	return UNWIND_ON;
}

static __always_inline void unwind_by_calls(struct memleak_actor *actor)
{
	u32 tgid = actor->pid_tgid >> 32, i;

	for (i = 0; i < (MEMLEAK_MAX_FRAMES + SOME_FRAMES) / SOME_FRAMES; i++)
		if (unwind_some(actor->pid_tgid, tgid, actor->domain) != UNWIND_ON)
			break;
}

/*
 * The stack at a function's entry, where the return address is at `sp` and rbp is still the caller's; or, `inside` of a
 * function, just before `caller`. False when the process has no tables (yet). `loop`: the kernel has bpf_loop().
 */
static __always_inline bool unwind(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_thread *thread,
				   bool inside, u64 sp, u64 caller, bool loop)
{
	const struct memleak_unwind_map *map = bpf_map_lookup_elem(&unwind_maps, &actor->instance);

	if (!map || !caller)
		return false;
	thread->regs.ip = caller;
	thread->regs.sp = inside ? sp : sp + 8;
	thread->regs.bp = PT_REGS_FP(ctx);
	thread->regs.exact = 0;
	thread->regs.salt = map->salt;
	thread->near_from = 0;
	thread->stack.addresses[0] = caller;
	thread->stack.start = 0;
	thread->stack.count = 1;
	thread->stack.end = STACK_CUT;
	if (max_frames > 1) {
		if (loop)
			unwind_by_loop(actor, thread);
		else
			unwind_by_calls(actor);
	}
	return true;
}

#else

/* Elsewhere compilers keep frame pointers. */
static __always_inline bool unwind(struct pt_regs *ctx, struct memleak_actor *actor, struct memleak_thread *thread,
				   bool inside, u64 sp, u64 caller, bool loop)
{
	return false;
}
static __always_inline u64 unwind_trampoline(u64 pid_tgid, u64 slot)
{
	return 0;
}

#endif
#endif
