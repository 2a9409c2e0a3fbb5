/*
 * Starts every other processor by INIT and SIPI to all, each of which says its APIC id and counts itself.
 * Expects as many as cpus=N says, or fw_cfg; without both it takes those that come within about a second.
 * Ends with debug-exit 0, or 1 when the count is not the expected one.
 */
#include "guest.h"

enum { MAX_CPUS = 64, STACK_SIZE = 4096, TRAMPOLINE = 0x8000 };
enum { LAPIC_ID = 0x20, LAPIC_SVR = 0xf0, LAPIC_ICR = 0x300 };
enum { SVR_ENABLE = 0x1ff, ICR_PENDING = 1 << 12, ICR_INIT = 0xc4500, ICR_SIPI = 0xc4600 }; /* all but self */
enum { FW_CFG_SELECTOR = 0x510, FW_CFG_DATA = 0x511, FW_CFG_SIGNATURE = 0, FW_CFG_CPUS = 5 };

extern const uint8_t trampoline[], trampoline_end[];

uint8_t ap_stacks[MAX_CPUS][STACK_SIZE] __attribute__((aligned(16)));
uint32_t ap_next;

static uint32_t up = 1; /* this one */
static uint32_t print_lock;

static void say_up(void) {
    uint32_t id = lapic_read(LAPIC_ID) >> 24, initial = cpuid(1).b >> 24;
    while (__atomic_exchange_n(&print_lock, 1, __ATOMIC_ACQUIRE))
        __builtin_ia32_pause();
    print("smp: cpu with APIC id %u is up%s\n", id, id == initial ? "" : ", but CPUID says another");
    __atomic_store_n(&print_lock, 0, __ATOMIC_RELEASE);
}

/* Where trampoline.S brings each processor, on a stack of its own. */
_Noreturn void ap_main(void) {
    say_up();
    __atomic_add_fetch(&up, 1, __ATOMIC_RELEASE);
    halt();
}

static uint32_t fw_cfg_cpus(void) {
    outw(FW_CFG_SELECTOR, FW_CFG_SIGNATURE);
    for (const char *signature = "QEMU"; *signature; signature++)
        if (inb(FW_CFG_DATA) != (uint8_t)*signature)
            return 0;
    outw(FW_CFG_SELECTOR, FW_CFG_CPUS);
    uint32_t low = inb(FW_CFG_DATA);
    return low | (uint32_t)inb(FW_CFG_DATA) << 8;
}

/* Until `expected` processors are up, at most `cycles` of the time stamp counter. */
static void wait(uint32_t expected, uint64_t cycles) {
    for (uint64_t start = rdtsc(); rdtsc() - start < cycles;) {
        if (__atomic_load_n(&up, __ATOMIC_ACQUIRE) == expected)
            return;
        __builtin_ia32_pause();
    }
}

static void send(uint32_t command) {
    lapic_write(LAPIC_ICR, command);
    while (lapic_read(LAPIC_ICR) & ICR_PENDING)
        __builtin_ia32_pause();
}

int main(uint32_t magic, uintptr_t info) {
    uint32_t expected = (uint32_t)option_number(boot_cmdline(magic, info), "cpus", 0);
    serial_init();
    if (!expected)
        expected = fw_cfg_cpus();
    say_up();
    for (const uint8_t *from = trampoline; from < trampoline_end; from++)
        ((volatile uint8_t *)TRAMPOLINE)[from - trampoline] = *from;
    lapic_write(LAPIC_SVR, SVR_ENABLE);
    send(ICR_INIT);
    wait(0, 1000000); /* a real processor wants some time between the two */
    send(ICR_SIPI | TRAMPOLINE / PAGE_SIZE);
    wait(expected, expected ? 20000000000 : 2000000000);

    uint32_t found = __atomic_load_n(&up, __ATOMIC_ACQUIRE);
    if (expected)
        print("smp: %u of %u cpus\n", found, expected);
    else
        print("smp: %u cpus\n", found);
    return expected && found != expected;
}
