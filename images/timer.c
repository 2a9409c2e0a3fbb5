/*
 * The timers: PIT ticks by IRQ 0 through the 8259s, the local APIC's timer measured against them, and one of
 * its one-shot interrupts. Options: ticks=10 hz=100. Ends with debug-exit 0, or 1 when the one-shot did not
 * come once.
 */
#include "guest.h"

enum { PIT_CHANNEL0 = 0x40, PIT_COMMAND = 0x43, PIT_HZ = 1193182, PIT_RATE_GENERATOR = 0x34 };
enum {
    LAPIC_EOI = 0xb0,
    LAPIC_LVT_TIMER = 0x320,
    LAPIC_INITIAL = 0x380,
    LAPIC_CURRENT = 0x390,
    LAPIC_DIVIDE = 0x3e0
};
enum { LVT_MASKED = 0x10000, DIVIDE_BY_16 = 3, TIMER_VECTOR = 0x40 };

static volatile uint32_t ticks, shots;

__attribute__((interrupt)) static void on_pit(struct frame *frame) {
    (void)frame;
    ticks++;
    pic_eoi(0);
}

__attribute__((interrupt)) static void on_lapic_timer(struct frame *frame) {
    (void)frame;
    shots++;
    lapic_write(LAPIC_EOI, 0);
}

static void pit_start(uint32_t hz) {
    uint32_t divisor = PIT_HZ / hz;
    outb(PIT_COMMAND, PIT_RATE_GENERATOR);
    outb(PIT_CHANNEL0, (uint8_t)divisor);
    outb(PIT_CHANNEL0, (uint8_t)(divisor >> 8));
}

static void wait_ticks(uint32_t n) {
    for (uint32_t end = ticks + n; ticks != end;)
        sti_hlt_cli();
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    uint32_t n = (uint32_t)option_number(cmdline, "ticks", 10);
    uint32_t hz = (uint32_t)option_number(cmdline, "hz", 100);
    serial_init();
    if (hz < 20 || !n) {
        print("timer: hz must be at least 20 (a 16-bit divisor) and ticks at least 1\n");
        return 0x7e;
    }
    set_gate(IRQ_BASE + 0, on_pit);
    set_gate(TIMER_VECTOR, on_lapic_timer);
    lapic_write(LAPIC_DIVIDE, DIVIDE_BY_16);
    pic_init(1 << 0);

    pit_start(hz);
    wait_ticks(1); /* the first one ends a period that had begun before */
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | TIMER_VECTOR);
    lapic_write(LAPIC_INITIAL, UINT32_MAX);
    wait_ticks(n);
    uint32_t elapsed = UINT32_MAX - lapic_read(LAPIC_CURRENT);
    print("timer: PIT %u ticks at %u Hz\n", n, hz);
    print("timer: LAPIC timer %u kHz\n", (uint32_t)((uint64_t)elapsed * hz / n * 16 / 1000));

    lapic_write(LAPIC_LVT_TIMER, TIMER_VECTOR); /* one-shot: not periodic */
    lapic_write(LAPIC_INITIAL, elapsed / n / 2 + 1);
    /* half a tick away, but a host that was late gives the ticks that it owes all at once */
    for (uint32_t patience = 1000; patience && !shots; patience--)
        wait_ticks(1);
    wait_ticks(5); /* were it periodic, there would be more by then */
    print("timer: LAPIC one-shot, %u interrupt\n", shots);
    print("timer: %s\n", shots == 1 ? "ok" : "FAILED");
    return shots != 1;
}
