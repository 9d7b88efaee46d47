/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Structures and limits shared by the BPF programs and the loader. This header is the only place that defines
 * them: the Rust side gets generated twins (probes/src/types.rs) and asserts their sizes.
 *
 * Times are nanoseconds of CLOCK_MONOTONIC. Sizes are bytes.
 */
#ifndef MEMLEAK_TYPES_H
#define MEMLEAK_TYPES_H

#define MEMLEAK_MAX_FRAMES 127 /* most return addresses of a stack: a power of two less one */
#define MEMLEAK_COHORTS 16 /* birth generations that a site tells apart */
#define MEMLEAK_LIFETIME_CLASSES 32 /* class 0: < 1 us; class n: < 2^n us; the last is open */
#define MEMLEAK_MAX_FUNCTIONS 8192 /* probed functions over all targets */
#define MEMLEAK_MAX_TARGETS 1024 /* watched process instances at once */
#define MEMLEAK_CODE_RANGES 4 /* parts of the address space of a process that hold its code */
#define MEMLEAK_LEAF_CALLS 256 /* calls after which a function that was never seen to nest is taken for a leaf */
#define MEMLEAK_MAX_DOMAINS 8 /* independent groups of probe sets */
#define MEMLEAK_UNWIND_SEGMENTS 1024 /* pieces of code with unwind rows per process: a power of two */
#define MEMLEAK_UNWIND_PAGE_ROWS 65536 /* rows of one page: a power of two */
#define MEMLEAK_UNWIND_PAGES 512 /* most pages: 256 MiB */
#define MEMLEAK_UNWIND_CACHE 16384 /* remembered rules: a power of two */
#define MEMLEAK_NEAR_WORDS 32 /* words of the stack that are read at once: a power of two */
#define MEMLEAK_PYTHON_FRAMES 64 /* most Python frames of a stack: a power of two */
#define MEMLEAK_PYTHON_WORDS 16 /* of an interpreter's frame that are read: a power of two */
#define MEMLEAK_PYTHON_CODES 8192 /* Python functions that are remembered over all processes */
#define MEMLEAK_PYTHON_NAME 256 /* bytes of the object that holds a function's name, and of that with its file's */
#define MEMLEAK_PYTHON_LINES 1024 /* bytes of the object that holds a function's line table */

/* What a probed function does with a block. */
enum memleak_role {
	ROLE_ALLOC = 1, /* hands out a block */
	ROLE_REALLOC = 2, /* takes a block back and hands one out */
	ROLE_FREE = 3, /* takes a block back */
};

enum memleak_function_flags {
	FUNCTION_RANGE = 1, /* the block is an address range: it may be freed in parts (munmap) */
	FUNCTION_UNSAMPLED = 2, /* hands out such ranges: all are recorded, for a part of a sampled one means nothing */
	FUNCTION_AT_ENTRY = 4, /* the call tells of a block that has been handed out already */
	FUNCTION_IN_PLACE = 8, /* returns the block's size; less than was asked for: it has not changed */
	FUNCTION_INSIDE = 16, /* a tracepoint: the probe is somewhere in a function */
	FUNCTION_STEPPED = 32, /* the kernel single-steps the instruction under its entry probe */
};

enum memleak_operand_kind {
	OPERAND_NONE = 0,
	OPERAND_REGISTER = 1,
	OPERAND_CONSTANT = 2,
	OPERAND_MEMORY = 3, /* what the register plus `value` points at */
};

/* Where a probe finds a value, see operand.bpf.h. */
struct memleak_operand {
	__u8 kind; /* enum memleak_operand_kind */
	__u8 number; /* of the register */
	__u8 last_byte; /* width in bytes less one: 0 to 7 */
	__u8 is_signed;
	__u32 pad;
	__u64 value; /* the constant, or an offset */
};

