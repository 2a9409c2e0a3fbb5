/*
 * What snapshots want done fast: mappings of frozen memory, the pages a machine wrote since, rows of ioctls.
 */
#ifndef PYKVM_SNAPMEM_H
#define PYKVM_SNAPMEM_H

#include <stddef.h>
#include <stdint.h>

/* Host addresses [start, end), page-aligned. */
struct pk_range {
    uint64_t start, end;
};

/* One ioctl of a row. */
struct pk_call {
    unsigned long request;
    void *argument;
};

/* Replaces the mapping at `address` by a copy-on-write one of `fd` at `offset`: 0 or -errno. */
int pk_map_private(void *address, size_t length, int fd, uint64_t offset);
/*
 * Finds the pages of [start, end) that are this process's own (written since they were mapped copy-on-write;
 * anonymous memory: ever written) and stores them as ascending ranges: how many, or -errno; -E2BIG when
 * `room` ranges are too few. `pagemap` is an open /proc/self/pagemap.
 */
int64_t pk_private_ranges(int pagemap, uint64_t start, uint64_t end, struct pk_range *out, size_t room);
/* Gives the pages of these ranges back, so that what is mapped shows again: 0 or -errno. */
int pk_drop(const struct pk_range *ranges, size_t count);
/* Calls madvise() for each range; EINVAL is no error. For how many bytes it was done, or -errno. */
int64_t pk_advise(const struct pk_range *ranges, size_t count, int advice);
/* Issues the ioctls in order up to the first that fails: how many succeeded; then | errno << 16. */
int pk_calls(int fd, const struct pk_call *calls, int count);

#endif
