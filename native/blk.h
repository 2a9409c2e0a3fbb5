/*
 * A disk's requests without Python: reads, writes and flushes of a driver that keeps to the rules, on a host
 * that does. Whatever else happens - another type, a bound that is broken, an error of the host - stays in
 * the ring, and Python, which has the policy and the words (pykvm/virtio/blk.py), serves it.
 */
#ifndef PYKVM_BLK_H
#define PYKVM_BLK_H

#include "ioloop.h"
#include "virtqueue.h"

/* What pk_blk_serve ended with. */
enum {
    PK_BLK_DONE = 0, /* the ring is empty, and the driver will notify */
    PK_BLK_MORE = 1, /* enough for one turn: serve again soon */
    PK_BLK_PYTHON =
        2, /* the next request (or the ring) is for Python; no interrupt was raised since the last one */
};

struct pk_blk {
    pthread_mutex_t *lock; /* the transport's; guards all of this and the queues */
    int fd;                /* with O_DIRECT for `direct` */
    uint64_t sectors;
    uint32_t unit; /* what addresses, lengths and offsets are multiples of; 1 without direct I/O */
    uint8_t active;
    uint8_t readonly;
    uint8_t write_through; /* the driver cannot flush: each write is on stable storage when it ends */
    int flush_error; /* errno of a flush, which the kernel tells only once: for Python, with the request */
    uint64_t reads, writes, flushes;
    struct pk_interrupt interrupt;
};

/* One queue of a disk; `handler` is for pk_io_handle with the queue's kick eventfd. */
struct pk_blk_queue {
    struct pk_handler handler;
    struct pk_blk *disk;
    struct pk_virtqueue *queue;
    struct pk_poll poll;
};

void pk_blk_queue_init(struct pk_blk_queue *queue);
/* Serves requests under the lock, which the caller holds. */
int pk_blk_serve(struct pk_blk_queue *queue);

/* fallocate(2): 0 or -errno. */
int pk_fallocate(int fd, int mode, int64_t offset, int64_t length);

#endif
