/* IDT and 8259 pair for guests in long mode. */
#include "guest.h"

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

enum { EXCEPTIONS = 32, INTERRUPT_GATE = 0x8e };
enum { LAPIC_SVR = 0xf0, LAPIC_LVT_LINT0 = 0x350, SVR_ENABLE = 0x100, LVT_EXTINT = 0x700, SPURIOUS = 0xff };
enum { PIC1 = 0x20, PIC2 = 0xa0, EOI = 0x20, ICW1_INIT = 0x11, ICW4_8086 = 1 };

extern const uint8_t exception_stubs[]; /* exceptions.S: EXCEPTIONS stubs, 16 bytes each */

static struct gate idt[256];

void set_gate(unsigned vector, const void *handler) {
    uintptr_t address = (uintptr_t)handler;
    idt[vector] = (struct gate){.offset_low = (uint16_t)address,
                                .selector = KERNEL_CS,
                                .type = INTERRUPT_GATE,
                                .offset_middle = (uint16_t)(address >> 16)};
}

__attribute__((interrupt)) static void on_spurious(struct frame *frame) { (void)frame; }

void interrupts_init(void) {
    for (unsigned vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector, exception_stubs + 16 * vector);
    set_gate(SPURIOUS, on_spurious);
    lidt(idt, sizeof idt - 1);
}

/* Called by the stubs, with the processor's frame as the exception left it. */
_Noreturn void unexpected_exception(uint64_t vector, uint64_t error, const struct frame *frame) {
    uint64_t cr2;
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    print("unexpected exception %lu error 0x%lx rip 0x%lx cr2 0x%lx\n", vector, error, frame->rip, cr2);
    debug_exit(0x7f);
}

void pic_init(uint16_t enabled) {
    /* virtual wire mode: the 8259s reach the processor through LINT0 (MP 1.4, 3.6.2.2); not every firmware
     * sets it */
    lapic_write(LAPIC_SVR, SVR_ENABLE | SPURIOUS);
    lapic_write(LAPIC_LVT_LINT0, LVT_EXTINT);
    outb(PIC1, ICW1_INIT);
    outb(PIC2, ICW1_INIT);
    outb(PIC1 + 1, IRQ_BASE);
    outb(PIC2 + 1, IRQ_BASE + 8);
    outb(PIC1 + 1, 1 << 2); /* the second 8259 is at IRQ 2 */
    outb(PIC2 + 1, 2);
    outb(PIC1 + 1, ICW4_8086);
    outb(PIC2 + 1, ICW4_8086);
    outb(PIC1 + 1, (uint8_t)~enabled);
    outb(PIC2 + 1, (uint8_t)(~enabled >> 8));
}

void pic_eoi(unsigned irq) {
    if (irq >= 8)
        outb(PIC2, EOI);
    outb(PIC1, EOI);
}
