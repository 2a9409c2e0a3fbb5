/*
 * The split virtqueue, device side, in C: the twin of pykvm/virtio/queue.py, which is the reference and has
 * the words for what a driver did wrong. Here a broken rule is only PK_FAULT: the caller leaves the queue as
 * it is and goes back to Python, whose pop() finds the same and says so. Source: virtio 1.2, 2.7.
 *
 *     while (pk_queue_pop(queue, &chain) == PK_GOT)
 *         pk_queue_push(queue, chain.head, written);
 *     if (pk_queue_should_interrupt(queue)) ...
 *
 * Not thread-safe: the lock of the device guards it.
 */
#ifndef PYKVM_VIRTQUEUE_H
#define PYKVM_VIRTQUEUE_H

#include "guestmem.h"
#include <pthread.h>

#define PK_QUEUE_MAX 1024 /* MAX_SIZE in queue.py: IOV_MAX */

enum { PK_EMPTY = 0, PK_GOT = 1, PK_FAULT = -1 };

struct pk_virtqueue {
    struct pk_memory *memory;
    uint8_t *desc; /* the rings in host memory, checked by queue.py when the driver enabled the queue */
    uint16_t *avail, *used;
    uint16_t size;
    uint16_t next_avail, next_used, signalled; /* free-running, as in the rings */
    uint8_t enabled, event_idx, indirect;
};

/* One request: iov[0, readable) of it the driver wrote, iov[readable, count) the device fills. */
struct pk_chain {
    uint16_t head;
    uint16_t readable, count;
    uint64_t readable_bytes, writable_bytes;
    struct iovec iov[PK_QUEUE_MAX];
};

/* PK_EMPTY, PK_GOT, or PK_FAULT: a rule is broken, or the chain has more parts than an iov: nothing is taken.
 */
int pk_queue_pop(struct pk_virtqueue *queue, struct pk_chain *chain);
/* Whether there are more chains to pop. */
int pk_queue_more(const struct pk_virtqueue *queue);
/* Gives the chain popped last back to the available ring. */
void pk_queue_unpop(struct pk_virtqueue *queue);
/* Gives a chain back with `written` bytes in its writable buffers (2.7.8). */
void pk_queue_push(struct pk_virtqueue *queue, uint16_t head, uint32_t written);
/* Whether the driver wants to hear of what was pushed since the last call (2.7.7, 2.7.10). */
int pk_queue_should_interrupt(struct pk_virtqueue *queue);
/* Asks for a notification of the next chain: PK_GOT if one came meanwhile, PK_EMPTY, or PK_FAULT. */
int pk_queue_want_notification(struct pk_virtqueue *queue);

/* Copies the first `size` readable bytes, which may be cut into buffers anywhere (2.7.4), to `header` and
 * takes them off the chain: the readable entries that are left from *rest on, or -1 when there are fewer
 * bytes. */
int pk_chain_take(struct pk_chain *chain, void *header, size_t size, struct iovec **rest);

/*
 * An empty queue is watched for a while before its driver is asked to notify: a notification costs an exit
 * and a wake-up, many times what a short request does. How long adapts: to nothing, where watching found
 * nothing.
 */
struct pk_poll {
    uint32_t max_ns, now_ns; /* 0: never; how long at present */
    uint64_t idle_since; /* CLOCK_MONOTONIC when the queue was left empty and watching began; 0: not yet */
};
/*
 * Watches: PK_GOT when the driver added a chain or `*other` (may be NULL) is not `known` any more, else
 * PK_EMPTY. Busy for at most max_ns.
 */
int pk_queue_poll(const struct pk_virtqueue *queue, struct pk_poll *poll, const unsigned *other,
                  unsigned known);
/* A notification woke the caller: adapts to how long that took. */
void pk_queue_woken(struct pk_poll *poll);

/* Marks the first `length` bytes of the chain's writable buffers as written. Call it before the push. */
void pk_chain_written(const struct pk_virtqueue *queue, const struct pk_chain *chain, uint64_t length);

/* What raises the device's interrupt: the bit in InterruptStatus, then the irqfd. */
struct pk_interrupt {
    uint32_t *status;
    int call;
};
void pk_interrupt_raise(const struct pk_interrupt *interrupt, uint32_t bit);

#endif