/* One probed function: what its arguments mean. Its index is the attach cookie. */
struct memleak_function {
	__u32 probe_set;
	__u32 name; /* number of the function's name within the run */
	__u8 role; /* enum memleak_role */
	__u8 domain; /* nested calls within a domain count once */
	__u8 flags; /* enum memleak_function_flags */
	__u8 pad[5];
	struct memleak_operand size;
	struct memleak_operand times; /* multiplies the size */
	struct memleak_operand block; /* what is freed or resized; with FUNCTION_AT_ENTRY, handed out */
	struct memleak_operand out; /* points at the block after success; none: the block is returned */
	__u64 expect; /* with `out`: return value of success; else: return value of failure */
	__u64 sp_offset; /* stack pointer at the probe + sp_offset = stack pointer at the function's entry */
	/* Written by the programs: */
	__u32 followed; /* calls that were followed to their return; counted up to MEMLEAK_LEAF_CALLS */
	__u32 nests; /* it was seen to call another probed function of its domain */
};

struct memleak_range {
	__u64 start;
	__u64 end; /* the first address behind it; 0: the range is not used */
};

/* A watched process. Key of `targets`: tgid. Removed by the kernel side on exec and exit. */
struct memleak_target {
	__u32 instance; /* number of the process instance within the run */
	__u32 slot; /* its row in `counters` */
	__u32 stop_on_load; /* stop the process (SIGSTOP) when its dynamic linker has mapped something */
	__u32 window; /* number of the period with probes attached: what was pending in an earlier one is stale */
	__u32 runs_python; /* it is in `python_targets` */
	__u32 pad;
	__u64 record_until_ns; /* later allocations are not recorded; 0: all are */
	struct memleak_range code[MEMLEAK_CODE_RANGES]; /* no first range: not known, everything may be code */
};

/* Key of `blocks`. */
struct memleak_block_key {
	__u64 address;
	__u32 instance; /* 0: the kernel */
	__u32 domain;
};

/*
 * An outstanding allocation, packed: there may be millions, and an element of a hash map with 16 bytes of key and 24 of
 * value just fits the 96 bytes that the kernel takes for it; one byte more would cost 128. See enum memleak_block_bits.
 */
struct memleak_block {
	__u64 stack; /* with instance and probe_set: the site */
	__u64 size_cohort; /* size; birth generation; whether sampled */
	__u64 birth_set; /* birth in units of 2^BLOCK_BIRTH_SHIFT ns; probe set */
};

/* The low bits of the two packed words; what is above them is the other field. */
enum memleak_block_bits {
	BLOCK_SIZE_BITS = 48, /* more than an address space has; what claims to be larger counts as the largest */
	BLOCK_SAMPLED_BIT = 63, /* of size_cohort: stands for more than itself, see sampler.h */
	BLOCK_COHORT_BITS = 15, /* generations get longer with the run: in years there are not a thousand */
	BLOCK_BIRTH_BITS = 52, /* nine years of uptime */
	BLOCK_BIRTH_SHIFT = 6, /* births are kept in units of 64 ns */
	BLOCK_SET_BITS = 12,
};

/* Key of `sites` and `stacks`. */
struct memleak_site_key {
	__u64 stack; /* hash of frames and function */
	__u32 instance;
	__u32 probe_set;
};

struct memleak_cohort {
	__s64 bytes;
	__s64 count;
};

/*
 * Totals of a site. The counters only grow, except for the cohorts: slot g % MEMLEAK_COHORTS holds births minus
 * deaths of generation g while g is younger than MEMLEAK_COHORTS - 1 generations; later deaths go to older_freed.
 *
 * With sampling all of them are sums over what the recorded blocks stand for, counts with SAMPLER_WEIGHT_BITS fractional
 * bits (lifetimes too), and the variances are those of what is outstanding, see sampler.h.
 */
