/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Lives of processes: exec, exit and fork from raw tracepoints, loads from a uprobe on the dynamic linker's
 * debugger hook. A watched process is dropped here, at once: whoever takes its pid next must not be counted as it.
 */
#ifndef PROCESS_BPF_H
#define PROCESS_BPF_H

#include "maps.bpf.h"

#define SIGSTOP 19

static __always_inline void process_event(u32 kind, u32 pid, const struct memleak_target *target, u32 child)
{
	struct memleak_process_event *e = bpf_ringbuf_reserve(&process_events, sizeof(*e), 0);

	if (!e) {
		if (target)
			count(target->slot, COUNTER_EVENTS_DROPPED);
		return;
	}
	e->kind = kind;
	e->pid = pid;
	e->instance = target ? target->instance : 0;
	e->child = child;
	e->time_ns = bpf_ktime_get_ns();
	bpf_ringbuf_submit(e, 0);
}

/* Ends the watch of `tgid`; false when it was not watched. */
static __always_inline bool end_watch(u32 tgid, struct memleak_target *out)
{
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);

	if (!target)
		return false;
	*out = *target;
	bpf_map_delete_elem(&targets, &tgid);
	return true;
}

SEC("raw_tp/sched_process_exec")
int process_exec(void *ctx)
{
	struct memleak_target target = {};
	u32 tgid = current_pid_tgid() >> 32;
	bool watched;

	if (!tgid)
		return 0;
	watched = end_watch(tgid, &target);
	if (bpf_map_lookup_elem(&launched, &tgid))
		bpf_send_signal(SIGSTOP);
	process_event(PROCESS_EXEC, tgid, watched ? &target : 0, 0);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int process_exit(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct memleak_thread_key key = { .pid_tgid = current_pid_tgid() };
	struct memleak_target target = {};
	u32 tgid = key.pid_tgid >> 32;
	int i;

	if (!bpf_map_lookup_elem(&targets, &tgid))
		return 0;
	for (i = 0; i < MEMLEAK_MAX_DOMAINS; i++) {
		key.domain = i;
		bpf_map_delete_elem(&threads, &key);
	}
	if (BPF_CORE_READ(task, signal, live.counter) > 0)
		return 0; /* other threads go on */
	if (end_watch(tgid, &target))
		process_event(PROCESS_EXIT, tgid, &target, 0);
	return 0;
}

SEC("raw_tp/sched_process_fork")
int process_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (void *)ctx->args[1];
	u32 tgid = current_pid_tgid() >> 32;
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);
	u32 kernel_tgid = bpf_get_current_pid_tgid() >> 32;
	u32 child_tgid;

	if (!target)
		return 0;
	child_tgid = BPF_CORE_READ(child, tgid);
	if (child_tgid != kernel_tgid) /* equal: a new thread */
		process_event(PROCESS_FORK, tgid, target, child_tgid);
	return 0;
}

/* _dl_debug_state() is called for debuggers after each change of the list of loaded objects. */
SEC("uprobe")
int process_load(struct pt_regs *ctx)
{
	u32 tgid = current_pid_tgid() >> 32;
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);

	if (!target)
		return 0;
	if (target->stop_on_load)
		bpf_send_signal(SIGSTOP);
	process_event(PROCESS_LOAD, tgid, target, 0);
	return 0;
}

#endif
