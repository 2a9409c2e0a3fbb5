/*
 * A virtio-console driver, all by interrupts: says "hvc: ready" and the size of the terminal, tells of each
 * change of it, and answers every buffer of input with the same bytes in capitals, until a `q` comes. With
 * flood=N it prints N lines of 64 bytes first.
 *
 * Options: base=0xd0000000 gsi=16 flood=0
 * Ends with debug-exit 0 after a `q`, 1 when there is no console.
 */
#include "virtio.h"

enum { CONSOLE_ID = 3, RX = 0, TX = 1, BUFFERS = 8, BUFFER = 256 };
enum { CONFIG_CHANGED = 2 };
#define CONSOLE_F_SIZE (1ull << 0)

static struct virtq rx, tx;
static uint8_t input[BUFFERS][BUFFER], output[BUFFER];
static uintptr_t base;

static void write_out(uint32_t length) {
    tx.desc[0] = (struct virtq_desc){(uintptr_t)output, length, 0, 0};
    virtq_offer(&tx, 0);
    virtq_kick(&tx);
    while (virtq_done(&tx) < 0)
        sti_hlt_cli();
}

static uint32_t put_text(uint32_t at, const char *text) {
    while (*text)
        output[at++] = (uint8_t)*text++;
    return at;
}

static uint32_t put_number(uint32_t at, uint32_t value) {
    if (value >= 10)
        at = put_number(at, value / 10);
    output[at] = (uint8_t)('0' + value % 10);
    return at + 1;
}

static void say_size(void) {
    virtio_causes = 0;
    uint32_t size = virtio_read(base, VIRTIO_MMIO_CONFIG), at = put_text(0, "hvc: ");
    at = put_text(put_number(at, size & 0xffff), " columns, ");
    write_out(put_text(put_number(at, size >> 16), " rows\n"));
}

static void flood(uint64_t lines) {
    for (uint64_t n = 0; n < lines; n++) {
        uint32_t at = put_number(0, (uint32_t)n);
        while (at < 63)
            output[at++] = '.';
        output[at] = '\n';
        write_out(64);
    }
}

static void offer(unsigned slot) {
    rx.desc[slot] = (struct virtq_desc){(uintptr_t)input[slot], BUFFER, VIRTQ_WRITE, 0};
    virtq_offer(&rx, (uint16_t)slot);
    virtq_kick(&rx);
}

static bool answer(unsigned slot, uint32_t length) {
    bool more = true;
    for (uint32_t i = 0; i < length; i++) {
        uint8_t byte = input[slot][i];
        output[i] = byte >= 'a' && byte <= 'z' ? byte - 32 : byte;
        more &= byte != 'q';
    }
    write_out(length);
    return more;
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    serial_init();
    base = option_number(cmdline, "base", 0xd0000000);
    if (!virtio_start(base, CONSOLE_ID, CONSOLE_F_SIZE) || !virtq_setup(&rx, base, RX, false, true) ||
        !virtq_setup(&tx, base, TX, false, true)) {
        print("hvc: no console at 0x%lx\n", base);
        return 1;
    }
    virtio_take_interrupts(base, (unsigned)option_number(cmdline, "gsi", 16));
    virtio_driver_ok(base);
    flood(option_number(cmdline, "flood", 0));
    write_out(put_text(0, "hvc: ready\n"));
    say_size();
    for (unsigned slot = 0; slot < BUFFERS; slot++)
        offer(slot);
    for (;;) {
        int slot = virtq_done(&rx);
        if (slot < 0) {
            if (!(virtio_causes & CONFIG_CHANGED))
                sti_hlt_cli();
            if (virtio_causes & CONFIG_CHANGED)
                say_size();
            continue;
        }
        uint32_t length = rx.used.ring[(uint16_t)(rx.used_idx - 1) % VIRTQ_SIZE].length;
        if (!answer((unsigned)slot, length))
            return 0;
        offer((unsigned)slot);
    }
}
