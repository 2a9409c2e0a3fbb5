/*
 * A virtio-blk driver. Modes:
 *
 *   bench   `count` requests of `bytes` at random places of the disk, `depth` of them in flight, polled in
 * ring 3 check   writes `count` blocks with a pattern, reads them back and compares; with irq=1 by
 * interrupts, in ring 0 log     for ever: writes block n % count full of the number n, flushes, prints n (a
 * test kills the VMM meanwhile) probe   one request of type `type` at sector `sector`: prints its status
 *
 * Options: mode=bench base=0xd0000000 gsi=16 op=read|write count=1000 depth=1 bytes=4096 irq=0 seed=1 retry=0
 * Ends with debug-exit 0; 1 when a request failed or data were wrong.
 */
#include "virtio.h"

enum { BLK_ID = 2, BLK_IN = 0, BLK_OUT = 1, BLK_FLUSH = 4, SECTOR = 512 };
#define BLK_F_FLUSH (1ull << 9)
enum { MAX_DEPTH = VIRTQ_SIZE / 3, MAX_BYTES = 1 << 20 };
enum {
    LAPIC_SVR = 0xf0,
    LAPIC_LVT_TIMER = 0x320,
    LAPIC_INITIAL = 0x380,
    LAPIC_CURRENT = 0x390,
    LAPIC_DIVIDE = 0x3e0,
    SVR_ENABLE = 0x1ff,
    LVT_MASKED = 0x10000,
    DIVIDE_BY_16 = 3
};

struct request {
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    volatile uint8_t status;
};

static struct virtq queue;
static struct request requests[MAX_DEPTH];
static uint8_t buffers[MAX_DEPTH * MAX_BYTES] __attribute__((aligned(PAGE_SIZE)));
static uintptr_t base;
static uint64_t capacity, count, seed, probe_sector; /* capacity in sectors */
static uint32_t depth, bytes, type;
static bool by_interrupt, retry;

static uint8_t *buffer(unsigned slot) { return buffers + (size_t)slot * MAX_BYTES; }

/* Descriptors 3 * slot and the two after it: header, data, status. */
static void submit(unsigned slot, uint32_t kind, uint64_t sector, uint32_t length) {
    struct request *request = &requests[slot];
    struct virtq_desc *desc = &queue.desc[3 * slot];
    uint16_t head = (uint16_t)(3 * slot), last = (uint16_t)(head + (length ? 2 : 1));
    uint16_t direction = kind == BLK_IN ? VIRTQ_WRITE : 0;
    request->header.type = kind;
    request->header.sector = sector;
    request->status = 0xff;
    desc[0] = (struct virtq_desc){(uintptr_t)&request->header, sizeof request->header, VIRTQ_NEXT, head + 1};
    if (length)
        desc[1] = (struct virtq_desc){(uintptr_t)buffer(slot), length, VIRTQ_NEXT | direction, last};
    desc[last - head] = (struct virtq_desc){(uintptr_t)&request->status, 1, VIRTQ_WRITE, 0};
    virtq_offer(&queue, head);
}

static unsigned wait_done(void) {
    virtq_wait(&queue, by_interrupt);
    return (unsigned)virtq_done(&queue) / 3;
}

static void must(bool good, const char *what, uint64_t value) {
    if (good)
        return;
    print("blk: FAILED %s 0x%lx\n", what, value);
    debug_exit(1);
}

static void transfer(uint32_t kind, uint64_t sector, uint32_t length) {
    submit(0, kind, sector, length);
    virtq_kick(&queue);
    wait_done();
    must(requests[0].status == 0, "status", requests[0].status);
}

static uint64_t random_sector(void) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull; /* Knuth's MMIX generator */
    uint64_t blocks = capacity / (bytes / SECTOR);
    return (seed >> 33) % blocks * (bytes / SECTOR);
}

/* The local APIC's timer counts nanoseconds under KVM; it lasts 68 s. */
static uint64_t elapsed_us(void) { return (uint64_t)(UINT32_MAX - lapic_read(LAPIC_CURRENT)) * 16 / 1000; }

static void bench(void) {
    uint64_t sent = 0, done = 0, started = elapsed_us();
    for (; sent < depth && sent < count; sent++)
        submit((unsigned)sent, type, random_sector(), bytes);
    virtq_kick(&queue);
    while (done < count) {
        unsigned slot = wait_done();
        must(requests[slot].status == 0, "status", requests[slot].status);
        done++;
        if (sent < count) {
            submit(slot, type, random_sector(), bytes);
            virtq_kick(&queue);
            sent++;
        }
    }
    print("blk: %lu requests in %lu us\n", count, elapsed_us() - started);
    debug_exit(0);
}

