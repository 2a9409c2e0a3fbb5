/*
 * Touches memory from ring 3: writes one 8-byte word, the page's own address + `value`, into each 4 KiB page
 * of `mib` MiB from `start` MiB on, `passes` times. Options: mib=64 start=16 passes=1 value=0. Ends with
 * debug-exit 0.
 */
#include "guest.h"
#include "multiboot.h"

enum { KIB = 1 << 10, MIB = 1 << 20 };

static uint64_t start, end, passes, value;

static void touch(void) {
    for (uint64_t pass = 0; pass < passes; pass++)
        for (uint64_t page = start; page < end; page += PAGE_SIZE)
            *(volatile uint64_t *)page = page + value;
    print("touch: %lu MiB from %lu MiB, %lu pages, %lu passes\n", (end - start) / MIB, start / MIB,
          (end - start) / PAGE_SIZE, passes);
    debug_exit(0);
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    uint64_t first = option_number(cmdline, "start", 16), mib = option_number(cmdline, "mib", 64);
    uint64_t limit = 1 + ((const struct mb1_info *)info)->mem_upper / KIB; /* of the RAM from 1 MiB on */
    passes = option_number(cmdline, "passes", 1);
    value = option_number(cmdline, "value", 0);
    serial_init();
    if (first < 2 || first > limit || mib > limit - first) {
        print("touch: only from 2 to %lu MiB\n", limit);
        return 0x7e;
    }
    start = first * MIB;
    end = start + mib * MIB;
    enter_user(touch);
}
