// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Kernel memory that leaks in known amounts: a module for the tests in virtual machines.
 *
 * Each kind of allocation is a parameter. Writing a number to it allocates that many objects more, in a function of
 * the parameter's name (`leakmod_leak_kmalloc`, `leakmod_churn_rcu`), either with insmod or while it is loaded:
 *
 *   insmod leakmod.ko kmalloc=101
 *   echo 31 >/sys/module/leakmod/parameters/percpu
 *
 * What a `leak` function allocates stays until the module is removed, or for ever with `abandon=1`; reading the
 * parameter tells how many objects there are. What a `churn` function allocates it also frees. Objects are kept in lists
 * that run through themselves, so that the module needs no memory of its own.
 */
#include <linux/irq_work.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

/* Sizes that are no size of a cache. tests/suite/kernel.rs knows them. */
#define KMALLOC_BYTES 97
#define KMALLOC_LARGE_BYTES 12289
#define KREALLOC_FIRST_BYTES 33
#define KREALLOC_BYTES 211
#define KVMALLOC_BYTES 1201
#define CACHE_BYTES 360
#define VMALLOC_BYTES 20011
#define PAGES_ORDER 2
#define PERCPU_BYTES 52
#define RCU_BYTES 120

/* Of kind `size`; not constant, so that kmalloc() cannot choose the cache when it is compiled. */
static unsigned int size = 73;
module_param(size, uint, 0644);

static bool abandon;
module_param(abandon, bool, 0644);

static struct kmem_cache *leakmod_cache;

/* The head of every object. */
struct object {
	struct object *next;
};

struct rcu_object {
	struct rcu_head rcu;
	char payload[RCU_BYTES - sizeof(struct rcu_head)];
};

/* Objects of one kind. */
struct kind {
	int (*run)(struct kind *kind, unsigned int count);
	void (*free)(struct object *object);
	struct object *held;
	unsigned int count;
	unsigned int at_load; /* objects that insmod has asked for */
};

static void hold(struct kind *kind, void *memory)
{
	struct object *object = memory;

	object->next = kind->held;
	kind->held = object;
	kind->count++;
}

/*
 * A function that allocates and keeps: `allocate` is an expression, `head` the address of the memory behind `got`. Its
 * own call stack is the site, so it must not be inlined, and what follows the call keeps it from being a jump.
 */
#define LEAK(name, type, allocate, head)                                               \
	static noinline int leakmod_leak_##name(struct kind *kind, unsigned int count) \
	{                                                                              \
		while (count--) {                                                      \
			type got = allocate;                                           \
                                                                                       \
			if (!got)                                                      \
				return -ENOMEM;                                        \
			hold(kind, head);                                              \
		}                                                                      \
		return 0;                                                              \
	}

LEAK(kmalloc, void *, kmalloc(KMALLOC_BYTES, GFP_KERNEL), got)
LEAK(kmalloc_size, void *, kmalloc(READ_ONCE(size), GFP_KERNEL), got)
LEAK(kmalloc_large, void *, kmalloc(KMALLOC_LARGE_BYTES, GFP_KERNEL), got)
LEAK(kmalloc_node, void *, kmalloc_node(KMALLOC_BYTES, GFP_KERNEL, numa_node_id()), got)
LEAK(krealloc, void *, krealloc(kmalloc(KREALLOC_FIRST_BYTES, GFP_KERNEL), KREALLOC_BYTES, GFP_KERNEL), got)
LEAK(kvmalloc, void *, kvmalloc(KVMALLOC_BYTES, GFP_KERNEL), got)
LEAK(cache, void *, kmem_cache_alloc(leakmod_cache, GFP_KERNEL), got)
LEAK(vmalloc, void *, vmalloc(VMALLOC_BYTES), got)
LEAK(pages, struct page *, alloc_pages(GFP_KERNEL, PAGES_ORDER), page_address(got))
/* Per-CPU memory is known by an address that is none: the object is the first CPU's copy. */
LEAK(percpu, void __percpu *, __alloc_percpu(PERCPU_BYTES, 8), per_cpu_ptr(got, 0))

static void free_slab(struct object *object)
{
	kfree(object);
}

static void free_kvmalloc(struct object *object)
{
	kvfree(object);
}

static void free_cache(struct object *object)
{
	kmem_cache_free(leakmod_cache, object);
}

static void free_vmalloc(struct object *object)
{
	vfree(object);
}

static void free_page_block(struct object *object)
{
	__free_pages(virt_to_page(object), PAGES_ORDER);
}

static void free_percpu_copy(struct object *object)
{
	free_percpu((void __percpu *)((unsigned long)object - per_cpu_offset(0)));
}

#define BULK 16

/* Allocated in bulk, which no tracepoint shows. */
static noinline int leakmod_leak_bulk(struct kind *kind, unsigned int count)
{
	while (count) {
		void *objects[BULK];
		unsigned int i, n = min_t(unsigned int, count, BULK);

		/* The result is a number or a truth value, depending on the kernel; it allocates all or nothing. */
		if (!kmem_cache_alloc_bulk(leakmod_cache, GFP_KERNEL, n, objects))
			return -ENOMEM;
		for (i = 0; i < n; i++)
			hold(kind, objects[i]);
		count -= n;
	}
	return 0;
}

/* Allocated one by one, freed in bulk: looks like a leak where the freeing cannot be seen. */
static noinline int leakmod_churn_bulk(struct kind *kind, unsigned int count)
{
	while (count) {
		void *objects[BULK];
		unsigned int n = 0;

		for (; n < BULK && count; count--) {
			objects[n] = kmem_cache_alloc(leakmod_cache, GFP_KERNEL);
			if (!objects[n])
				break;
			n++;
		}
		if (!n)
			return -ENOMEM;
		kmem_cache_free_bulk(leakmod_cache, n, objects);
		kind->count += n;
	}
	return 0;
}