struct memleak_site {
	__u64 allocated_bytes;
	__u64 allocated_count;
	__u64 freed_bytes;
	__u64 freed_count;
	__u64 last_allocation_ns;
	__u64 older_freed_bytes;
	__u64 older_freed_count;
	__u64 bytes_variance;
	__u64 count_variance;
	__u64 unseen_frees; /* blocks whose address was handed out again without a free that was seen */
	struct memleak_cohort cohorts[MEMLEAK_COHORTS];
	__u64 lifetimes[MEMLEAK_LIFETIME_CLASSES];
};

/* Why a stack ends where it ends. */
enum memleak_stack_end {
	STACK_WALKED = 0, /* frame pointers led no further (outermost frame, or no frame pointer) */
	STACK_CUT = 1, /* the limit of frames was reached */
	STACK_UNREADABLE = 2, /* the stack could not be read further */
	STACK_STRAYED = 3, /* frame pointers led to an address that is no code: a caller has none */
	STACK_COMPLETE = 4, /* the outermost frame: where the program or the thread starts */
	STACK_NO_TABLE = 5, /* code without unwind rows, and frame pointers led no further */
	STACK_UNSUPPORTED = 6, /* unwind rows that need more than stack and frame pointer */
	STACK_TRAMPOLINE = 7, /* another tracer's return probe hides the caller */
	STACK_LOST = 8, /* a register that a frame needs is not known: the next frame would not lie above it */
};

/* How to find a caller's frame: low half of memleak_unwind_row.rule. CFA: stack pointer before the call. */
enum memleak_unwind_cfa {
	UNWIND_NONE = 0, /* nothing is known of this code */
	UNWIND_RSP = 1, /* CFA = rsp + 8 * cfa */
	UNWIND_RBP = 2, /* CFA = rbp + 8 * cfa */
	UNWIND_RBP_DEREF = 3, /* CFA = *(rbp + 8 * cfa): a frame whose stack was aligned */
	UNWIND_PLT = 4, /* CFA = rsp + 8, and 8 more behind the stub's push: from byte `cfa` of its 16 on */
	UNWIND_SIGNAL = 5, /* the kernel's signal frame is on top of the stack */
	UNWIND_OUTERMOST = 6, /* there is no caller */
	UNWIND_UNSUPPORTED = 7, /* another rule */
};

/* Where the caller's rbp is: high half of memleak_unwind_row.rule. */
enum memleak_unwind_rbp {
	UNWIND_RBP_SAME = 0 << 4, /* in the register */
	UNWIND_RBP_AT_CFA = 1 << 4, /* *(CFA + 8 * rbp) */
	UNWIND_RBP_AT_RBP = 2 << 4, /* *(rbp + 8 * rbp) */
	UNWIND_RBP_LOST = 3 << 4, /* not known */
};

/* From this address up to the next row's. */
struct memleak_unwind_row {
	__u32 pc; /* counted from the file's first loaded address */
	__s16 cfa;
	__u8 rule; /* enum memleak_unwind_cfa | enum memleak_unwind_rbp */
	__s8 rbp;
};

/* Rows of one or more tables, each sorted by pc. */
struct memleak_unwind_page {
	struct memleak_unwind_row rows[MEMLEAK_UNWIND_PAGE_ROWS];
};

/* Code of a process whose rows lie in one page: addresses start .. start + size, rows first .. first + count. */
struct memleak_unwind_segment {
	__u64 start;
	__u32 size;
	__u32 pc; /* what `start` is in the rows' terms */
	__u16 page;
	__u16 first;
	__u32 count;
};

/* All such code of a process, by address; what is not used starts at 2^63 - 1. Key of `unwind_maps`: instance. */
struct memleak_unwind_map {
	__u64 salt; /* random, another one after each change: keeps what is remembered of rules apart */
	struct memleak_unwind_segment segments[MEMLEAK_UNWIND_SEGMENTS];
};

/* A rule that was looked up before. Valid when check ^ rule is the address ^ the map's salt: written without locks. */
struct memleak_unwind_memo {
	__u64 check;
	__u64 rule; /* cfa, rule and rbp of the row, in the upper half */
};

