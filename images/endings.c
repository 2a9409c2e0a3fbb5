/* Ends in the way that ending=NAME asks for, after the line "ending: NAME". More options: code=0 slp=0. */
#include "guest.h"

enum { I8042_COMMAND = 0x64, FAST_A20 = 0x92, RESET_CONTROL = 0xcf9, PVPANIC = 0x505, PM1A_CONTROL = 0x604 };
enum { SLP_EN = 1 << 13, SLP_TYP_SHIFT = 10, SERIAL_IRQ = 4, IER = 1, IER_RX = 1 };

static const char *cmdline;
static volatile bool woken;

__attribute__((interrupt)) static void on_serial(struct frame *frame) {
    (void)frame;
    woken = true;
    outb(COM1 + IER, 0);
    pic_eoi(SERIAL_IRQ);
}

static volatile uint8_t *unmapped(void) { return (volatile uint8_t *)0x8000000000; }

static void do_debug_exit(void) { debug_exit((int)option_number(cmdline, "code", 0)); }

static void do_power_off(void) { /* slp= because machines differ in what they call S5 */
    outw(PM1A_CONTROL, (uint16_t)(SLP_EN | option_number(cmdline, "slp", 0) << SLP_TYP_SHIFT));
}

static void do_i8042_reset(void) { outb(I8042_COMMAND, 0xfe); }

static void do_cf9_reset(void) {
    outb(RESET_CONTROL, 0x02); /* hard reset chosen, then the rising edge of RST_CPU */
    outb(RESET_CONTROL, 0x06);
}

static void do_port92_reset(void) { outb(FAST_A20, (uint8_t)(inb(FAST_A20) | 1)); }

static void do_pvpanic(void) { outb(PVPANIC, 1); }

static void do_triple_fault(void) {
    lidt(NULL, 0);
    (void)*unmapped();
}

static void do_exception(void) { (void)*unmapped(); }

static void do_fetch_from_nowhere(void) { /* no instruction to emulate: KVM gives up on every host */
    __asm__ volatile("jmp *%0" ::"r"(0xfd000000ul));
}

static void do_halt_if(void) { /* interrupts on, but every source masked: nothing can come */
    pic_init(0);
    for (;;)
        sti_hlt_cli();
}

static void do_halt_serial(void) { /* as do_halt_if, but a byte on COM1 wakes it */
    set_gate(IRQ_BASE + SERIAL_IRQ, on_serial);
    pic_init(1 << SERIAL_IRQ);
    outb(COM1 + IER, IER_RX);
    while (!woken)
        sti_hlt_cli();
    print("ending: woken\n");
    debug_exit(0);
}

static void do_spin(void) {
    for (;;)
        __builtin_ia32_pause();
}

static void do_spin_user(void) { enter_user(do_spin); }

static const struct {
    const char *name;
    void (*end)(void);
} endings[] = {
    {"debug-exit", do_debug_exit},
    {"power-off", do_power_off},
    {"i8042", do_i8042_reset},
    {"cf9", do_cf9_reset},
    {"port92", do_port92_reset},
    {"pvpanic", do_pvpanic},
    {"triple-fault", do_triple_fault},
    {"exception", do_exception},
    {"crash", do_fetch_from_nowhere},
    {"halt", halt},
    {"halt-if", do_halt_if},
    {"halt-serial", do_halt_serial},
    {"spin", do_spin},
    {"spin-user", do_spin_user},
};

int main(uint32_t magic, uintptr_t info) {
    cmdline = boot_cmdline(magic, info);
    serial_init();
    for (unsigned i = 0; i < sizeof endings / sizeof *endings; i++) {
        if (!option_is(cmdline, "ending", endings[i].name))
            continue;
        print("ending: %s\n", endings[i].name);
        endings[i].end();
        print("ending: still here\n");
        halt();
    }
    print("ending: one of");
    for (unsigned i = 0; i < sizeof endings / sizeof *endings; i++)
        print(" %s", endings[i].name);
    print("\n");
    return 0x7e;
}
