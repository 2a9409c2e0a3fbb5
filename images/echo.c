/*
 * Echoes COM1, driven by its receive interrupt (IRQ 4 through the 8259s). Carriage return and line feed come
 * back as CR LF, Ctrl-D ends it with debug-exit 0.
 */
#include "guest.h"

enum { SERIAL_IRQ = 4, CTRL_D = 4 };
enum { RBR = 0, IER = 1, IIR = 2, LSR = 5, IER_RX = 1, IIR_NONE = 1, LSR_DR = 1 };

static volatile bool done;
static uint32_t received, interrupts;

/* Until nothing is pending: the 8259 sees edges, so the line has to fall before the next one. */
__attribute__((interrupt)) static void on_serial(struct frame *frame) {
    (void)frame;
    interrupts++;
    while (!(inb(COM1 + IIR) & IIR_NONE)) {
        while (!done && (inb(COM1 + LSR) & LSR_DR)) {
            uint8_t c = inb(COM1 + RBR);
            if (c == CTRL_D) {
                done = true;
                outb(COM1 + IER, 0);
                break;
            }
            received++;
            put_char(c == '\r' ? '\n' : (char)c);
        }
    }
    pic_eoi(SERIAL_IRQ);
}

int main(uint32_t magic, uintptr_t info) {
    (void)magic, (void)info;
    serial_init();
    set_gate(IRQ_BASE + SERIAL_IRQ, on_serial);
    pic_init(1 << SERIAL_IRQ);
    print("echo: ready\n");
    outb(COM1 + IER, IER_RX);
    while (!done)
        sti_hlt_cli();
    print("\necho: %u bytes, %s\n", received, interrupts ? "by interrupt" : "BAD: no interrupt");
    return 0;
}