/* Registers of a frame. */
struct memleak_unwind_regs {
	__u64 ip;
	__u64 sp;
	__u64 bp;
	__u64 exact; /* 1: the frame was interrupted at ip; 0: ip is the address behind a call */
	__u64 salt; /* of the process's unwind map */
};

/* A call stack: addresses[start .. start + count], innermost first. */
struct memleak_stack {
	__u32 start; /* 0 or 1 */
	__u32 count;
	__u32 end; /* enum memleak_stack_end */
	__u32 name; /* allocator function */
	__u32 tid; /* of the thread that made the site; 0: not visible from the collector's pid namespace */
	__u32 pad;
	char comm[16]; /* its name */
	__u64 addresses[MEMLEAK_MAX_FRAMES + 1];
};

/* A thread's call that has been entered and has not returned yet. Key: struct memleak_thread_key. */
struct memleak_thread {
	__u64 sp; /* stack pointer at entry of the outermost call; 0: no call is pending */
	__u64 size;
	__u64 out_pointer;
	__u64 old_address; /* realloc: the block taken back; 0: none was recorded */
	__u64 stack_hash;
	struct memleak_block old;
	__u64 until_sample; /* bytes to the next point of the sampler, plus 1; 0: not drawn yet */
	__u64 caller; /* return address, which a return probe may hide on the stack */
	struct memleak_unwind_regs regs; /* of the frame that unwinding has come to */
	__u64
	    near_from; /* of the words of the stack that were read last: address of the first one; 0: there are none */
	__u64 near[MEMLEAK_NEAR_WORDS];
	__u32 filtered; /* below min_size or not sampled: do not record */
	__u32 function; /* index of the pending function */
	__u32 window; /* in which it was entered */
	__u32 pad;
	struct memleak_stack stack;
};

struct memleak_thread_key {
	__u64 pid_tgid;
	__u64 domain;
};

/*
 * Where the Python interpreter of a process keeps what we read, see core/src/python. Key of `python_targets`: instance.
 * Offsets in bytes.
 */
struct memleak_python {
	__u64 interpreters; /* address of the pointer to the first interpreter state */
	__u32 threads; /* interpreter state: first thread state */
	__u32 thread_next; /* thread state: the next one */
	__u32 thread_id; /* thread state: pthread_self() */
	__u32 thread_frame; /* thread state: newest frame, or what holds it */
	__u32 frame_holder; /* in what holds it: newest frame; ~0: nothing is in between */
	__u32 code_first_line;
	__u32 code_names; /* code object: file name, name, qualified name, line table, one after the other */
	__u8 frame_code; /* frame, in words */
	__u8 frame_previous;
	__u8 frame_instruction;
	__u8 frame_flags;
	__u8 flags_shift; /* which byte of the flags ... */
	__u8 flags_entry; /* ... has which value in the outermost frame of a call of the interpreter; 0: any but 0 */
	__u8 entry_is_frame; /* 0: that frame stands for no function */
	__u8 pad[5];
};

/* A call of a Python function. */
struct memleak_python_frame {
	__u64 code; /* address of the code object */
	__u64 lines; /* address of its line table: tells code objects apart that had the same address */
	__u64 instruction; /* address; its lowest bit: outermost one of a call of the interpreter */
};

/* Python frames of a thread's newest recorded call, innermost first. Key of `python_threads`: pid_tgid. */
struct memleak_python_stack {
	__u32 count;
	__u32 cut; /* there were more */
	struct memleak_python_frame frames[MEMLEAK_PYTHON_FRAMES];
	/* Of the walk: */
	__u64 hash;
	__u64 thread; /* address of the thread state, once it is known */
	__u64 retry; /* calls until it is looked for again */
	__u64 next; /* frame that is to come */
	__u64 words[MEMLEAK_PYTHON_WORDS];
};

/* Key of `python_codes`. */
struct memleak_python_code_key {
	__u64 code;
	__u64 lines;
	__u64 instance;
};

