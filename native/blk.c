#define _GNU_SOURCE
#include "blk.h"
#include "clock.h"
#include "lock.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_mmio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { SECTOR_SHIFT = 9, SECTOR = 1 << SECTOR_SHIFT };
/* One turn, so that other devices and timers get theirs; and how much goes before the driver hears of it. */
enum { TURN_REQUESTS = 64, TURN_BYTES = 4 << 20, INTERRUPT_EVERY = 8 };
/* After how many requests the clock is looked at, and for how many it counts. */
enum { CLOCK_EVERY = 8, SLOW_FOR = 256 };
/* What became of a request. */
enum { DONE, BEGUN, FOR_PYTHON, NOTHING };

static int aligned(const struct iovec *iov, int count, uint64_t offset, uint32_t unit) {
    uint64_t all = offset;
    for (int i = 0; i < count; i++)
        all |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    return !(all & (unit - 1));
}

/* Whether it is whole sectors of the disk, placed as the host takes them. */
static int allowed(const struct pk_blk *disk, struct pk_blk_move *move, uint64_t sector) {
    uint64_t sectors = move->bytes >> SECTOR_SHIFT;
    if (move->bytes % SECTOR || sector > disk->sectors || sectors > disk->sectors - sector)
        return 0;
    move->offset = sector << SECTOR_SHIFT;
    return move->count <= IOV_MAX && aligned(move->iov, move->count, move->offset, disk->unit);
}

static ssize_t transfer(const struct pk_blk *disk, const struct pk_blk_move *move, int flags) {
    ssize_t done;
    do
        done = move->type == VIRTIO_BLK_T_OUT
                   ? pwritev2(disk->fd, move->iov, move->count, (off_t)move->offset, flags)
                   : preadv2(disk->fd, move->iov, move->count, (off_t)move->offset, flags);
    while (done < 0 && errno == EINTR);
    return done;
}

