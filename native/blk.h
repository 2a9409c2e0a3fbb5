/* What a disk needs of the host and Python cannot call. */
#ifndef PYKVM_BLK_H
#define PYKVM_BLK_H

#include <stdint.h>

/* fallocate(2): 0 or -errno. */
int pk_fallocate(int fd, int mode, int64_t offset, int64_t length);

#endif