static void fill(uint64_t value) {
    for (uint64_t *at = (uint64_t *)buffer(0), *end = at + bytes / 8; at < end; at++)
        *at = value++;
}

static bool is_filled(uint64_t value) {
    for (uint64_t *at = (uint64_t *)buffer(0), *end = at + bytes / 8; at < end; at++)
        if (*at != value++)
            return false;
    return true;
}

/* Like transfer; with retry=1 a request that fails is said once and made until it succeeds. */
static void write_block(uint64_t n) {
    for (uint64_t tries = 0;; tries++) {
        submit(0, BLK_OUT, n * (bytes / SECTOR), bytes);
        virtq_kick(&queue);
        wait_done();
        if (!retry || requests[0].status == 0)
            break;
        if (!tries)
            print("blk: block %lu refused: status %u\n", n, requests[0].status);
    }
    must(requests[0].status == 0, "status", requests[0].status);
}

static void check(void) {
    uint32_t step = bytes / SECTOR;
    for (uint64_t n = 0; n < count; n++) {
        fill(n * 1000003);
        write_block(n);
    }
    transfer(BLK_FLUSH, 0, 0);
    for (uint64_t n = count; n-- > 0;) {
        memset(buffer(0), 0, bytes);
        transfer(BLK_IN, n * step, bytes);
        must(is_filled(n * 1000003), "block", n);
    }
    print("blk: %lu blocks of %u bytes, %s, ok\n", count, bytes,
          virtio_interrupts ? "by interrupt" : "polled");
    debug_exit(by_interrupt && !virtio_interrupts);
}

static void write_log(void) {
    for (uint64_t n = 1;; n++) {
        for (uint64_t *at = (uint64_t *)buffer(0), *end = at + bytes / 8; at < end; at++)
            *at = n;
        transfer(BLK_OUT, n % count * (bytes / SECTOR), bytes);
        transfer(BLK_FLUSH, 0, 0);
        print("flushed %lu\n", n);
    }
}

static void probe(void) {
    submit(0, type, probe_sector, bytes);
    virtq_kick(&queue);
    wait_done();
    print("blk: %lu sectors, type %u at sector %lu: status %u\n", capacity, type, probe_sector,
          requests[0].status);
    debug_exit(0);
}

static bool set_up(uint64_t gsi) {
    uint64_t features = virtio_start(base, BLK_ID, VIRTIO_F_EVENT_IDX | BLK_F_FLUSH);
    if (!features || !virtq_setup(&queue, base, 0, features & VIRTIO_F_EVENT_IDX, by_interrupt))
        return false;
    capacity = virtio_read(base, VIRTIO_MMIO_CONFIG) | (uint64_t)virtio_read(base, VIRTIO_MMIO_CONFIG + 4)
                                                           << 32;
    virtio_driver_ok(base);
    if (by_interrupt)
        virtio_take_interrupts(base, (unsigned)gsi);
    return true;
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    serial_init();
    base = option_number(cmdline, "base", 0xd0000000);
    count = option_number(cmdline, "count", 1000);
    depth = (uint32_t)option_number(cmdline, "depth", 1);
    bytes = (uint32_t)option_number(cmdline, "bytes", 4096);
    seed = option_number(cmdline, "seed", 1);
    by_interrupt = option_number(cmdline, "irq", 0);
    retry = option_number(cmdline, "retry", 0);
    type = (uint32_t)option_number(cmdline, "type", option_is(cmdline, "op", "write") ? BLK_OUT : BLK_IN);
    probe_sector = option_number(cmdline, "sector", 0);
    if (!count || !depth || depth > MAX_DEPTH || !bytes || bytes > MAX_BYTES || bytes % SECTOR) {
        print("blk: depth is 1 to %u, bytes whole sectors up to %u, count not 0\n", MAX_DEPTH, MAX_BYTES);
        return 0x7e;
    }
    lapic_write(LAPIC_SVR, SVR_ENABLE);
    lapic_write(LAPIC_DIVIDE, DIVIDE_BY_16);
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
    lapic_write(LAPIC_INITIAL, UINT32_MAX);
    if (!set_up(option_number(cmdline, "gsi", 16))) {
        print("blk: no disk at 0x%lx\n", base);
        return 1;
    }
    void (*mode)(void) = option_is(cmdline, "mode", "check")   ? check
                         : option_is(cmdline, "mode", "log")   ? write_log
                         : option_is(cmdline, "mode", "probe") ? probe
                                                               : bench;
    virtio_run(mode, by_interrupt);
}
