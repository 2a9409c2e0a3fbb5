#define _GNU_SOURCE
#include "blk.h"
#include "lock.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_mmio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR_SHIFT = 9, SECTOR = 1 << SECTOR_SHIFT };
/* One turn, so that other devices and timers get theirs; and how much goes before the driver hears of it. */
enum { TURN_REQUESTS = 64, TURN_BYTES = 4 << 20, INTERRUPT_EVERY = 8 };

static int aligned(const struct iovec *iov, int count, uint64_t offset, uint32_t unit) {
    uint64_t all = offset;
    for (int i = 0; i < count; i++)
        all |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    return !(all & (unit - 1));
}

/* Moves whole sectors; 0, or -1 for Python to do it again and to find out why not. */
static int move(struct pk_blk *disk, int write, struct iovec *iov, int count, uint64_t sector,
                uint64_t bytes) {
    uint64_t sectors = bytes >> SECTOR_SHIFT;
    if (bytes % SECTOR || sector > disk->sectors || sectors > disk->sectors - sector)
        return -1;
    uint64_t offset = sector << SECTOR_SHIFT;
    if (count > IOV_MAX || !aligned(iov, count, offset, disk->unit))
        return -1;
    int flags = write && disk->write_through ? RWF_DSYNC : 0;
    ssize_t done;
    do
        done = write ? pwritev2(disk->fd, iov, count, (off_t)offset, flags)
                     : preadv(disk->fd, iov, count, (off_t)offset);
    while (done < 0 && errno == EINTR);
    return done == (ssize_t)bytes ? 0 : -1; /* a part: at the end of a cut file or on a full file system */
}

static int flush(struct pk_blk *disk) {
    if (fdatasync(disk->fd) == 0) {
        disk->flushes++;
        return 0;
    }
    disk->flush_error = errno;
    return -1;
}

/* The last writable byte is the status's: what is before it, as entries. */
static int data_entries(struct pk_chain *chain) {
    struct iovec *last = &chain->iov[chain->count - 1];
    return chain->count - chain->readable - (--last->iov_len == 0);
}

/* One request: bytes before its status, or -1 when it is for Python. */
static int64_t serve_one(struct pk_blk *disk, struct pk_chain *chain) {
    struct virtio_blk_outhdr header;
    struct iovec *readable;
    int left = pk_chain_take(chain, &header, sizeof(header), &readable);
    if (left < 0 || !chain->writable_bytes)
        return -1;
    uint64_t room = chain->writable_bytes - 1, size = chain->readable_bytes - sizeof(header);
    uint8_t *status =
        (uint8_t *)chain->iov[chain->count - 1].iov_base + chain->iov[chain->count - 1].iov_len - 1;
    int entries = data_entries(chain);
    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        if (move(disk, 0, chain->iov + chain->readable, entries, header.sector, room) < 0)
            return -1;
        disk->reads++;
        break;
    case VIRTIO_BLK_T_OUT:
        if (disk->readonly || move(disk, 1, readable, left, header.sector, size) < 0)
            return -1;
        disk->writes++;
        break;
    case VIRTIO_BLK_T_FLUSH:
        if (flush(disk) < 0)
            return -1;
        break;
    default:
        return -1;
    }
    *(volatile uint8_t *)status = VIRTIO_BLK_S_OK;
    return (int64_t)room;
}

static void interrupt(struct pk_blk_queue *queue) {
    if (pk_queue_should_interrupt(queue->queue))
        pk_interrupt_raise(&queue->disk->interrupt, VIRTIO_MMIO_INT_VRING);
}

/* Tells that memory was written: the data, and the status, which may be far behind it. */
static void written(struct pk_virtqueue *queue, struct pk_chain *chain) {
    const struct iovec *last = &chain->iov[chain->count - 1];
    const struct pk_slots *slots = __atomic_load_n(&queue->memory->slots, __ATOMIC_ACQUIRE);
    pk_chain_written(queue, chain, chain->writable_bytes);
    pk_memory_written(slots, (const uint8_t *)last->iov_base + last->iov_len, 1);
}

int pk_blk_serve(struct pk_blk_queue *queue) {
    struct pk_chain chain;
    uint64_t bytes = 0;
    for (int served = 0; served < TURN_REQUESTS && bytes < TURN_BYTES;) {
        int found = pk_queue_pop(queue->queue, &chain);
        if (found == PK_EMPTY) {
            interrupt(queue); /* before asking for more: the driver has something to do meanwhile */
            if (pk_queue_poll(queue->queue, &queue->poll) == PK_GOT)
                continue;
            found = pk_queue_want_notification(queue->queue);
            if (found == PK_EMPTY)
                return PK_BLK_DONE;
            if (found == PK_GOT)
                continue;
        }
        if (found == PK_FAULT)
            return PK_BLK_PYTHON;
        bytes += chain.readable_bytes + chain.writable_bytes;
        int64_t length = serve_one(queue->disk, &chain);
        if (length < 0) {
            pk_queue_unpop(queue->queue);
            return PK_BLK_PYTHON;
        }
        written(queue->queue, &chain);
        pk_queue_push(queue->queue, chain.head, (uint32_t)length + 1);
        if (++served % INTERRUPT_EVERY == 0)
            interrupt(queue);
    }
    interrupt(queue);
    return PK_BLK_MORE;
}

static int ready(struct pk_handler *handler, int fd) {
    struct pk_blk_queue *queue = (struct pk_blk_queue *)handler; /* its first member */
    uint64_t count;
    if (read(fd, &count, sizeof(count)) != sizeof(count))
        return 0;
    int verdict = PK_BLK_DONE;
    pk_mutex_lock(queue->disk->lock);
    pk_queue_woken(&queue->poll);
    if (queue->disk->active)
        verdict = pk_blk_serve(queue);
    pk_mutex_unlock(queue->disk->lock);
    count = 1;
    if (verdict != PK_BLK_DONE && write(fd, &count, sizeof(count)) < 0)
        return 1; /* cannot be: but never lose a turn */
    return verdict == PK_BLK_PYTHON;
}

void pk_blk_queue_init(struct pk_blk_queue *queue) { queue->handler.ready = ready; }

int pk_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    int result;
    do
        result = fallocate(fd, mode, offset, length) < 0 ? -errno : 0;
    while (result == -EINTR);
    return result;
}
