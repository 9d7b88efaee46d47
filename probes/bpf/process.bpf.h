/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Lives of processes: exec, exit and fork from raw tracepoints, loads from a uprobe on the dynamic linker's
 * debugger hook. A watched process is dropped here, at once: whoever takes its pid next must not be counted as it.
 */
#ifndef PROCESS_BPF_H
#define PROCESS_BPF_H

#include "maps.bpf.h"
#include "compat.bpf.h"

#define SIGSTOP 19

/*
 * Room for an event; NULL (and counted) when there is none. Who stops a process does it between this and the submit:
 * an untold stop would last for ever, and once told the collector may let the process go on at any time.
 */
static __always_inline struct memleak_process_event *new_process_event(u32 kind, u32 pid,
								       const struct memleak_target *target, u32 child)
{
	struct memleak_process_event *e = bpf_ringbuf_reserve(&process_events, sizeof(*e), 0);

	if (!e) {
		if (target)
			count(target->slot, COUNTER_EVENTS_DROPPED);
		return 0;
	}
	e->kind = kind;
	e->pid = pid;
	e->instance = target ? target->instance : 0;
	e->child = child;
	e->time_ns = bpf_ktime_get_ns();
	return e;
}

/* Tells of something that happened to the current process, and stops it if asked to. */
static __always_inline void process_event(u32 kind, u32 pid, const struct memleak_target *target, u32 child, bool stop)
{
	struct memleak_process_event *e = new_process_event(kind, pid, target, child);

	if (!e)
		return;
	if (stop)
		bpf_send_signal(SIGSTOP);
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

/* Drops what is kept of a thread of a watched process. */
static __always_inline void forget_thread(u64 pid_tgid)
{
	struct memleak_thread_key key = { .pid_tgid = pid_tgid };
	int i;

	for (i = 0; i < MEMLEAK_MAX_DOMAINS; i++) {
		key.domain = i;
		bpf_map_delete_elem(&threads, &key);
	}
	bpf_map_delete_elem(&python_threads, &pid_tgid);
}

SEC("raw_tp/sched_process_exec")
int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	struct memleak_target target = {};
	u64 pid_tgid = current_pid_tgid();
	u32 tgid = pid_tgid >> 32, old_tid = ctx->args[1];
	bool watched;

	if (!tgid)
		return 0;
	watched = end_watch(tgid, &target);
	if (watched) {
		forget_thread(pid_tgid);
		/*
		 * Another thread than the first one has taken that one's number over. (In a pid namespace its old number
		 * there is not known.)
		 */
		if (!pidns_ino && old_tid != tgid)
			forget_thread((u64)tgid << 32 | old_tid);
	}
	process_event(PROCESS_EXEC, tgid, watched ? &target : 0, 0, bpf_map_lookup_elem(&launched, &tgid));
	return 0;
}

SEC("raw_tp/sched_process_exit")
int process_exit(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct memleak_target target = {};
	u64 pid_tgid = current_pid_tgid();
	u32 tgid = pid_tgid >> 32;

	if (!bpf_map_lookup_elem(&targets, &tgid))
		return 0;
	forget_thread(pid_tgid);
	if (BPF_CORE_READ(task, signal, live.counter) > 0)
		return 0; /* other threads go on */
	if (end_watch(tgid, &target))
		process_event(PROCESS_EXIT, tgid, &target, BPF_CORE_READ(task, exit_code), false);
	return 0;
}

/* Deepest nesting of pid namespaces that the kernel allows. */
#define MAX_PIDNS_LEVELS 32

/* The process id of another task in the collector's pid namespace; 0 when it is not visible from there. */
static __always_inline u32 tgid_of(struct task_struct *task)
{
	struct pid *pid;
	u32 levels, i;

	if (!pidns_ino)
		return BPF_CORE_READ(task, tgid);
	pid = BPF_CORE_READ(task, thread_pid);
	levels = BPF_CORE_READ(pid, level) + 1;
	for (i = 0; i < MAX_PIDNS_LEVELS; i++) {
		struct upid *numbers = (void *)pid + bpf_core_field_offset(struct pid, numbers);
		struct upid *number = (void *)numbers + i * bpf_core_type_size(struct upid);

		if (i >= levels)
			break;
		if (BPF_CORE_READ(number, ns, ns.inum) == pidns_ino)
			return BPF_CORE_READ(number, nr);
	}
	return 0;
}

/*
 * The child of a watched process: its process id, 0 for a thread and for what is not watched. A child that shares its
 * parent's memory until it calls exec (vfork, posix_spawn) has nothing of its own to trace until then.
 */
static __always_inline u32 child_of_watched(struct task_struct *child, bool *own_memory)
{
	struct task_struct *parent = (void *)bpf_get_current_task();
	u32 tgid = current_pid_tgid() >> 32;

	*own_memory = false;
	if (!bpf_map_lookup_elem(&targets, &tgid) || BPF_CORE_READ(child, tgid) == BPF_CORE_READ(parent, tgid))
		return 0;
	*own_memory = BPF_CORE_READ(child, mm) != BPF_CORE_READ(parent, mm);
	return tgid_of(child);
}

static __always_inline struct memleak_process_event *new_child_event(u32 child, bool own_memory)
{
	u32 tgid = current_pid_tgid() >> 32;
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);

	return target ? new_process_event(own_memory ? PROCESS_FORK : PROCESS_VFORK, tgid, target, child) : 0;
}

SEC("raw_tp/sched_process_fork")
int process_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct memleak_process_event *e;
	bool own_memory;
	u32 child = child_of_watched((void *)ctx->args[1], &own_memory);

	if (!child)
		return 0;
	e = new_child_event(child, own_memory);
	if (e)
		bpf_ringbuf_submit(e, 0);
	return 0;
}

/* In place of process_fork: stops the child before its first instruction. Needs bpf_send_signal_task() (6.13). */
SEC("tp_btf/sched_process_fork")
int process_fork_stop(u64 *ctx)
{
	struct task_struct *task = (void *)ctx[1];
	struct memleak_process_event *e;
	bool own_memory;
	u32 child = child_of_watched(task, &own_memory), one = 1;

	if (!child)
		return 0;
	e = new_child_event(child, own_memory);
	if (!e)
		return 0;
	bpf_map_update_elem(&launched, &child, &one, BPF_ANY);
	if (own_memory && bpf_ksym_exists(bpf_send_signal_task))
		bpf_send_signal_task(task, SIGSTOP, PIDTYPE_TGID, 0);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* exit() of the C library, before the handlers run: what they free is no leak. */
SEC("uprobe")
int process_exiting(struct pt_regs *ctx)
{
	u32 tgid = current_pid_tgid() >> 32;
	struct memleak_target *target = bpf_map_lookup_elem(&targets, &tgid);

	if (!target)
		return 0;
	process_event(PROCESS_EXITING, tgid, target, 0, true);
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
	process_event(PROCESS_LOAD, tgid, target, 0, target->stop_on_load);
	return 0;
}

#endif
