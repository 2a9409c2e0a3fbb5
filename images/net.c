/*
 * A virtio-net driver. Modes:
 *
 *   send   `count` frames of `bytes` to nobody, as fast as they go, `depth` of them in flight, polled in ring
 * 3 ping   `count` ICMP echo requests to 10.77.0.1 (and the MAC address `to`), `depth` of them without an
 * answer; ring 3 echo   sends each of `count` frames received back to its sender; with irq=1 by interrupts,
 * in ring 0
 *
 * Options: mode=echo base=0xd0000000 gsi=16 count=100 bytes=60 depth=64 irq=0 to=0x020000000001
 * Prints "net: mac M mtu N link N" first. Ends with debug-exit 0; 1 when something failed.
 */
#include "virtio.h"

enum { NET_ID = 1, RX = 0, TX = 1, HEADER = 12, BUFFER = 2048, LARGEST = 16384 };
#define NET_F_MTU (1ull << 3)
#define NET_F_MAC (1ull << 5)
#define NET_F_MRG_RXBUF (1ull << 15)
#define NET_F_STATUS (1ull << 16)
enum {
    ETHERTYPE = 12,
    TYPE_LOCAL = 0x88b5,
    TYPE_IPV4 = 0x0800,
    ICMP_REQUEST = 8,
    ICMP_REPLY = 0,
    IP = 14,
    ICMP = 34
};

static struct virtq rx, tx;
static uint8_t rx_buffers[VIRTQ_SIZE][BUFFER] __attribute__((aligned(PAGE_SIZE)));
static uint8_t tx_buffers[VIRTQ_SIZE][LARGEST] __attribute__((aligned(PAGE_SIZE)));
static uintptr_t base;
static uint64_t count, to;
static uint32_t depth, bytes;
static bool by_interrupt;
static uint8_t mac[6];

static void must(bool good, const char *what, uint64_t value) {
    if (good)
        return;
    print("net: FAILED %s 0x%lx\n", what, value);
    debug_exit(1);
}

static void offer_rx(unsigned slot) {
    rx.desc[slot] = (struct virtq_desc){(uintptr_t)rx_buffers[slot], BUFFER, VIRTQ_WRITE, 0};
    virtq_offer(&rx, (uint16_t)slot);
}

static void wait_rx(void) {
    /* A frame may be there, and its interrupt with it: an exit makes KVM look, where it interprets ring 0. */
    if (by_interrupt)
        __asm__ volatile("sti; outb %%al, $0x80; nop; cli" ::: "memory");
    virtq_wait(&rx, by_interrupt);
}

/* The next frame, of one buffer or several, put together in `frame` without its header: its length. Its
 * buffers are offered again. */
static uint32_t receive(uint8_t *frame) {
    uint32_t length = 0, buffers = 1;
    for (uint32_t i = 0; i < buffers; i++) {
        wait_rx();
        uint32_t part = rx.used.ring[rx.used_idx % VIRTQ_SIZE].length;
        unsigned slot = (unsigned)virtq_done(&rx);
        if (by_interrupt)
            rx.avail.used_event = rx.used_idx; /* the next one, before its sender has got this one back */
        const uint8_t *from = rx_buffers[slot];
        if (i == 0) {
            buffers = (uint32_t)from[10] | (uint32_t)from[11] << 8;
            must(buffers >= 1 && buffers * BUFFER <= LARGEST && part >= HEADER, "buffers", buffers);
            from += HEADER;
            part -= HEADER;
        }
        memcpy(frame + length, from, part);
        length += part;
        offer_rx(slot);
    }
    virtq_kick(&rx);
    return length;
}

static void send(unsigned slot, uint32_t length) {
    tx.desc[slot] = (struct virtq_desc){(uintptr_t)tx_buffers[slot], HEADER + length, 0, 0};
    virtq_offer(&tx, (uint16_t)slot);
}

static unsigned wait_sent(void) {
    virtq_wait(&tx, false);
    return (unsigned)virtq_done(&tx);
}

/* A frame of each slot, all alike: to the host, from here. */
static void fill_frames(uint16_t type) {
    for (unsigned slot = 0; slot < depth; slot++) {
        uint8_t *frame = tx_buffers[slot] + HEADER;
        for (int i = 0; i < 6; i++) {
            frame[i] = (uint8_t)(to >> (40 - 8 * i));
            frame[6 + i] = mac[i];
        }
        frame[ETHERTYPE] = (uint8_t)(type >> 8);
        frame[ETHERTYPE + 1] = (uint8_t)type;
    }
}

static void send_all(void) {
    fill_frames(TYPE_LOCAL);
    uint64_t sent = 0;
    for (; sent < depth && sent < count; sent++)
        send((unsigned)sent, bytes);
    virtq_kick(&tx);
    for (uint64_t done = 0; done < count; done++) {
        unsigned slot = wait_sent();
        if (sent < count) {
            send(slot, bytes);
            virtq_kick(&tx);
            sent++;
        }
    }
    debug_exit(0);
}

static void put_checksum(uint8_t *at, const uint8_t *data, uint32_t length) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i + 1 < length; i += 2)
        sum += (uint32_t)data[i] << 8 | data[i + 1];
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    at[0] = (uint8_t)(~sum >> 8);
    at[1] = (uint8_t)~sum;
}

