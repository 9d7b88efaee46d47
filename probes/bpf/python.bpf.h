/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Frames of CPython (3.11 and later), which its own interpreter keeps: a list of frames per thread, each with a code object
 * that knows its name, its file and its lines. Read at the call itself, because neither the frames nor, maybe, the process
 * are there when somebody looks at the site. The collector says where things are (core/src/python); all of it is the
 * process's own memory and may be anything: it is only read with bpf_probe_read_user(), in loops with a bound, and copied.
 */
#ifndef PYTHON_BPF_H
#define PYTHON_BPF_H

#include "maps.bpf.h"
#include "compat.bpf.h"
#include "track.bpf.h"
#include <bpf/bpf_core_read.h>

#if defined(__TARGET_ARCH_x86)

/* Most thread states that are looked at; the newest come first. */
#define PYTHON_THREADS 512
/* A thread without a state is looked for again after so many calls. */
#define PYTHON_RETRY 256
/* Frames that one call of python_some() reads, and calls of it; frames that stand for no function take part in this. */
#define PYTHON_SOME 8
#define PYTHON_CALLS 12

/* A word of the process, 0 when it cannot be read. */
static __always_inline u64 python_word(u64 address)
{
	u64 word = 0;

	bpf_probe_read_user(&word, sizeof(word), (void *)address);
	return word;
}

/* The state of the thread whose own data begins at `self`; 0: it has none, or (counted) there are too many. */
__noinline u64 python_thread(u32 instance, u64 self, u32 slot)
{
	const struct memleak_python *python = bpf_map_lookup_elem(&python_targets, &instance);
	u64 state;
	u32 i;

	if (!python)
		return 0;
	state = python_word(python_word(python->interpreters) + python->threads);
	for (i = 0; i < PYTHON_THREADS && state; i++) {
		if (python_word(state + python->thread_id) == self)
			return state;
		state = python_word(state + python->thread_next);
	}
	if (state)
		count(slot, COUNTER_PYTHON_LOST);
	return 0;
}

/* Copies an object of unknown length: as much of `size` bytes as there is up to the end of its page. */
static __always_inline bool python_copy(void *to, u32 size, u64 from)
{
	u32 len;

	if (!bpf_probe_read_user(to, size, (void *)from))
		return true;
	len = 4096 - (from & 4095);
	if (len >= size)
		return false;
	barrier_var(len);
	if (len > size)
		return false;
	return !bpf_probe_read_user(to, len, (void *)from);
}

/* Takes note of a code object that was not seen before. */
__noinline int python_code(u32 instance, u64 code, u64 lines, u32 slot)
{
	const struct memleak_python *python = bpf_map_lookup_elem(&python_targets, &instance);
	struct memleak_python_code_key key = { .code = code, .lines = lines, .instance = instance };
	struct memleak_python_code *info;
	u32 got = 0;

	if (!python)
		return 0;
	if (bpf_map_update_elem(&python_codes, &key, &empty_python_code, BPF_NOEXIST)) {
		/* Another thread may have come first. */
		if (!bpf_map_lookup_elem(&python_codes, &key))
			count(slot, COUNTER_PYTHON_LOST);
		return 0;
	}
	info = bpf_map_lookup_elem(&python_codes, &key);
	if (!info)
		return 0;
	if (!bpf_probe_read_user(&info->first_line, sizeof(info->first_line), (void *)(code + python->code_first_line)))
		got |= PYTHON_FIRST_LINE;
	if (python_copy(info->file, sizeof(info->file), python_word(code + python->code_names)))
		got |= PYTHON_FILE;
	if (python_copy(info->name, sizeof(info->name), python_word(code + python->code_names + 16)))
		got |= PYTHON_NAME;
	if (python_copy(info->lines, sizeof(info->lines), lines))
		got |= PYTHON_LINES;
	info->got = got;
	return 0;
}

