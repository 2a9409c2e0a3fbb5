#define _GNU_SOURCE
#include "blk.h"
#include <errno.h>
#include <fcntl.h>

int pk_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    int result;
    do
        result = fallocate(fd, mode, offset, length) < 0 ? -errno : 0;
    while (result == -EINTR);
    return result;
}