/* How often somebody else got this thread's CPU. */
static long preempted(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

/* The same, and looks at the clock now and then: a busy CPU is no slow host. */
static ssize_t timed_transfer(struct pk_blk *disk, const struct pk_blk_move *move, int flags) {
    if (disk->served++ % CLOCK_EVERY)
        return transfer(disk, move, flags);
    long before = preempted();
    uint64_t start = pk_now_ns();
    ssize_t done = transfer(disk, move, flags);
    int failed = errno;
    if (pk_now_ns() - start > disk->slow_ns && preempted() == before)
        disk->slow = SLOW_FOR;
    errno = failed;
    return done;
}

/* Reads what the page cache has: 1 if that was all, 0 if not. */
static int read_cached(struct pk_blk *disk, const struct pk_blk_move *move) {
    if (disk->no_nowait)
        return 0;
    ssize_t done = timed_transfer(disk, move, RWF_NOWAIT);
    disk->no_nowait = done < 0 && errno == EOPNOTSUPP;
    return done == (ssize_t)move->bytes;
}

/*
 * Whether it is for the ring. Not so a write that ends in the page cache: file systems take one after the
 * other anyway. A flush is about the writes that had ended when it came (virtio 1.2, 5.2.6.2): it waits for
 * none that are in the ring.
 */
static int waits(const struct pk_blk *disk, uint32_t type) {
    if (disk->parallel != PK_BLK_MISSES)
        return disk->parallel;
    return type == VIRTIO_BLK_T_OUT ? disk->write_through : type == VIRTIO_BLK_T_FLUSH || !disk->no_nowait;
}

static int flush(struct pk_blk *disk) {
    if (fdatasync(disk->fd) == 0)
        return DONE;
    disk->flush_error = errno;
    return FOR_PYTHON;
}

/* Whether the host is slow, and others would have to wait for this one. */
static int go_aside(struct pk_blk_queue *queue) {
    struct pk_blk *disk = queue->disk;
    if (!disk->slow || disk->parallel == PK_BLK_SERIAL)
        return 0;
    if (--disk->slow == 0)
        disk->served = 0; /* look at the clock again */
    return disk->in_flight || pk_queue_more(queue->queue);
}

/* Moves the data, or begins to. */
static int carry_out(struct pk_blk_queue *queue, const struct pk_chain *chain,
                     const struct pk_blk_move *move) {
    struct pk_blk *disk = queue->disk;
    int aside = go_aside(queue);
    if (!aside && move->type == VIRTIO_BLK_T_IN && disk->parallel == PK_BLK_MISSES && read_cached(disk, move))
        return DONE;
    if ((aside || waits(disk, move->type)) && pk_blk_begin(queue, chain, move) == 0)
        return BEGUN;
    if (move->type == VIRTIO_BLK_T_FLUSH)
        return flush(disk);
    int durable = move->type == VIRTIO_BLK_T_OUT && disk->write_through;
    ssize_t done = timed_transfer(disk, move, durable ? RWF_DSYNC : 0);
    return done == (ssize_t)move->bytes ? DONE : FOR_PYTHON; /* a part: a cut file, a full file system */
}

/* The last writable byte is the status's: what is before it, as entries. */
static int data_entries(struct pk_chain *chain) {
    struct iovec *last = &chain->iov[chain->count - 1];
    return chain->count - chain->readable - (--last->iov_len == 0);
}

/* What the driver asks for: 1, or 0 where Python has to find out. */
static int understand(const struct pk_blk *disk, struct pk_chain *chain, struct pk_blk_move *move) {
    struct virtio_blk_outhdr header;
    int left = pk_chain_take(chain, &header, sizeof(header), &move->iov);
    if (left < 0 || !chain->writable_bytes)
        return 0;
    int entries = data_entries(chain);
    move->type = header.type;
    move->count = left;
    move->room = chain->writable_bytes - 1;
    if (header.type == VIRTIO_BLK_T_OUT) {
        move->bytes = chain->readable_bytes - sizeof(header);
        return !disk->readonly && allowed(disk, move, header.sector);
    }
    if (header.type == VIRTIO_BLK_T_IN) {
        move->iov = chain->iov + chain->readable;
        move->count = entries;
        move->bytes = move->room;
        return allowed(disk, move, header.sector);
    }
    return header.type == VIRTIO_BLK_T_FLUSH;
}

void pk_blk_interrupt(struct pk_blk_queue *queue) {
    if (pk_queue_should_interrupt(queue->queue))
        pk_interrupt_raise(&queue->disk->interrupt, VIRTIO_MMIO_INT_VRING);
}

/* The status's byte, which may be far behind the data: data_entries has taken it off the last entry. */
static uint8_t *status_of(const struct pk_chain *chain) {
    const struct iovec *last = &chain->iov[chain->count - 1];
    return (uint8_t *)last->iov_base + last->iov_len;
}

void pk_blk_answer(struct pk_blk_queue *queue, struct pk_chain *chain, uint32_t type, uint64_t room) {
    struct pk_blk *disk = queue->disk;
    uint64_t *count = type == VIRTIO_BLK_T_IN    ? &disk->reads
                      : type == VIRTIO_BLK_T_OUT ? &disk->writes
                                                 : &disk->flushes;
    ++*count;
    uint8_t *status = status_of(chain);
    *(volatile uint8_t *)status = VIRTIO_BLK_S_OK;
    pk_chain_written(queue->queue, chain, chain->writable_bytes);
    pk_memory_written(__atomic_load_n(&queue->queue->memory->slots, __ATOMIC_ACQUIRE), status, 1);
    pk_queue_push(queue->queue, chain->head, (uint32_t)room + 1);
}

/* Pops the next request and serves it. */
static int serve_next(struct pk_blk_queue *queue, uint64_t *bytes) {
    struct pk_chain chain;
    struct pk_blk_move move = {0};
    int found = pk_queue_pop(queue->queue, &chain);
    if (found != PK_GOT)
        return found == PK_FAULT ? FOR_PYTHON : NOTHING;
    *bytes += chain.readable_bytes + chain.writable_bytes;
    int how = understand(queue->disk, &chain, &move) ? carry_out(queue, &chain, &move) : FOR_PYTHON;
    if (how == DONE)
        pk_blk_answer(queue, &chain, move.type, move.room);
    else if (how == FOR_PYTHON)
        pk_queue_unpop(queue->queue);
    return how;
}

/* The ring is empty: whether there is more after all, before the driver was asked to notify. */
static int more(struct pk_blk_queue *queue) {
    pk_blk_submit(queue->disk);
    pk_blk_interrupt(queue); /* before asking for more: the driver has something to do meanwhile */
    if (pk_blk_watch(queue) == PK_GOT)
        return PK_GOT;
    return pk_queue_want_notification(queue->queue);
}

static int serve_turn(struct pk_blk_queue *queue) {
    uint64_t bytes = 0;
    for (int served = 0; served < TURN_REQUESTS && bytes < TURN_BYTES;) {
        int how = serve_next(queue, &bytes);
        if (how == FOR_PYTHON)
            return PK_BLK_PYTHON;
        if (how == NOTHING) {
            int found = more(queue);
            if (found != PK_GOT)
                return found == PK_FAULT ? PK_BLK_PYTHON : PK_BLK_DONE;
        } else if (++served % INTERRUPT_EVERY == 0) {
            pk_blk_submit(queue->disk);
            pk_blk_interrupt(queue);
        }
    }
    pk_blk_interrupt(queue);
    return PK_BLK_MORE;
}

int pk_blk_serve(struct pk_blk_queue *queue) {
    int verdict = serve_turn(queue);
    pk_blk_submit(queue->disk);
    return verdict;
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
