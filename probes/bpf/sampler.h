/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which allocations are recorded when not all are, and what each stands for. Pure arithmetic on integers: the BPF programs
 * include it, and so does a C file that the loader and its tests call, so that what is tested is what runs.
 *
 * Points are thrown at random on the line of all bytes that a thread asks for, on average one in `mean` bytes (a Poisson
 * process); an allocation with at least one point in it is recorded. That has the probability 1 - exp(-size / mean),
 * whatever came before, so that the recorded block stands for 1 / (1 - exp(-size / mean)) blocks of its size: its weight.
 * Sums of weights are unbiased. The weight follows from size and mean alone, so it needs no room in the table.
 *
 * Precision: probabilities are right within 1e-6 of themselves, weights within 2^-16.
 */
#ifndef MEMLEAK_SAMPLER_H
#define MEMLEAK_SAMPLER_H

#include <linux/types.h>

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

enum memleak_sampler {
	SAMPLER_MAX_MEAN = 1 << 26, /* bytes; with more, sums of variances could overflow */
	SAMPLER_WEIGHT_BITS = 16, /* fractional bits of weights, and of counts that are sums of them */
	SAMPLER_COUNT_VARIANCE_BITS = 8, /* fractional bits of variances of counts */
	SAMPLER_BYTES_VARIANCE_BITS = 10, /* variances of bytes are in units of (mean / 2^this)^2 */
	SAMPLER_CERTAIN = 12, /* from so many means of size on every block is recorded, as good as surely */
};

/* -ln((random + 1) / 2^32) with 24 fractional bits: logarithm to base 2 bit by bit, by squaring. */
static __always_inline __u64 sampler_neg_ln(__u32 random)
{
	__u64 x = (__u64)random + 1, log = 0;
	int i;

	/* x * 2^-31 in 1 .. 2, and the whole part of the logarithm. */
	if (x >> 32)
		return 0;
	for (i = 16; i; i /= 2) {
		if (x >> (32 - i))
			continue;
		x <<= i;
		log += i;
	}
	/* Now -log2 of the number is log + 1 - log2(x * 2^-31). */
	log = (log + 1) << 24;
	for (i = 23; i >= 0; i--) {
		__u64 bit;

		/* Without a branch: the verifier would follow both sides of each. */
		x = x * x >> 31;
		bit = x >> 32;
		x >>= bit;
		log -= bit << i;
	}
	/* Times ln 2. */
	return log * 2977044472ULL >> 32;
}

/* Bytes up to the next point: exponentially distributed around `mean`, rounded down, for 32 random bits. */
static __always_inline __u64 sampler_distance(__u32 random, __u64 mean)
{
	return mean * sampler_neg_ln(random) >> 24;
}

/*
 * Weight of a recorded block, with SAMPLER_WEIGHT_BITS fractional bits: (1 + coth(x / 2)) / 2 for x = size / mean. The
 * series is good to 1e-6 below 1, so the mean is doubled until x is; coth(2 y) = (coth(y) + 1 / coth(y)) / 2 leads back.
 */
static __always_inline __u64 sampler_weight(__u64 size, __u64 mean)
{
	__u64 x, x2, coth;
	int i, doublings = 0;

	if (!size)
		size = 1; /* as for the decision */
	if (size >= SAMPLER_CERTAIN * mean)
		return 1 << SAMPLER_WEIGHT_BITS;
	for (i = 0; i < 4; i++) {
		if (size < mean)
			break;
		mean *= 2;
		doublings++;
	}
	/* 28 fractional bits. */
	x = (size << 28) / mean;
	x2 = x * x >> 28;
	coth = (mean << 29) / size + x / 6 - (x * x2 >> 28) / 360 + ((x * x2 >> 28) * x2 >> 28) / 15120;
	for (i = 0; i < 4; i++) {
		if (i < doublings)
			coth = (coth + (1ULL << 56) / coth) / 2;
	}
	return ((1ULL << 28) + coth + (1 << 12)) >> 13;
}

/* What a recorded block adds to the sums of its site. */
struct memleak_share {
	__u64 bytes;
	__u64 count; /* SAMPLER_WEIGHT_BITS fractional bits */
	__u64 bytes_variance; /* see SAMPLER_BYTES_VARIANCE_BITS */
	__u64 count_variance; /* SAMPLER_COUNT_VARIANCE_BITS fractional bits */
};

/*
 * `weight` is sampler_weight(size, mean). The same size always gives the same share, so that a free takes off what the allocation has added. With weight w the
 * estimated variance of the sum is w (w - 1) size^2 (Horvitz and Thompson); for bytes that is never more than mean^2.
 */
static __always_inline void sampler_share(__u64 size, __u64 mean, __u64 weight, struct memleak_share *out)
{
	__u64 more = weight - (1 << SAMPLER_WEIGHT_BITS);

	out->count = weight;
	out->bytes = size;
	out->bytes_variance = 0;
	out->count_variance = 0;
	if (!more)
		return;
	out->bytes = (weight * size + (1 << (SAMPLER_WEIGHT_BITS - 1))) >> SAMPLER_WEIGHT_BITS;
	out->bytes_variance = ((weight * size >> (SAMPLER_WEIGHT_BITS - SAMPLER_BYTES_VARIANCE_BITS)) / mean) *
			      ((more * size >> (SAMPLER_WEIGHT_BITS - SAMPLER_BYTES_VARIANCE_BITS)) / mean);
	/* weight^2 may take 84 bits: large weights do without their fraction. */
	if (weight >> 31)
		out->count_variance = (weight >> SAMPLER_WEIGHT_BITS) * (more >> SAMPLER_WEIGHT_BITS)
				      << SAMPLER_COUNT_VARIANCE_BITS;
	else
		out->count_variance = weight * more >> (2 * SAMPLER_WEIGHT_BITS - SAMPLER_COUNT_VARIANCE_BITS);
}

#endif
