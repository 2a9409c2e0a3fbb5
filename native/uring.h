/*
 * One io_uring: what is submitted here runs beside its submitter, and an eventfd tells of each end. Source:
 * io_uring(7), io_uring_setup(2), io_uring_enter(2), <linux/io_uring.h>.
 *
 *     struct io_uring_sqe *sqe = pk_uring_next(&ring);      fill it in, with user_data not 0
 *     pk_uring_submit(&ring, 0);
 *     while (pk_uring_reap(&ring, &data, &result)) ...      once the eventfd counted
 *
 * Not thread-safe: whoever uses it has a lock, and may be another thread each time.
 */
#ifndef PYKVM_URING_H
#define PYKVM_URING_H

#include <linux/io_uring.h>
#include <stddef.h>
#include <stdint.h>

struct pk_uring {
    int fd;
    unsigned entries, queued; /* of the submission ring; of them filled in and not submitted */
    void *rings;              /* both, in one mapping */
    size_t rings_size;
    struct io_uring_sqe *sqes;
    unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
    struct io_uring_cqe *cqes;
    unsigned cq_mask;
};

/*
 * Makes one of `entries` (a power of two) with twice as many completions: 0, or -errno where the kernel is
 * too old (before 5.12: -ENOSYS) or does not allow it (sysctl kernel.io_uring_disabled, seccomp).
 */
int pk_uring_init(struct pk_uring *ring, unsigned entries, int eventfd);
void pk_uring_deinit(struct pk_uring *ring);
/* An empty entry, or NULL when the ring is full until the next submit. */
struct io_uring_sqe *pk_uring_next(struct pk_uring *ring);
/* Submits all that is filled in and waits for `wait` completions: 0 or -errno, then some are left over. */
int pk_uring_submit(struct pk_uring *ring, unsigned wait);
/* Takes the entry filled in last, of those left over, back: 1 and its user_data, or 0. */
int pk_uring_take_back(struct pk_uring *ring, uint64_t *data);
/* The next completion: 1 with user_data and result, or 0. */
int pk_uring_reap(struct pk_uring *ring, uint64_t *data, int32_t *result);
/* Whether this process may have one: 0 or -errno. */
int pk_uring_probe(void);

#endif
