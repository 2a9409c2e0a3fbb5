/* A driver of virtio-mmio version 2 with split queues (virtio 1.2, 2.7, 4.2), for guests that test or measure
 * one. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"

enum {
    VIRTIO_MMIO_MAGIC = 0x000,
    VIRTIO_MMIO_DEVICE_ID = 0x008,
    VIRTIO_MMIO_DEVICE_FEATURES = 0x010,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL = 0x014,
    VIRTIO_MMIO_DRIVER_FEATURES = 0x020,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL = 0x024,
    VIRTIO_MMIO_QUEUE_SEL = 0x030,
    VIRTIO_MMIO_QUEUE_NUM_MAX = 0x034,
    VIRTIO_MMIO_QUEUE_NUM = 0x038,
    VIRTIO_MMIO_QUEUE_READY = 0x044,
    VIRTIO_MMIO_QUEUE_NOTIFY = 0x050,
    VIRTIO_MMIO_INTERRUPT_STATUS = 0x060,
    VIRTIO_MMIO_INTERRUPT_ACK = 0x064,
    VIRTIO_MMIO_STATUS = 0x070,
    VIRTIO_MMIO_QUEUE_DESC = 0x080,
    VIRTIO_MMIO_QUEUE_AVAIL = 0x090,
    VIRTIO_MMIO_QUEUE_USED = 0x0a0,
    VIRTIO_MMIO_CONFIG = 0x100
};
enum {
    VIRTIO_STATUS_ACK = 1,
    VIRTIO_STATUS_DRIVER = 2,
    VIRTIO_STATUS_DRIVER_OK = 4,
    VIRTIO_STATUS_FEATURES_OK = 8
};
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)
enum { VIRTQ_SIZE = 128, VIRTQ_NEXT = 1, VIRTQ_WRITE = 2 };

struct virtq_desc {
    uint64_t gpa;
    uint32_t length;
    uint16_t flags, next;
};
struct virtq {
    struct virtq_desc desc[VIRTQ_SIZE] __attribute__((aligned(16)));
    struct {
        uint16_t flags, idx, ring[VIRTQ_SIZE], used_event;
    } avail __attribute__((aligned(2)));
    struct {
        uint16_t flags, idx;
        struct {
            uint32_t id, length;
        } ring[VIRTQ_SIZE];
        uint16_t avail_event;
    } used __attribute__((aligned(4)));
    uintptr_t base;
    uint16_t index, avail_idx, used_idx, kicked_idx;
    bool event_idx;
};

static inline uint32_t virtio_read(uintptr_t base, uint32_t reg) {
    return *(volatile uint32_t *)(base + reg);
}
static inline void virtio_write(uintptr_t base, uint32_t reg, uint32_t value) {
    *(volatile uint32_t *)(base + reg) = value;
}
/* Up to FEATURES_OK with what of `wanted` is offered; the features agreed on, 0 when there is no such device.
 */
uint64_t virtio_start(uintptr_t base, uint32_t device_id, uint64_t wanted);
/* Sets queue `index` up; interrupts come when `interrupts`. False if the device has no such queue. */
bool virtq_setup(struct virtq *queue, uintptr_t base, uint16_t index, bool event_idx, bool interrupts);
void virtio_driver_ok(uintptr_t base);

/* Offers the chain that starts with descriptor `head`; virtq_kick tells the device of all that were offered.
 */
static inline void virtq_offer(struct virtq *queue, uint16_t head) {
    queue->avail.ring[queue->avail_idx++ % VIRTQ_SIZE] = head;
    __asm__ volatile("" ::: "memory"); /* x86 keeps the order of stores */
    *(volatile uint16_t *)&queue->avail.idx = queue->avail_idx;
}
void virtq_kick(struct virtq *queue);
/* The head of a chain that the device finished, or -1. */
static inline int virtq_done(struct virtq *queue) {
    if (*(volatile uint16_t *)&queue->used.idx == queue->used_idx)
        return -1;
    __asm__ volatile("" ::: "memory");
    return (int)queue->used.ring[queue->used_idx++ % VIRTQ_SIZE].id;
}
/* Waits until the device has finished a chain: asleep if `by_interrupt` (in ring 0, interrupts off), else
 * awake.
 */
void virtq_wait(struct virtq *queue, bool by_interrupt);

/* Takes the device's interrupts from the IOAPIC's pin `gsi` on, edge-triggered: they are counted, and what
 * they were for (InterruptStatus) is collected. */
void virtio_take_interrupts(uintptr_t base, unsigned gsi);
extern volatile uint32_t virtio_interrupts, virtio_causes;

/* Runs `mode`, which does not return: in ring 3, or if `by_interrupt` in ring 0, which HLT is for. */
_Noreturn void virtio_run(void (*mode)(void), bool by_interrupt);
#endif
