/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel types that we read, and only their fields that we read: offsets come from the running kernel's BTF
 * (CO-RE), so nothing here needs to match the real layout. What is stable interface (struct pt_regs, the helpers'
 * structures) comes from the system's own headers.
 */
#ifndef KERNEL_TYPES_BPF_H
#define KERNEL_TYPES_BPF_H

#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <stdbool.h>

typedef __u8 u8;
typedef __u32 u32;
typedef __u64 u64;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live; /* threads that have not exited */
};

struct ns_common {
	unsigned int inum;
};

struct pid_namespace {
	struct ns_common ns;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	unsigned int level;
	struct upid numbers[1]; /* one per namespace, the kernel's first one first */
};

struct mm_struct {
	int map_count;
};

struct thread_struct {
	unsigned long fsbase; /* x86-64: where a thread's own data begins */
};

struct task_struct {
	struct thread_struct thread;
	int tgid;
	int exit_code;
	struct signal_struct *signal;
	struct mm_struct *mm;
	struct pid *thread_pid;
};

struct kmem_cache {
	unsigned int size; /* of an object with what belongs to it */
	unsigned int object_size;
	const char *name;
};

enum pid_type {
	PIDTYPE_PID,
	PIDTYPE_TGID,
};

#pragma clang attribute pop

#endif
