#include "virtqueue.h"
#include "clock.h"
#include <linux/virtio_ring.h>
#include <string.h>
#include <unistd.h>

#define MAX_BYTES 0xffffffffull /* of a chain, as in queue.py */

enum { AVAIL_FLAGS = 0, AVAIL_IDX = 1, AVAIL_RING = 2, USED_IDX = 1, USED_HEADER = 4 };

/* The driver may write at any time: each value is read once. */
static uint16_t load(const uint16_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

static struct vring_desc load_desc(const uint8_t *table, uint32_t index) {
    struct vring_desc desc;
    memcpy(&desc, table + index * sizeof(desc), sizeof(desc)); /* an indirect table has no alignment */
    __asm__ volatile("" ::: "memory");
    return desc;
}

/* 2.7.6, 2.7.13.3: how many chains are available, or PK_FAULT. */
static int pending(const struct pk_virtqueue *queue) {
    uint16_t waiting = (uint16_t)(load(&queue->avail[AVAIL_IDX]) - queue->next_avail);
    return waiting > queue->size ? PK_FAULT : waiting;
}

struct walk {
    const struct pk_slots *slots;
    const uint8_t *table;
    uint32_t limit, index, count;
    uint64_t bytes;
    int indirect;
};

/* 2.7.5.3.1: go on in an indirect table. */
static int enter_table(const struct pk_virtqueue *queue, struct walk *walk, const struct vring_desc *desc) {
    if (walk->indirect || desc->flags & VRING_DESC_F_NEXT || !queue->indirect)
        return PK_FAULT;
    if (!desc->len || desc->len % sizeof(*desc))
        return PK_FAULT;
    walk->table = pk_memory_view(walk->slots, desc->addr, desc->len);
    walk->limit = desc->len / sizeof(*desc);
    walk->index = 0;
    walk->indirect = 1;
    return walk->table ? PK_GOT : PK_FAULT;
}

static int add_buffer(const struct pk_virtqueue *queue, struct walk *walk, const struct vring_desc *desc,
                      struct pk_chain *chain) {
    int write = desc->flags & VRING_DESC_F_WRITE;
    walk->count++;
    walk->bytes += desc->len;
    if (walk->count > (walk->indirect ? PK_QUEUE_MAX : queue->size) || walk->bytes > MAX_BYTES)
        return PK_FAULT; /* a loop, too */
    if (!desc->len || (!write && chain->writable_bytes))
        return PK_FAULT; /* 2.7.4.2: readable after writable */
    int added = pk_memory_iov(walk->slots, desc->addr, desc->len, write, chain->iov + chain->count,
                              PK_QUEUE_MAX - chain->count);
    if (added < 0)
        return PK_FAULT;
    chain->count += added;
    if (write) {
        chain->writable_bytes += desc->len;
    } else {
        chain->readable_bytes += desc->len;
        chain->readable = chain->count;
    }
    return PK_GOT;
}

static int walk_chain(const struct pk_virtqueue *queue, struct pk_chain *chain) {
    struct walk walk = {.slots = __atomic_load_n(&queue->memory->slots, __ATOMIC_ACQUIRE),
                        .table = queue->desc,
                        .limit = queue->size,
                        .index = chain->head};
    for (;;) {
        if (walk.index >= walk.limit)
            return PK_FAULT;
        struct vring_desc desc = load_desc(walk.table, walk.index);
        if (desc.flags & VRING_DESC_F_INDIRECT) {
            if (enter_table(queue, &walk, &desc) == PK_FAULT)
                return PK_FAULT;
            continue;
        }
        if (add_buffer(queue, &walk, &desc, chain) == PK_FAULT)
            return PK_FAULT;
        if (!(desc.flags & VRING_DESC_F_NEXT))
            return PK_GOT;
        walk.index = desc.next;
    }
}

int pk_queue_pop(struct pk_virtqueue *queue, struct pk_chain *chain) {
    if (!queue->enabled)
        return PK_EMPTY;
    int waiting = pending(queue);
    if (waiting <= 0)
        return waiting;
    chain->head = load(&queue->avail[AVAIL_RING + (queue->next_avail & (queue->size - 1))]);
    chain->readable = chain->count = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    if (walk_chain(queue, chain) == PK_FAULT)
        return PK_FAULT;
    queue->next_avail++;
    return PK_GOT;
}

int pk_queue_more(const struct pk_virtqueue *queue) { return queue->enabled && pending(queue) > 0; }

void pk_queue_unpop(struct pk_virtqueue *queue) { queue->next_avail--; }

void pk_queue_push(struct pk_virtqueue *queue, uint16_t head, uint32_t written) {
    const struct pk_slots *slots = __atomic_load_n(&queue->memory->slots, __ATOMIC_ACQUIRE);
    struct vring_used_elem entry = {head, written};
    uint8_t *at =
        (uint8_t *)queue->used + USED_HEADER + (queue->next_used & (queue->size - 1)) * sizeof(entry);
    memcpy(at, &entry, sizeof(entry));
    queue->next_used++;
    __atomic_store_n(&queue->used[USED_IDX], queue->next_used, __ATOMIC_RELEASE);
    pk_memory_written(slots, at, sizeof(entry));
    pk_memory_written(slots, queue->used, USED_HEADER);
}

int pk_queue_should_interrupt(struct pk_virtqueue *queue) {
    if (!queue->enabled || queue->next_used == queue->signalled)
        return 0;
    uint16_t old = queue->signalled;
    queue->signalled = queue->next_used;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* used.idx must be out before the driver's wish is read */
    if (queue->event_idx) {
        uint16_t event = load(&queue->avail[AVAIL_RING + queue->size]);
        return vring_need_event(event, queue->next_used, old);
    }
    return !(load(&queue->avail[AVAIL_FLAGS]) & VRING_AVAIL_F_NO_INTERRUPT);
}

int pk_queue_want_notification(struct pk_virtqueue *queue) {
    if (!queue->enabled)
        return PK_EMPTY;
    if (queue->event_idx) { /* avail_event (2.7.10) */
        uint16_t *at =
            (uint16_t *)((uint8_t *)queue->used + USED_HEADER + queue->size * sizeof(struct vring_used_elem));
        __atomic_store_n(at, queue->next_avail, __ATOMIC_RELAXED);
        pk_memory_written(__atomic_load_n(&queue->memory->slots, __ATOMIC_ACQUIRE), at, sizeof(*at));
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int waiting = pending(queue);
    return waiting > 0 ? PK_GOT : waiting;
}

enum { POLL_FIRST_NS = 8000, LOOKS = 16 };

int pk_queue_poll(const struct pk_virtqueue *queue, struct pk_poll *poll, const unsigned *other,
                  unsigned known) {
    if (!poll->max_ns)
        return PK_EMPTY;
    poll->idle_since = pk_now_ns();
    uint64_t end = poll->idle_since + poll->now_ns;
    while (poll->now_ns && pk_now_ns() < end)
        for (int i = 0; i < LOOKS; i++) {
            if (load(&queue->avail[AVAIL_IDX]) != queue->next_avail)
                return PK_GOT;
            if (other && __atomic_load_n(other, __ATOMIC_RELAXED) != known)
                return PK_GOT;
            __builtin_ia32_pause();
        }
    return PK_EMPTY;
}

void pk_queue_woken(struct pk_poll *poll) {
    if (!poll->max_ns || !poll->idle_since)
        return;
    if (pk_now_ns() - poll->idle_since > poll->max_ns)
        poll->now_ns = 0; /* watching does not pay */
    else if (!poll->now_ns)
        poll->now_ns = POLL_FIRST_NS < poll->max_ns ? POLL_FIRST_NS : poll->max_ns;
    else
        poll->now_ns = 2 * poll->now_ns < poll->max_ns ? 2 * poll->now_ns : poll->max_ns;
    poll->idle_since = 0;
}

void pk_chain_written(const struct pk_virtqueue *queue, const struct pk_chain *chain, uint64_t length) {
    const struct pk_slots *slots = __atomic_load_n(&queue->memory->slots, __ATOMIC_ACQUIRE);
    for (int i = chain->readable; length && i < chain->count; i++) {
        uint64_t part = chain->iov[i].iov_len < length ? chain->iov[i].iov_len : length;
        pk_memory_written(slots, chain->iov[i].iov_base, part);
        length -= part;
    }
}

/* Takes `size` bytes off the front of iov[0, count): the entries that are left, or -1 when there are not
 * enough. */
static int advance(struct iovec **iov, int count, size_t size) {
    while (count && size >= (*iov)->iov_len) {
        size -= (*iov)->iov_len;
        (*iov)++;
        count--;
    }
    if (size) {
        if (!count)
            return -1;
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + size;
        (*iov)->iov_len -= size;
    }
    return count;
}

int pk_chain_take(struct pk_chain *chain, void *header, size_t size, struct iovec **rest) {
    size_t done = 0;
    for (int i = 0; i < chain->readable && done < size; i++) {
        size_t part = chain->iov[i].iov_len < size - done ? chain->iov[i].iov_len : size - done;
        memcpy((uint8_t *)header + done, chain->iov[i].iov_base, part);
        done += part;
    }
    *rest = chain->iov;
    return advance(rest, chain->readable, size);
}

void pk_interrupt_raise(const struct pk_interrupt *interrupt, uint32_t bit) {
    const uint64_t one = 1;
    __atomic_fetch_or(interrupt->status, bit, __ATOMIC_SEQ_CST);
    ssize_t result = write(interrupt->call, &one, sizeof(one)); /* full only after 2^64 - 2 unheard ones */
    (void)result;
}
