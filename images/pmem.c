/*
 * A virtio-pmem driver. It maps the memory of the device and says where it is, then by mode:
 *
 *   check   prints the first bytes, writes the number of each page into the page's word at 8, flushes
 *   log     for ever: writes n into page n % pages, flushes, prints n (a test kills the VMM meanwhile)
 *   probe   waits for a byte on COM1, then reads or writes (op) the word at `offset`, prints what is there
 *   request one request of type `type`: prints its result
 *
 * Options: mode=check base=0xd0000000 op=read|write offset=0 type=0 ring=3|0
 * Ends with debug-exit 0; 1 when there is no device or a flush failed.
 */
#include "virtio.h"

enum { PMEM_ID = 27, FLUSH = 0, LARGE = 2 << 20, ENTRIES = 512, PRESENT = 0x87, TABLE = 7 };

static struct virtq queue;
static struct {
    uint32_t type;
    volatile uint32_t result;
} request;
static uint64_t directory[ENTRIES] __attribute__((aligned(PAGE_SIZE)));
static const char *cmdline;
static uintptr_t base, start;
static uint64_t pages;

static volatile uint64_t *word(uint64_t offset) { return (volatile uint64_t *)(start + offset); }

/* Up to 1 GiB, which starts at a multiple of it. */
static void map(uint64_t size) {
    uint64_t *pdpt = (uint64_t *)(uintptr_t)(pml4[0] & ~(uint64_t)(PAGE_SIZE - 1));
    for (unsigned i = 0; i < ENTRIES && i * (uint64_t)LARGE < size; i++)
        directory[i] = (start + i * (uint64_t)LARGE) | PRESENT;
    pdpt[start >> 30] = (uintptr_t)directory | TABLE;
}

static uint32_t ask(uint32_t type) {
    request.type = type;
    request.result = 0xffffffff;
    queue.desc[0] = (struct virtq_desc){(uintptr_t)&request.type, sizeof request.type, VIRTQ_NEXT, 1};
    queue.desc[1] = (struct virtq_desc){(uintptr_t)&request.result, sizeof request.result, VIRTQ_WRITE, 0};
    virtq_offer(&queue, 0);
    virtq_kick(&queue);
    virtq_wait(&queue, false);
    virtq_done(&queue);
    return request.result;
}

static void flush(void) {
    uint32_t result = ask(FLUSH);
    if (!result)
        return;
    print("pmem: flush failed with %u\n", result);
    debug_exit(1);
}

static void check(void) {
    char first[9] = {0};
    for (unsigned i = 0; i < 8; i++)
        first[i] = ((volatile char *)start)[i];
    for (uint64_t page = 0; page < pages; page++)
        *word(page * PAGE_SIZE + 8) = page;
    flush();
    print("pmem: begins with %s, last page has %lu\n", first, *word((pages - 1) * PAGE_SIZE + 8));
}

static void probe(void) {
    uint64_t offset = option_number(cmdline, "offset", 0);
    print("pmem: ready\n");
    while (!(inb(COM1 + 5) & 1))
        __asm__ volatile("pause");
    if (option_is(cmdline, "op", "write"))
        *word(offset) = 1;
    print("pmem: at %lx is %lx\n", offset, *word(offset));
}

static void serve(void) {
    if (option_is(cmdline, "mode", "probe"))
        probe();
    else if (option_is(cmdline, "mode", "request"))
        print("pmem: result %u\n", ask((uint32_t)option_number(cmdline, "type", FLUSH)));
    else if (option_is(cmdline, "mode", "log"))
        for (uint64_t n = 1;; n++) {
            *word(n % pages * PAGE_SIZE) = n;
            flush();
            print("%lu\n", n);
        }
    else
        check();
    debug_exit(0);
}

int main(uint32_t magic, uintptr_t info) {
    cmdline = boot_cmdline(magic, info);
    base = option_number(cmdline, "base", 0xd0000000);
    serial_init();
    if (!virtio_start(base, PMEM_ID, 0) || !virtq_setup(&queue, base, 0, false, false)) {
        print("pmem: no device at %lx\n", base);
        return 1;
    }
    virtio_driver_ok(base);
    const volatile uint32_t *config = (const volatile uint32_t *)(base + VIRTIO_MMIO_CONFIG);
    start = config[0] | (uint64_t)config[1] << 32;
    uint64_t size = config[2] | (uint64_t)config[3] << 32;
    print("pmem: %lu KiB at %lx\n", size >> 10, start);
    pages = size / PAGE_SIZE;
    map(size);
    virtio_run(serve, option_number(cmdline, "ring", 3) == 0);
}
