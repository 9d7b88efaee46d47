// Prints return addresses of known places, one line per word on standard input, and stays until that is closed.
#include <dlfcn.h>
#include <execinfo.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))
// Keeps the call in front of it from becoming a jump.
#define STAY __asm__ volatile("" ::: "memory")

// The caller's stack, innermost first.
NOINLINE void show(void) {
    void *addresses[64];
    int n = backtrace(addresses, 64);
    for (int i = 1; i < n; i++) printf("%lx ", (unsigned long)addresses[i]);
    printf("\n");
    fflush(stdout);
}

// The caller alone: nothing unwinds through generated code.
NOINLINE void show_caller(void) {
    printf("%lx\n", (unsigned long)__builtin_return_address(0));
    fflush(stdout);
}

INLINE void innermost(void) {
    show(); // LINE innermost
    STAY;
}

INLINE void middle(void) {
    innermost(); // LINE middle
    STAY;
}

NOINLINE void outer(void) {
    middle(); // LINE outer
    STAY;
}

// A call as the last instruction: the return address belongs to whatever comes next.
NOINLINE __attribute__((noreturn)) void ends_in_call(void (*leave)(void)) {
    leave();
    __builtin_unreachable();
}

static NOINLINE void generate(void) {
    // sub $8,%rsp; call *%rdi; add $8,%rsp; ret
    static const unsigned char code[] = {0x48, 0x83, 0xec, 8, 0xff, 0xd7, 0x48, 0x83, 0xc4, 8, 0xc3};
    unsigned char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(page + 64, code, sizeof code);
    char path[64];
    snprintf(path, sizeof path, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(path, "w");
    fprintf(map, "%lx %lx jit:<b>\x1b[1m name with spaces\n", (unsigned long)page + 64, (unsigned long)sizeof code);
    fclose(map);
    ((void (*)(void (*)(void)))(uintptr_t)(page + 64))(show_caller);
}

int main(int argc, char **argv) {
    char word[4096];
    void *plugin = NULL;
    if (argc > 1) plugin = dlopen(argv[1], RTLD_NOW);
    while (scanf("%4095s", word) == 1) {
        if (!strcmp(word, "stack")) {
            outer(); // LINE main
        } else if (!strcmp(word, "generated")) {
            generate();
        } else if (!strcmp(word, "plugin")) {
            void (*call)(void (*)(void)) = (void (*)(void (*)(void)))dlsym(plugin, "plugin_call");
            if (!call) return 3;
            call(show_caller);
        } else if (!strcmp(word, "unload")) {
            dlclose(plugin);
            printf("\n");
            fflush(stdout);
        } else {
            plugin = dlopen(word, RTLD_NOW);
            printf("\n");
            fflush(stdout);
        }
    }
    if (argc > 2) ends_in_call(abort);
    return 0;
}
