/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Where a probe finds a value: in a register, in memory that a register points at, or in the manifest. Which of these
 * is worked out by the collector (probes/src/placement, probes/src/usdt.rs). Registers are numbered as the processor's
 * instructions do.
 */
#ifndef OPERAND_BPF_H
#define OPERAND_BPF_H

#include "kernel_types.bpf.h"
#include "memleak_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <stddef.h>

/* In assembly: clang merges plain loads into one at a variable offset, which the verifier refuses for a context. */
#define REGISTER(ctx, field)                                                                  \
	({                                                                                    \
		u64 value_;                                                                   \
		asm volatile("%0 = *(u64 *)(%1 + %2)"                                         \
			     : "=r"(value_)                                                   \
			     : "r"(ctx), "i"(offsetof(typeof(*__PT_REGS_CAST(ctx)), field))); \
		value_;                                                                       \
	})

static __always_inline u64 register_value(struct pt_regs *ctx, u32 number)
{
	switch (number) {
#if defined(__TARGET_ARCH_x86)
	case 0:
		return REGISTER(ctx, rax);
	case 1:
		return REGISTER(ctx, rcx);
	case 2:
		return REGISTER(ctx, rdx);
	case 3:
		return REGISTER(ctx, rbx);
	case 4:
		return REGISTER(ctx, rsp);
	case 5:
		return REGISTER(ctx, rbp);
	case 6:
		return REGISTER(ctx, rsi);
	case 7:
		return REGISTER(ctx, rdi);
	case 8:
		return REGISTER(ctx, r8);
	case 9:
		return REGISTER(ctx, r9);
	case 10:
		return REGISTER(ctx, r10);
	case 11:
		return REGISTER(ctx, r11);
	case 12:
		return REGISTER(ctx, r12);
	case 13:
		return REGISTER(ctx, r13);
	case 14:
		return REGISTER(ctx, r14);
	case 15:
		return REGISTER(ctx, r15);
#elif defined(__TARGET_ARCH_arm64)
	case 0:
		return REGISTER(ctx, regs[0]);
	case 1:
		return REGISTER(ctx, regs[1]);
	case 2:
		return REGISTER(ctx, regs[2]);
	case 3:
		return REGISTER(ctx, regs[3]);
	case 4:
		return REGISTER(ctx, regs[4]);
	case 5:
		return REGISTER(ctx, regs[5]);
#endif
	default:
		return 0;
	}
}

/* The value; 0 when there is none or the memory cannot be read. */
static __always_inline u64 operand(struct pt_regs *ctx, const struct memleak_operand *from)
{
	u32 bytes = (from->last_byte & 7) + 1;
	u64 value = 0;
	u32 unused;

	switch (from->kind) {
	case OPERAND_CONSTANT:
		return from->value;
	case OPERAND_REGISTER:
		value = register_value(ctx, from->number);
		break;
	case OPERAND_MEMORY:
		if (bpf_probe_read_user(&value, bytes, (void *)(register_value(ctx, from->number) + from->value)))
			return 0;
		break;
	default:
		return 0;
	}
	unused = 64 - 8 * bytes;
	value <<= unused;
	return from->is_signed ? (u64)((__s64)value >> unused) : value >> unused;
}

#endif
