// A library whose only function calls back, from a place that moves when PADDING is defined.
#ifdef PADDING
__attribute__((noinline)) int padding_before_everything(int x) {
    volatile int sum = 0;
    for (int i = 0; i < x; i++) sum += i * x;
    return sum;
}
#define plugin_call_itself other_name
#endif

__attribute__((noinline)) void plugin_call_itself(void (*f)(void)) {
    f(); // LINE plugin
    __asm__ volatile("" ::: "memory");
}

void plugin_call(void (*f)(void)) {
    plugin_call_itself(f);
    __asm__ volatile("" ::: "memory");
}
