#define _GNU_SOURCE
#include "blk.h"
#include "lock.h"
#include <errno.h>
#include <linux/fs.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    DEPTH = 256
}; /* requests in the ring; as many as a queue has. Beyond that they are served one by one */

/* A request in the ring. The host reads and writes its buffers until it ends, whatever the driver does. */
struct pk_blk_io {
    struct pk_blk_io *next; /* of those that failed */
    struct pk_blk_queue *queue;
    uint32_t type;
    int error;
    uint64_t bytes, room;  /* as in struct pk_blk_move */
    struct pk_chain chain; /* the entries that it has: the others are not allocated */
};

static size_t chain_size(const struct pk_chain *chain) {
    return offsetof(struct pk_chain, iov) + chain->count * sizeof(struct iovec);
}

static int have_ring(struct pk_blk *disk) {
    if (!disk->ring.entries && pk_uring_init(&disk->ring, DEPTH, disk->ended) < 0)
        disk->parallel = PK_BLK_SERIAL;
    return disk->parallel != PK_BLK_SERIAL && disk->in_flight < DEPTH;
}

static void fill_in(struct io_uring_sqe *sqe, const struct pk_blk *disk, const struct pk_blk_move *move,
                    const struct iovec *iov) {
    sqe->fd = disk->fd;
    if (move->type == VIRTIO_BLK_T_FLUSH) {
        sqe->opcode = IORING_OP_FSYNC;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
        return;
    }
    int write = move->type == VIRTIO_BLK_T_OUT;
    if (disk->parallel == PK_BLK_MISSES)
        sqe->flags = IOSQE_ASYNC; /* each copied by a thread of its own, where this one would copy all */
    sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->rw_flags = write && disk->write_through ? RWF_DSYNC : 0;
    sqe->addr = (uintptr_t)iov;
    sqe->len = (uint32_t)move->count;
    sqe->off = move->offset;
}

int pk_blk_begin(struct pk_blk_queue *queue, const struct pk_chain *chain, const struct pk_blk_move *move) {
    struct pk_blk *disk = queue->disk;
    if (!have_ring(disk))
        return -1;
    struct pk_blk_io *io = malloc(offsetof(struct pk_blk_io, chain) + chain_size(chain));
    if (!io)
        return -1;
    struct io_uring_sqe *sqe = pk_uring_next(&disk->ring);
    if (!sqe) {
        free(io);
        return -1;
    }
    io->queue = queue;
    io->type = move->type;
    io->bytes = move->bytes;
    io->room = move->room;
    memcpy(&io->chain, chain, chain_size(chain));
    fill_in(sqe, disk, move, io->chain.iov + (move->iov - chain->iov));
    sqe->user_data = (uintptr_t)io;
    disk->in_flight++;
    disk->writing += io->type != VIRTIO_BLK_T_IN;
    return 0;
}

static void write_one(int eventfd) {
    const uint64_t one = 1;
    if (write(eventfd, &one, sizeof(one)) < 0)
        return; /* it counts already */
}

static void fail(struct pk_blk *disk, struct pk_blk_io *io, int error) {
    io->error = error;
    io->next = disk->failed;
    disk->failed = io;
    write_one(disk->ended);
}

/* `result` as preadv, pwritev and fdatasync have it, or -errno. Of a device that stopped nobody hears more.
 */
static void finish(struct pk_blk *disk, struct pk_blk_io *io, int32_t result) {
    disk->in_flight--;
    disk->writing -= io->type != VIRTIO_BLK_T_IN;
    if (disk->active && result != (int64_t)io->bytes) {
        fail(disk, io, result < 0 ? -result : 0);
        return;
    }
    if (disk->active)
        pk_blk_answer(io->queue, &io->chain, io->type, io->room);
    free(io);
}

