/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Differences between kernels and architectures; nothing else tests for them.
 */
#ifndef COMPAT_BPF_H
#define COMPAT_BPF_H

#include "kernel_types.bpf.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/*
 * bpf_session_is_return() came without an argument (6.13) and takes the context since 7.0. libbpf resolves a weak
 * extern by its prototype and ignores what follows the three underscores, so that one of the two names is there.
 */
extern bool bpf_session_is_return___plain(void) __ksym __weak;
extern bool bpf_session_is_return___ctx(void *ctx) __ksym __weak;

static __always_inline bool session_is_return(void *ctx)
{
	if (bpf_ksym_exists(bpf_session_is_return___ctx))
		return bpf_session_is_return___ctx(ctx);
	if (bpf_ksym_exists(bpf_session_is_return___plain))
		return bpf_session_is_return___plain();
	return false;
}

/* Signals to other tasks than the current one came with 6.13. */
extern int bpf_send_signal_task(struct task_struct *task, int sig, enum pid_type type, u64 value) __ksym __weak;

/* Interrupts of a CPU can be held off by a program since 6.14, and global functions be called meanwhile since 6.15. */
extern void bpf_local_irq_save(unsigned long *flags) __ksym __weak;
extern void bpf_local_irq_restore(unsigned long *flags) __ksym __weak;

/* Preemption can be held off since 6.10, and global functions be called meanwhile since 6.15. */
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

#if defined(__TARGET_ARCH_x86)
/* `ret` pops the return address. */
#define RETURN_SP_RISE 8

/* Where the function that was just entered will return to; 0 when it cannot be read. */
static __always_inline u64 return_address(struct pt_regs *ctx, u64 sp)
{
	u64 address = 0;

	bpf_probe_read_user(&address, sizeof(address), (void *)sp);
	return address;
}
#elif defined(__TARGET_ARCH_arm64)
#define RETURN_SP_RISE 0

static __always_inline u64 return_address(struct pt_regs *ctx, u64 sp)
{
	return PT_REGS_RET(ctx);
}
#else
#error "unsupported architecture"
#endif

/*
 * True for the address that a return probe puts in place of a function's return address: a page that the kernel maps
 * at the very end of the address space (2^47, 2^48, 2^52 or 2^56 bytes), where no program has code.
 */
static __always_inline bool is_return_trampoline(u64 address)
{
	u64 end = (address | 0x1fff) + 1;

	return end >> 38 && !(end & (end - 1));
}

#endif