static noinline int leakmod_churn_kmalloc(struct kind *kind, unsigned int count)
{
	while (count--) {
		void *object = kmalloc(KMALLOC_BYTES, GFP_KERNEL);

		if (!object)
			return -ENOMEM;
		OPTIMIZER_HIDE_VAR(object);
		kfree(object);
		kind->count++;
	}
	return 0;
}

static noinline int leakmod_churn_cache(struct kind *kind, unsigned int count)
{
	while (count--) {
		void *object = kmem_cache_alloc(leakmod_cache, GFP_KERNEL);

		if (!object)
			return -ENOMEM;
		kmem_cache_free(leakmod_cache, object);
		kind->count++;
	}
	return 0;
}

/* Handed over to RCU, which frees later, in bulk. */
static noinline int leakmod_churn_rcu(struct kind *kind, unsigned int count)
{
	while (count--) {
		struct rcu_object *object = kmalloc(sizeof(*object), GFP_KERNEL);

		if (!object)
			return -ENOMEM;
		kfree_rcu(object, rcu);
		kind->count++;
		cond_resched();
	}
	return 0;
}

struct irq_object {
	struct irq_work work;
	struct object *later;
};

static struct object *irq_object;

static void free_in_interrupt(struct irq_work *work)
{
	kfree(xchg(&irq_object, NULL));
}

/* Freed in interrupt context. */
static noinline int leakmod_churn_irq(struct kind *kind, unsigned int count)
{
	static struct irq_work work;

	while (count--) {
		struct object *object = kmalloc(KMALLOC_BYTES, GFP_KERNEL);

		if (!object)
			return -ENOMEM;
		init_irq_work(&work, free_in_interrupt);
		WRITE_ONCE(irq_object, object);
		irq_work_queue(&work);
		irq_work_sync(&work);
		kind->count++;
	}
	return 0;
}

static bool loaded;

static int set_kind(const char *text, const struct kernel_param *param)
{
	struct kind *kind = param->arg;
	unsigned int count;
	int error = kstrtouint(text, 10, &count);

	if (error)
		return error;
	if (!loaded) {
		kind->at_load = count;
		return 0;
	}
	return kind->run(kind, count);
}

static int get_kind(char *text, const struct kernel_param *param)
{
	const struct kind *kind = param->arg;

	return sprintf(text, "%u\n", kind->count);
}

static const struct kernel_param_ops kind_ops = { .set = set_kind, .get = get_kind };

#define KIND(name, run_it, free_it)                                          \
	static struct kind kind_##name = { .run = run_it, .free = free_it }; \
	module_param_cb(name, &kind_ops, &kind_##name, 0644)

KIND(kmalloc, leakmod_leak_kmalloc, free_slab);
KIND(kmalloc_size, leakmod_leak_kmalloc_size, free_slab);
KIND(kmalloc_large, leakmod_leak_kmalloc_large, free_slab);
KIND(kmalloc_node, leakmod_leak_kmalloc_node, free_slab);
KIND(krealloc, leakmod_leak_krealloc, free_slab);
KIND(kvmalloc, leakmod_leak_kvmalloc, free_kvmalloc);
KIND(cache, leakmod_leak_cache, free_cache);
KIND(bulk, leakmod_leak_bulk, free_cache);
KIND(vmalloc, leakmod_leak_vmalloc, free_vmalloc);
KIND(pages, leakmod_leak_pages, free_page_block);
KIND(percpu, leakmod_leak_percpu, free_percpu_copy);
KIND(churn, leakmod_churn_kmalloc, NULL);
KIND(churn_cache, leakmod_churn_cache, NULL);
KIND(churn_bulk, leakmod_churn_bulk, NULL);
KIND(churn_rcu, leakmod_churn_rcu, NULL);
KIND(churn_irq, leakmod_churn_irq, NULL);

static struct kind *const kinds[] = {
	&kind_kmalloc,	   &kind_kmalloc_size, &kind_kmalloc_large, &kind_kmalloc_node, &kind_krealloc, &kind_kvmalloc,
	&kind_cache,	   &kind_bulk,	       &kind_vmalloc,	    &kind_pages,	&kind_percpu,	&kind_churn,
	&kind_churn_cache, &kind_churn_bulk,   &kind_churn_rcu,	    &kind_churn_irq,
};

static void free_all(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(kinds); i++) {
		struct object *object = kinds[i]->held;

		while (object) {
			struct object *next = object->next;

			kinds[i]->free(object);
			object = next;
		}
		kinds[i]->held = NULL;
	}
}

/* With a constructor a cache is not merged with others of its size, and keeps its name. */
static void construct(void *object)
{
}

static int __init leakmod_init(void)
{
	int error = 0;
	unsigned int i;

	if (size < sizeof(struct object))
		return -EINVAL;
	leakmod_cache =
	    kmem_cache_create("leakmod_cache", CACHE_BYTES, 0, SLAB_ACCOUNT | SLAB_HWCACHE_ALIGN, construct);
	if (!leakmod_cache)
		return -ENOMEM;
	for (i = 0; !error && i < ARRAY_SIZE(kinds); i++)
		error = kinds[i]->run(kinds[i], kinds[i]->at_load);
	if (error) {
		free_all();
		kmem_cache_destroy(leakmod_cache);
		return error;
	}
	loaded = true;
	return 0;
}

static void __exit leakmod_exit(void)
{
	if (abandon)
		return;
	free_all();
	kmem_cache_destroy(leakmod_cache);
}

module_init(leakmod_init);
module_exit(leakmod_exit);
MODULE_DESCRIPTION("leaks kernel memory in known amounts");
MODULE_LICENSE("GPL");