/* The queue of the last request that was answered, or NULL. */
static struct pk_blk_queue *complete(struct pk_blk *disk) {
    struct pk_blk_queue *answered = NULL;
    uint64_t data;
    int32_t result;
    while (disk->ring.entries && pk_uring_reap(&disk->ring, &data, &result)) {
        struct pk_blk_io *io = (struct pk_blk_io *)(uintptr_t)data;
        if (!io)
            continue; /* the end of a cancellation */
        if (answered && answered != io->queue)
            pk_blk_interrupt(answered);
        answered = io->queue;
        finish(disk, io, result);
    }
    if (answered)
        pk_blk_interrupt(answered);
    return answered;
}

void pk_blk_complete(struct pk_blk *disk) { complete(disk); }

int pk_blk_watch(struct pk_blk_queue *queue) {
    const struct pk_uring *ring = &queue->disk->ring;
    if (!queue->disk->in_flight)
        return pk_queue_poll(queue->queue, &queue->poll, NULL, 0);
    if (queue->disk->writing)
        return PK_EMPTY; /* the kernel ends writes in a thread of its own, which wants a CPU as well */
    return pk_queue_poll(queue->queue, &queue->poll, ring->cq_tail, *ring->cq_head);
}

/* Submits; what the host does not take, for want of memory, say, is for Python to do. */
static void submit(struct pk_blk *disk, unsigned wait) {
    uint64_t data;
    int failed = pk_uring_submit(&disk->ring, wait);
    while (failed && pk_uring_take_back(&disk->ring, &data))
        if (data)
            finish(disk, (struct pk_blk_io *)(uintptr_t)data, failed);
}

void pk_blk_submit(struct pk_blk *disk) {
    if (!disk->in_flight)
        return;
    submit(disk, 0);
    pk_blk_complete(disk); /* what ended at once */
}

void pk_blk_settle(struct pk_blk *disk) {
    while (disk->in_flight) {
        submit(disk, 1);
        pk_blk_complete(disk);
    }
}

static void cancel_all(struct pk_blk *disk) {
#ifdef IORING_ASYNC_CANCEL_ANY /* Linux 5.19; an older kernel refuses it, and they are waited for */
    struct io_uring_sqe *sqe = disk->in_flight ? pk_uring_next(&disk->ring) : NULL;
    if (!sqe)
        return;
    sqe->opcode = IORING_OP_ASYNC_CANCEL;
    sqe->fd = -1;
    sqe->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
#endif
}

void pk_blk_abandon(struct pk_blk *disk) {
    struct pk_blk_failed failed;
    disk->active = 0;
    cancel_all(disk);
    pk_blk_settle(disk);
    while (pk_blk_take_failed(disk, &failed))
        continue;
}

void pk_blk_deinit(struct pk_blk *disk) {
    pk_blk_abandon(disk);
    if (disk->ring.entries)
        pk_uring_deinit(&disk->ring);
    disk->parallel = PK_BLK_SERIAL;
}

int pk_blk_take_failed(struct pk_blk *disk, struct pk_blk_failed *failed) {
    struct pk_blk_io *io = disk->failed;
    if (!io)
        return 0;
    disk->failed = io->next;
    *failed = (struct pk_blk_failed){io->queue->queue, io->chain.head, io->type, io->error};
    free(io);
    return 1;
}

static int ended(struct pk_handler *handler, int fd) {
    struct pk_blk *disk = (struct pk_blk *)handler; /* its first member */
    uint64_t count;
    if (read(fd, &count, sizeof(count)) != sizeof(count))
        return 0;
    pk_mutex_lock(disk->lock);
    struct pk_blk_queue *answered = complete(disk);
    if (answered) { /* its driver has something to do, and may soon ask for more */
        pk_queue_woken(&answered->poll);
        if (pk_blk_serve(answered) != PK_BLK_DONE)
            write_one(answered->kick);
    }
    int python = disk->failed != NULL;
    pk_mutex_unlock(disk->lock);
    return python;
}

void pk_blk_init(struct pk_blk *disk) { disk->handler.ready = ended; }
