/*
 * A loop of port accesses in ring 3, which runs natively on every host: `count` of them at `port`, then
 * debug-exit 0. With ring=0 the same loop in ring 0, for hosts that interpret one and not the other.
 *
 * Options: port=0x80 count=1000000 dir=out|in size=1|2|4 ring=3|0
 */
#include "guest.h"

static uint64_t count;
static uint16_t port;

/* One access and two cheap instructions per round: what is measured is the exit. */
#define LOOP(name, instruction)                                                                              \
    static void name(void) {                                                                                 \
        uint64_t n = count;                                                                                  \
        uint32_t value = '.';                                                                                \
        __asm__ volatile("1: " instruction "\n dec %0\n jnz 1b" : "+r"(n), "+a"(value) : "d"(port));         \
        debug_exit(0);                                                                                       \
    }
LOOP(out1, "outb %%al, %%dx")
LOOP(out2, "outw %%ax, %%dx")
LOOP(out4, "outl %%eax, %%dx")
LOOP(in1, "inb %%dx, %%al")
LOOP(in2, "inw %%dx, %%ax")
LOOP(in4, "inl %%dx, %%eax")

static void (*const loops[2][3])(void) = {{out1, out2, out4}, {in1, in2, in4}};

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    bool in = option_is(cmdline, "dir", "in");
    uint64_t size = option_number(cmdline, "size", 1);
    void (*loop)(void) = loops[in][size == 4 ? 2 : size == 2];
    count = option_number(cmdline, "count", 1000000);
    port = (uint16_t)option_number(cmdline, "port", 0x80);
    if (!count)
        return 0;
    if (option_number(cmdline, "ring", 3) == 0)
        loop();
    enter_user(loop);
}