/* What a code object says of itself, as the interpreter's objects have it. */
struct memleak_python_code {
	__u32 first_line;
	__u32 got; /* enum memleak_python_got */
	__u8 file[MEMLEAK_PYTHON_NAME];
	__u8 name[MEMLEAK_PYTHON_NAME];
	__u8 lines[MEMLEAK_PYTHON_LINES];
};

enum memleak_python_got {
	PYTHON_FILE = 1,
	PYTHON_NAME = 2,
	PYTHON_LINES = 4,
	PYTHON_FIRST_LINE = 8,
};

/* Rows of `counters`, per target slot. */
enum memleak_counter {
	COUNTER_HITS, /* probes hit: entries and returns */
	COUNTER_UNMATCHED_FREES, /* frees of unknown blocks */
	COUNTER_OUTSTANDING_FULL,
	COUNTER_SITES_FULL,
	COUNTER_STACKS_FULL,
	COUNTER_STACKS_FAILED,
	COUNTER_THREADS_FULL,
	COUNTER_MISSED_RETURNS,
	COUNTER_IMPLICIT_FREES,
	COUNTER_PARTIAL_RANGES,
	COUNTER_POINTERS_UNREADABLE,
	COUNTER_EVENTS_DROPPED,
	COUNTER_PYTHON_LOST, /* frames or names of Python functions without room, threads beyond PYTHON_THREADS */
	COUNTER_ALLOCATED_COUNT, /* with sampling: blocks handed out, recorded or not */
	COUNTER_ALLOCATED_BYTES, /* the same in bytes */
	COUNTER_HITS_STEPPED, /* of the hits: entries whose instruction the kernel single-steps */
	COUNTER_HITS_COOL, /* of the hits: those METER_COOL_NS to METER_COLD_NS after the last one on their CPU */
	COUNTER_HITS_COLD, /* of the hits: later ones */
	COUNTER_TIMED_NS, /* time in the programs, of the hits that were timed: see meter.bpf.h */
	COUNTER_MAX,
};

struct memleak_counters {
	__u64 values[COUNTER_MAX];
	__u64 last_hit_ns; /* on this CPU */
};

enum memleak_process_event_kind {
	PROCESS_EXEC = 1, /* any process of the machine */
	PROCESS_EXIT = 2, /* a watched process has ended */
	PROCESS_FORK = 3, /* a watched process has a child */
	PROCESS_LOAD = 4, /* the dynamic linker of a watched process has mapped or unmapped something */
	PROCESS_VFORK = 5, /* a watched process has a child that uses its memory until it calls exec */
	PROCESS_EXITING = 6, /* a watched process has called exit() and is stopped before its handlers run */
};

struct memleak_process_event {
	__u32 kind; /* enum memleak_process_event_kind */
	__u32 pid; /* tgid in the collector's pid namespace */
	__u32 instance; /* 0: not watched */
	__u32 child; /* PROCESS_FORK, _VFORK: tgid of the child; PROCESS_EXIT: status, as wait(2) gives it */
	__u64 time_ns;
};

enum memleak_event_kind {
	EVENT_ALLOC = 1,
	EVENT_FREE = 2,
	EVENT_IMPLICIT_FREE = 3,
};

/* One allocation or free, for `memleak trace`. */
struct memleak_event {
	__u64 time_ns;
	__u64 address;
	__u64 size;
	__u64 lifetime_ns; /* frees: time since the allocation */
	__u64 stack; /* of this call: key of `stacks` together with instance and probe_set */
	__u32 kind; /* enum memleak_event_kind */
	__u32 instance;
	__u32 probe_set;
	__u32 name; /* the function that was called; nothing for an implicit free */
	__u32 pid;
	__u32 tid;
	__u64 cgroup; /* id of the thread's */
	char comm[16];
};