/* Reads a few frames; returns 0 when there are no more. */
__noinline int python_some(u64 pid_tgid, u32 instance, u32 slot)
{
	const struct memleak_python *python = bpf_map_lookup_elem(&python_targets, &instance);
	struct memleak_python_stack *stack = bpf_map_lookup_elem(&python_threads, &pid_tgid);
	struct memleak_python_code_key key = { .instance = instance };
	u32 i;

	if (!python || !stack)
		return 0;
	for (i = 0; i < PYTHON_SOME; i++) {
		u32 at = stack->count, before = at - 1, flag;
		struct memleak_python_frame *frame;
		bool is_entry;

		if (!stack->next)
			return 0;
		if (at >= MEMLEAK_PYTHON_FRAMES) {
			stack->cut = 1;
			return 0;
		}
		if (bpf_probe_read_user(stack->words, 9 * sizeof(u64), (void *)stack->next))
			return 0;
		stack->next = stack->words[python->frame_previous & (MEMLEAK_PYTHON_WORDS - 1)];
		flag =
		    stack->words[python->frame_flags & (MEMLEAK_PYTHON_WORDS - 1)] >> (python->flags_shift & 63) & 0xff;
		is_entry = python->flags_entry ? flag == python->flags_entry : flag != 0;
		if (is_entry && !python->entry_is_frame) {
			barrier_var(before);
			if (at)
				stack->frames[before & (MEMLEAK_PYTHON_FRAMES - 1)].instruction |= 1;
			continue;
		}
		key.code = stack->words[python->frame_code & (MEMLEAK_PYTHON_WORDS - 1)];
		key.lines = python_word(key.code + python->code_names + 24);
		if (!key.lines)
			return 0;
		barrier_var(at);
		frame = &stack->frames[at & (MEMLEAK_PYTHON_FRAMES - 1)];
		frame->code = key.code;
		frame->lines = key.lines;
		frame->instruction =
		    (stack->words[python->frame_instruction & (MEMLEAK_PYTHON_WORDS - 1)] & ~1ULL) | is_entry;
		stack->count = at + 1;
		stack->hash = (stack->hash ^ frame->code ^ frame->lines) * 0xff51afd7ed558ccdULL;
		stack->hash = (stack->hash ^ stack->hash >> 32 ^ frame->instruction) * 0x9e3779b97f4a7c15ULL;
		if (!bpf_map_lookup_elem(&python_codes, &key))
			python_code(instance, key.code, key.lines, slot);
	}
	return 1;
}

/* Reads the Python frames of the current thread into `python_threads`; returns a hash of them, 0 without any. */
static __always_inline u64 python_walk(struct memleak_actor *actor)
{
	u64 pid_tgid = actor->pid_tgid;
	const struct memleak_python *python;
	struct task_struct *task = (void *)bpf_get_current_task();
	struct memleak_python_stack *stack;
	u64 self, next;
	u32 i;

	/* Most processes run none, and a look into their own entry costs nothing. */
	if (!actor->target->runs_python)
		return 0;
	python = bpf_map_lookup_elem(&python_targets, &actor->instance);
	if (!python)
		return 0;
	stack = bpf_map_lookup_elem(&python_threads, &pid_tgid);
	if (!stack) {
		bpf_map_update_elem(&python_threads, &pid_tgid, &empty_python_stack, BPF_NOEXIST);
		stack = bpf_map_lookup_elem(&python_threads, &pid_tgid);
		if (!stack) {
			count(actor->slot, COUNTER_PYTHON_LOST);
			return 0;
		}
	}
	stack->count = 0;
	stack->cut = 0;
	stack->hash = 0;
	self = BPF_CORE_READ(task, thread.fsbase);
	if (!stack->thread || python_word(stack->thread + python->thread_id) != self) {
		if (stack->retry) {
			stack->retry--;
			return 0;
		}
		stack->thread = python_thread(actor->instance, self, actor->slot);
		if (!stack->thread) {
			stack->retry = PYTHON_RETRY;
			return 0;
		}
	}
	next = python_word(stack->thread + python->thread_frame);
	if (python->frame_holder != ~0U)
		next = python_word(next + python->frame_holder);
	stack->next = next;
	for (i = 0; i < PYTHON_CALLS; i++)
		if (!python_some(pid_tgid, actor->instance, actor->slot))
			break;
	return stack->count ? stack->hash | 1 : 0;
}

/* Keeps the frames that python_walk() has read for the stack of a site, if that is new. */
__noinline int python_keep(u64 pid_tgid, u64 hash, u32 instance, u32 probe_set, u32 slot)
{
	struct memleak_site_key key = { .stack = hash, .instance = instance, .probe_set = probe_set };
	struct memleak_python_stack *stack;

	if (bpf_map_lookup_elem(&sites, &key))
		return 0;
	stack = bpf_map_lookup_elem(&python_threads, &pid_tgid);
	if (stack && bpf_map_update_elem(&python_stacks, &key, stack, BPF_NOEXIST) &&
	    !bpf_map_lookup_elem(&python_stacks, &key))
		count(slot, COUNTER_PYTHON_LOST);
	return 0;
}

#else

/* Elsewhere a thread's own data is found in other ways. */
static __always_inline u64 python_walk(struct memleak_actor *actor)
{
	return 0;
}
static __always_inline int python_keep(u64 pid_tgid, u64 hash, u32 instance, u32 probe_set, u32 slot)
{
	return 0;
}

#endif
#endif
