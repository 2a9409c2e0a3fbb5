#include "virtio.h"

enum {
    MAGIC = 0x74726976,
    IOAPIC = 0xfec00000,
    IOAPIC_WINDOW = 0x10,
    IOAPIC_TABLE = 0x10,
    LAPIC_EOI = 0xb0,
    VECTOR = 0x50
};

volatile uint32_t virtio_interrupts, virtio_causes;
static uintptr_t interrupting;

static uint64_t offered(uintptr_t base) {
    virtio_write(base, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    uint64_t high = virtio_read(base, VIRTIO_MMIO_DEVICE_FEATURES);
    virtio_write(base, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    return high << 32 | virtio_read(base, VIRTIO_MMIO_DEVICE_FEATURES);
}

uint64_t virtio_start(uintptr_t base, uint32_t device_id, uint64_t wanted) {
    if (virtio_read(base, VIRTIO_MMIO_MAGIC) != MAGIC ||
        virtio_read(base, VIRTIO_MMIO_DEVICE_ID) != device_id)
        return 0;
    virtio_write(base, VIRTIO_MMIO_STATUS, 0);
    uint32_t status = VIRTIO_STATUS_ACK | VIRTIO_STATUS_DRIVER;
    virtio_write(base, VIRTIO_MMIO_STATUS, status);
    uint64_t features = offered(base) & (wanted | VIRTIO_F_VERSION_1);
    virtio_write(base, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    virtio_write(base, VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)features);
    virtio_write(base, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    virtio_write(base, VIRTIO_MMIO_DRIVER_FEATURES, features >> 32);
    virtio_write(base, VIRTIO_MMIO_STATUS, status | VIRTIO_STATUS_FEATURES_OK);
    return virtio_read(base, VIRTIO_MMIO_STATUS) & VIRTIO_STATUS_FEATURES_OK ? features : 0;
}

static void write_address(uintptr_t base, uint32_t reg, const void *address) {
    virtio_write(base, reg, (uint32_t)(uintptr_t)address);
    virtio_write(base, reg + 4, (uintptr_t)address >> 32);
}

bool virtq_setup(struct virtq *queue, uintptr_t base, uint16_t index, bool event_idx, bool interrupts) {
    memset(queue, 0, sizeof *queue);
    queue->base = base;
    queue->index = index;
    queue->event_idx = event_idx;
    queue->avail.flags = !interrupts;
    queue->avail.used_event =
        interrupts ? 0 : UINT16_MAX; /* a moment that a guest which polls keeps ahead of */
    virtio_write(base, VIRTIO_MMIO_QUEUE_SEL, index);
    if (virtio_read(base, VIRTIO_MMIO_QUEUE_NUM_MAX) < VIRTQ_SIZE)
        return false;
    virtio_write(base, VIRTIO_MMIO_QUEUE_NUM, VIRTQ_SIZE);
    write_address(base, VIRTIO_MMIO_QUEUE_DESC, queue->desc);
    write_address(base, VIRTIO_MMIO_QUEUE_AVAIL, &queue->avail);
    write_address(base, VIRTIO_MMIO_QUEUE_USED, &queue->used);
    virtio_write(base, VIRTIO_MMIO_QUEUE_READY, 1);
    return true;
}

void virtio_driver_ok(uintptr_t base) {
    virtio_write(base, VIRTIO_MMIO_STATUS, virtio_read(base, VIRTIO_MMIO_STATUS) | VIRTIO_STATUS_DRIVER_OK);
}

void virtq_kick(struct virtq *queue) {
    uint16_t old = queue->kicked_idx, new = queue->avail_idx;
    queue->kicked_idx = new;
    __asm__ volatile("lock orl $0, (%%rsp)" ::
                         : "memory"); /* avail.idx is out before the device's wish is read */
    bool wanted = queue->event_idx ? (uint16_t)(new - *(volatile uint16_t *)&queue->used.avail_event - 1) <
                                         (uint16_t)(new - old)
                                   : !(*(volatile uint16_t *)&queue->used.flags & 1);
    if (wanted)
        virtio_write(queue->base, VIRTIO_MMIO_QUEUE_NOTIFY, queue->index);
}

void virtq_wait(struct virtq *queue, bool by_interrupt) {
    volatile uint16_t *idx = &queue->used.idx;
    if (!by_interrupt)
        queue->avail.used_event = (uint16_t)(queue->used_idx - 1); /* long ago: no interrupt */
    while (*idx == queue->used_idx) {
        if (!by_interrupt) {
            __asm__ volatile("pause");
            continue;
        }
        queue->avail.used_event = queue->used_idx;
        __asm__ volatile("lock orl $0, (%%rsp)" ::: "memory");
        if (*idx == queue->used_idx)
            sti_hlt_cli();
    }
}

__attribute__((interrupt)) static void on_interrupt(struct frame *frame) {
    (void)frame;
    uint32_t status = virtio_read(interrupting, VIRTIO_MMIO_INTERRUPT_STATUS);
    virtio_write(interrupting, VIRTIO_MMIO_INTERRUPT_ACK, status);
    virtio_causes |= status;
    virtio_interrupts++;
    lapic_write(LAPIC_EOI, 0);
}

static void ioapic_route(unsigned gsi, uint8_t vector) {
    volatile uint32_t *ioapic = (volatile uint32_t *)(uintptr_t)IOAPIC;
    ioapic[0] = IOAPIC_TABLE + 2 * gsi + 1;
    ioapic[IOAPIC_WINDOW / 4] = 0; /* local APIC 0 */
    ioapic[0] = IOAPIC_TABLE + 2 * gsi;
    ioapic[IOAPIC_WINDOW / 4] = vector; /* fixed, edge, not masked */
}

void virtio_take_interrupts(uintptr_t base, unsigned gsi) {
    interrupting = base;
    set_gate(VECTOR, on_interrupt);
    pic_init(0); /* it enables the local APIC */
    ioapic_route(gsi, VECTOR);
}

_Noreturn void virtio_run(void (*mode)(void), bool by_interrupt) {
    if (!by_interrupt)
        enter_user(mode);
    mode();
    halt();
}