/* What the kernel is probed at. Names the allocator function of a stack in place of struct memleak_stack.name. */
enum memleak_kernel_probe {
	KERNEL_KMALLOC,
	KERNEL_KMALLOC_NODE, /* up to Linux 6.0 */
	KERNEL_CACHE_ALLOC,
	KERNEL_CACHE_ALLOC_NODE, /* up to Linux 6.0 */
	KERNEL_KFREE,
	KERNEL_CACHE_FREE,
	KERNEL_PAGE_ALLOC,
	KERNEL_PAGE_FREE,
	KERNEL_PERCPU_ALLOC,
	KERNEL_PERCPU_FREE,
	KERNEL_VMAP_ALLOC, /* from Linux 6.4 on */
	KERNEL_VMAP_FREE, /* from Linux 6.4 on */
	KERNEL_PROBES = 12,
};

enum memleak_kernel_limits {
	KERNEL_LEVELS = 8, /* programs on one CPU that others have interrupted */
	KERNEL_TGIDS = 16, /* processes whose allocations are recorded alone */
	KERNEL_INNER = 32, /* functions below which pages count elsewhere */
	KERNEL_INNER_FRAMES = 12, /* how far up such a function is looked for */
	KERNEL_TRACER_FRAMES = 16, /* how far up the caller is looked for */
	KERNEL_NO_ARGUMENT = 255,
	KERNEL_FIRST_FUNCTION = 16, /* names from here on are those of functions */
	KERNEL_FUNCTIONS = 256, /* places where functions are probed */
	KERNEL_PENDING = 16384, /* calls under way */
	KERNEL_BULK = 64, /* blocks of one call that are followed */
};

/* What a function of the kernel does. */
enum memleak_kernel_role {
	KERNEL_ROLE_ALLOC = 1,
	KERNEL_ROLE_FREE = 2,
	KERNEL_ROLE_FREE_BULK = 3, /* of `count` blocks, whose addresses `block` points at */
	KERNEL_ROLE_FREE_AT =
	    4, /* of the block that lies `size` bytes before `block`; of block `size` when that is NULL */
};

/* A function of the kernel that is probed: which argument is what, from 0. */
struct memleak_kernel_function {
	__u32 probe_set;
	__u32 name;
	__u8 role; /* enum memleak_kernel_role */
	__u8 domain;
	__u8 block;
	__u8 size;
	__u8 cache;
	__u8 gfp;
	__u8 count;
	__u8 pad;
};

/* A call under way. Key: address of its return address, which no other call has. */
struct memleak_kernel_pending {
	__u64 stack; /* 0: not recorded */
	__u64 size;
	__u32 probe_set;
	__u32 name;
	__u32 domain;
	__u32 pad;
};

/* Which argument of a tracepoint is what, from 0; KERNEL_NO_ARGUMENT where there is none. */
struct memleak_kernel_layout {
	__u8 block;
	__u8 size; /* requested bytes; of pages, the order */
	__u8 object; /* bytes that are handed out */
	__u8 cache;
	__u8 gfp;
	__u8 caller;
	__u8 migrate_type;
	__u8 failed;
};

/* An allocation of the kernel, as a probe sees it. */
struct memleak_kernel_call {
	__u64 address;
	__u64 size; /* 0: the cache's */
	__u64 object_bytes; /* 0: the cache's */
	__u64 cache; /* struct kmem_cache; 0: not known */
	__u64 gfp;
	__u64 caller; /* return address; 0: not known */
	__u32 probe_set;
	__u32 name;
	__u32 domain; /* addresses of different kinds do not mix */
	__u32 order;
	__u32 migrate_type;
	__u32 pad;
};

/* Code whose allocations of a domain count elsewhere. */
struct memleak_kernel_range {
	__u64 start;
	__u64 end;
	__u64 domain;
};

/* What is known of a site of the kernel: of its first allocation, where allocations may differ. */
struct memleak_kernel_origin {
	__u64 object_bytes; /* what is handed out for each block: the same for all blocks of a site */
	__u64 gfp;
	__u64 cgroup;
	__u32 pid;
	__u32 tid;
	__u32 order;
	__u32 migrate_type;
	char comm[16];
	char cache[48];
};

#endif
