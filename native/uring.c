#define _GNU_SOURCE
#include "uring.h"
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One mapping; no completion is lost; work that blocks is done by threads that are this process's. */
#define NEEDED (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_NATIVE_WORKERS)

enum { WORKERS = 64 };

static int enter(struct pk_uring *ring, unsigned count, unsigned wait) {
    unsigned flags = wait ? IORING_ENTER_GETEVENTS : 0;
    long done = syscall(__NR_io_uring_enter, ring->fd, count, wait, flags, NULL, 0);
    return done < 0 ? -errno : (int)done;
}

static void *map(int fd, size_t size, off_t offset) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (at == MAP_FAILED)
        return NULL;
    madvise(at, size, MADV_DONTFORK); /* a child has no use for it */
    return at;
}

static int map_rings(struct pk_uring *ring, const struct io_uring_params *params) {
    size_t sq_size = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    size_t cq_size = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
    ring->rings = map(ring->fd, ring->rings_size, IORING_OFF_SQ_RING);
    ring->sqes = map(ring->fd, params->sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
    if (!ring->rings || !ring->sqes)
        return -ENOMEM;
    uint8_t *base = ring->rings;
    ring->sq_head = (unsigned *)(base + params->sq_off.head);
    ring->sq_tail = (unsigned *)(base + params->sq_off.tail);
    ring->cq_head = (unsigned *)(base + params->cq_off.head);
    ring->cq_tail = (unsigned *)(base + params->cq_off.tail);
    ring->cqes = (struct io_uring_cqe *)(base + params->cq_off.cqes);
    ring->cq_mask = params->cq_entries - 1;
    unsigned *array = (unsigned *)(base + params->sq_off.array);
    for (unsigned i = 0; i < params->sq_entries; i++)
        array[i] = i; /* entries are submitted in the order of their places */
    return 0;
}

/* Threads for work that blocks: by default four for each CPU, which is little for a slow disk. Linux 5.15. */
static void allow_workers(int fd) {
    unsigned counts[2] = {WORKERS, 0}; /* of files; of all else, as it is */
    syscall(__NR_io_uring_register, fd, IORING_REGISTER_IOWQ_MAX_WORKERS, counts, 2);
}

int pk_uring_init(struct pk_uring *ring, unsigned entries, int eventfd) {
    struct io_uring_params params = {0};
    memset(ring, 0, sizeof(*ring));
    ring->entries = entries;
    ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params); /* closed on exec by itself */
    if (ring->fd < 0)
        return -errno;
    int failed = (params.features & NEEDED) == NEEDED ? map_rings(ring, &params) : -ENOSYS;
    if (!failed && eventfd >= 0 &&
        syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_EVENTFD, &eventfd, 1) < 0)
        failed = -errno;
    if (failed)
        pk_uring_deinit(ring);
    else
        allow_workers(ring->fd);
    return failed;
}

void pk_uring_deinit(struct pk_uring *ring) {
    if (ring->sqes)
        munmap(ring->sqes, ring->entries * sizeof(struct io_uring_sqe));
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    close(ring->fd);
    memset(ring, 0, sizeof(*ring));
    ring->fd = -1;
}

struct io_uring_sqe *pk_uring_next(struct pk_uring *ring) {
    unsigned tail = *ring->sq_tail; /* written on this side only */
    if (tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->entries)
        return NULL;
    struct io_uring_sqe *sqe = &ring->sqes[tail & (ring->entries - 1)];
    memset(sqe, 0, sizeof(*sqe));
    ring->queued++;
    __atomic_store_n(ring->sq_tail, tail + 1,
                     __ATOMIC_RELEASE); /* the kernel looks only when it is entered */
    return sqe;
}

int pk_uring_submit(struct pk_uring *ring, unsigned wait) {
    while (ring->queued || wait) {
        int done = enter(ring, ring->queued, wait);
        if (done == -EINTR)
            continue;
        if (done < 0)
            return done;
        if (!done && ring->queued)
            return -EAGAIN;
        ring->queued -= (unsigned)done;
        if (!ring->queued)
            return 0;
    }
    return 0;
}

int pk_uring_take_back(struct pk_uring *ring, uint64_t *data) {
    if (!ring->queued)
        return 0;
    unsigned tail = *ring->sq_tail - 1;
    *data = ring->sqes[tail & (ring->entries - 1)].user_data;
    __atomic_store_n(ring->sq_tail, tail, __ATOMIC_RELEASE);
    ring->queued--;
    return 1;
}

int pk_uring_reap(struct pk_uring *ring, uint64_t *data, int32_t *result) {
    unsigned head = *ring->cq_head; /* written on this side only */
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return 0;
    const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
    *data = cqe->user_data;
    *result = cqe->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return 1;
}

int pk_uring_probe(void) {
    struct pk_uring ring;
    int failed = pk_uring_init(&ring, 1, -1);
    if (!failed)
        pk_uring_deinit(&ring);
    return failed;
}
