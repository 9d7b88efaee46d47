/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The sampler's arithmetic for the loader and its tests, compiled for the machine that this runs on. */
#include "sampler.h"

__u64 memleak_sampler_distance(__u32 random, __u64 mean);
void memleak_sampler_share(__u64 size, __u64 mean, struct memleak_share *out);

__u64 memleak_sampler_distance(__u32 random, __u64 mean)
{
	return sampler_distance(random, mean);
}

void memleak_sampler_share(__u64 size, __u64 mean, struct memleak_share *out)
{
	sampler_share(size, mean, sampler_weight(size, mean), out);
}
