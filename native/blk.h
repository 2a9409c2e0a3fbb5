/*
 * A disk's requests without Python: reads, writes and flushes of a driver that keeps to the rules, on a host
 * that does. Whatever else happens - another type, a bound that is broken, an error of the host - stays in
 * the ring, and Python, which has the policy and the words (pykvm/virtio/blk.py), serves it.
 */
#ifndef PYKVM_BLK_H
#define PYKVM_BLK_H

#include "ioloop.h"
#include "uring.h"
#include "virtqueue.h"

/* What pk_blk_serve ended with. */
enum {
    PK_BLK_DONE = 0, /* the ring is empty, and the driver will notify */
    PK_BLK_MORE = 1, /* enough for one turn: serve again soon */
    PK_BLK_PYTHON =
        2, /* the next request (or the ring) is for Python; no interrupt was raised since the last one */
};

/* Which requests go to the host one beside the other, by an io_uring (blkio.c); all others one after the
 * other. */
enum {
    PK_BLK_SERIAL = 0, /* none: the host allows no io_uring */
    PK_BLK_MISSES = 1, /* what would wait for the disk: reads of what is not in the page cache, and flushes */
    PK_BLK_ALL = 2     /* reads, writes and flushes */
};

struct pk_blk_io;

struct pk_blk {
    struct pk_handler handler; /* for pk_io_handle with `ended` */
    pthread_mutex_t *lock;     /* the transport's; guards all of this and the queues */
    int fd;                    /* with O_DIRECT for `direct` */
    uint64_t sectors;
    uint32_t unit; /* what addresses, lengths and offsets are multiples of; 1 without direct I/O */
    uint8_t active;
    uint8_t readonly;
    uint8_t write_through; /* the driver cannot flush: each write is on stable storage when it ends */
    int flush_error; /* errno of a flush, which the kernel tells only once: for Python, with the request */
    uint64_t reads, writes, flushes;
    struct pk_interrupt interrupt;
    int ended; /* an eventfd: requests in the ring have ended, or there are some for pk_blk_take_failed */
    uint8_t parallel;            /* PK_BLK_*; falls to PK_BLK_SERIAL where there is no io_uring */
    uint8_t no_nowait;           /* the file system does not know RWF_NOWAIT */
    uint32_t in_flight, writing; /* requests in the ring; writes and flushes of them */
    /*
     * A request that takes longer than slow_ns here shows a slow host - one that copies slowly, a file system
     * that cannot say that it would wait: the next `slow` ones go to the ring where others are behind them.
     */
    uint32_t slow_ns, slow, served;
    struct pk_uring ring; /* from the first of them on: then its entries are not 0 */
    struct pk_blk_io *failed;
};

/* One queue of a disk; `handler` is for pk_io_handle with the queue's kick eventfd. */
struct pk_blk_queue {
    struct pk_handler handler;
    struct pk_blk *disk;
    struct pk_virtqueue *queue;
    struct pk_poll poll;
    int kick; /* the eventfd of its notifications */
};

void pk_blk_init(struct pk_blk *disk);
void pk_blk_queue_init(struct pk_blk_queue *queue);
/* Serves requests under the lock, which the caller holds; some may go on when it returns. */
int pk_blk_serve(struct pk_blk_queue *queue);

/* All below under the lock, too. Finishes the requests that have ended. */
void pk_blk_complete(struct pk_blk *disk);
/* Waits until none is in the ring, and finishes them. */
void pk_blk_settle(struct pk_blk *disk);
/* The same after a reset or at the end: cancels what can be cancelled, and the driver hears of none. */
void pk_blk_abandon(struct pk_blk *disk);
/* abandon, and gives the ring back. */
void pk_blk_deinit(struct pk_blk *disk);
/*
 * A request that failed, for Python to do again and to find out why: 1 with its place, or 0. `error` is an
 * errno or, where the host moved only a part, 0; a flush's is told only once.
 */
struct pk_blk_failed {
    struct pk_virtqueue *queue;
    uint16_t head;
    uint32_t type;
    int error;
};
int pk_blk_take_failed(struct pk_blk *disk, struct pk_blk_failed *failed);

/* -- between blk.c and blkio.c -- */

/* What a request wants of the file, checked. */
struct pk_blk_move {
    uint32_t type; /* VIRTIO_BLK_T_IN, _OUT or _FLUSH */
    struct iovec *iov;
    int count;
    uint64_t offset, bytes;
    uint64_t room; /* bytes for the driver before the status */
};
/* Puts it into the ring: 0, or -1 where that cannot be done. The chain, which `move` points into, is copied.
 */
int pk_blk_begin(struct pk_blk_queue *queue, const struct pk_chain *chain, const struct pk_blk_move *move);
/* Lets the host begin with what was put into the ring. */
void pk_blk_submit(struct pk_blk *disk);
/* Answers a request that was done, without an interrupt. */
void pk_blk_answer(struct pk_blk_queue *queue, struct pk_chain *chain, uint32_t type, uint64_t room);
void pk_blk_interrupt(struct pk_blk_queue *queue);
/* Watches the queue for more, and the ring for ends: as pk_queue_poll. */
int pk_blk_watch(struct pk_blk_queue *queue);

/* fallocate(2): 0 or -errno. */
int pk_fallocate(int fd, int mode, int64_t offset, int64_t length);

#endif