/* RFC 791 and 792: 10.77.0.2 asks 10.77.0.1. */
static void make_request(uint8_t *frame) {
    static const uint8_t ip[20] = {0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1};
    memcpy(frame + IP, ip, sizeof ip);
    frame[IP + 2] = (uint8_t)((bytes - IP) >> 8);
    frame[IP + 3] = (uint8_t)(bytes - IP);
    put_checksum(frame + IP + 10, frame + IP, sizeof ip);
    frame[ICMP] = ICMP_REQUEST;
    put_checksum(frame + ICMP + 2, frame + ICMP, (bytes - ICMP) & ~1u);
}

/* Returns when a reply has come; what else comes is dropped. */
static void wait_reply(void) {
    for (;;) {
        wait_rx();
        unsigned slot = (unsigned)virtq_done(&rx);
        const uint8_t *frame = rx_buffers[slot] + HEADER;
        bool reply = frame[ETHERTYPE] == TYPE_IPV4 >> 8 && frame[ETHERTYPE + 1] == (TYPE_IPV4 & 0xff) &&
                     frame[IP + 9] == 1 && frame[ICMP] == ICMP_REPLY;
        offer_rx(slot);
        virtq_kick(&rx);
        if (reply)
            return;
    }
}

static void ping(void) {
    fill_frames(TYPE_IPV4);
    for (unsigned slot = 0; slot < depth; slot++)
        make_request(tx_buffers[slot] + HEADER);
    uint64_t sent = 0;
    for (; sent < depth && sent < count; sent++)
        send((unsigned)sent, bytes);
    virtq_kick(&tx);
    for (uint64_t done = 0; done < count; done++) {
        wait_reply();
        if (sent < count) {
            send(wait_sent(), bytes);
            virtq_kick(&tx);
            sent++;
        }
    }
    debug_exit(0);
}

static void echo(void) {
    uint8_t swapped[6];
    uint64_t total = 0;
    for (uint64_t n = 0; n < count; n++) {
        uint8_t *frame = tx_buffers[0] + HEADER;
        uint32_t length = receive(frame);
        memcpy(swapped, frame, 6);
        memcpy(frame, frame + 6, 6);
        memcpy(frame + 6, swapped, 6);
        total += length;
        send(0, length);
        virtq_kick(&tx);
        wait_sent();
    }
    while (by_interrupt && !virtio_interrupts) /* they come after frames that were seen first */
        sti_hlt_cli();
    print("net: %lu frames of %lu bytes, %s, ok\n", count, total,
          virtio_interrupts ? "by interrupt" : "polled");
    debug_exit(0);
}

static bool set_up(uint64_t gsi) {
    uint64_t wanted = VIRTIO_F_EVENT_IDX | NET_F_MTU | NET_F_MAC | NET_F_MRG_RXBUF | NET_F_STATUS;
    uint64_t features = virtio_start(base, NET_ID, wanted);
    bool event_idx = features & VIRTIO_F_EVENT_IDX;
    if (!(features & NET_F_MRG_RXBUF) || !virtq_setup(&rx, base, RX, event_idx, by_interrupt) ||
        !virtq_setup(&tx, base, TX, event_idx, false))
        return false;
    uint32_t low = virtio_read(base, VIRTIO_MMIO_CONFIG), high = virtio_read(base, VIRTIO_MMIO_CONFIG + 4);
    for (int i = 0; i < 6; i++)
        mac[i] = (uint8_t)(i < 4 ? low >> 8 * i : high >> 8 * (i - 4));
    uint32_t mtu = features & NET_F_MTU ? virtio_read(base, VIRTIO_MMIO_CONFIG + 8) >> 16 : 0;
    print("net: mac %x:%x:%x:%x:%x:%x mtu %u link %u\n", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], mtu,
          features & NET_F_STATUS ? high >> 16 & 1 : 1);
    virtio_driver_ok(base);
    for (unsigned slot = 0; slot < VIRTQ_SIZE; slot++)
        offer_rx(slot);
    if (by_interrupt)
        virtio_take_interrupts(base, (unsigned)gsi);
    virtq_kick(&rx);
    return true;
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    serial_init();
    base = option_number(cmdline, "base", 0xd0000000);
    count = option_number(cmdline, "count", 100);
    bytes = (uint32_t)option_number(cmdline, "bytes", 60);
    depth = (uint32_t)option_number(cmdline, "depth", 64);
    to = option_number(cmdline, "to", 0x020000000001);
    by_interrupt = option_number(cmdline, "irq", 0);
    if (!count || !depth || depth > VIRTQ_SIZE || bytes < ICMP + 8 || bytes > LARGEST - HEADER) {
        print("net: count not 0, depth 1 to %u, bytes %u to %u\n", VIRTQ_SIZE, ICMP + 8, LARGEST - HEADER);
        return 0x7e;
    }
    if (!set_up(option_number(cmdline, "gsi", 16))) {
        print("net: no network with mergeable buffers at 0x%lx\n", base);
        return 1;
    }
    void (*mode)(void) = option_is(cmdline, "mode", "send")   ? send_all
                         : option_is(cmdline, "mode", "ping") ? ping
                                                              : echo;
    virtio_run(mode, by_interrupt);
}
