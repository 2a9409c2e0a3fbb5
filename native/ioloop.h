/*
 * The I/O thread's wait: epoll, with file descriptors that C serves by itself. Python is called only for the
 * others, and when a handler asks for it.
 */
#ifndef PYKVM_IOLOOP_H
#define PYKVM_IOLOOP_H

#include <pthread.h>
#include <stdint.h>

/* `ready` serves its (readable) descriptor, in bounded time; 0, or 1 when Python's callback for it shall run.
 */
struct pk_handler {
    int (*ready)(struct pk_handler *handler, int fd);
};

struct pk_io;

/* A descriptor for Python, and its EPOLL* events. */
struct pk_ready {
    int32_t fd;
    uint32_t events;
};

struct pk_io *pk_io_new(void);
void pk_io_free(struct pk_io *io);
/*
 * Lets `handler` serve `fd` (NULL: nobody; the handler is then no longer inside `ready`). 0 or -ENOMEM. Lock
 * order: a handler's lock is taken inside this one, so hold none here.
 */
int pk_io_handle(struct pk_io *io, int fd, struct pk_handler *handler);
/*
 * Waits until a descriptor wants Python or `timeout_ns` (-1: for ever) have passed: how many of `ready` were
 * filled in. A signal ends it early. -errno when epoll fails.
 */
int pk_io_wait(struct pk_io *io, int epoll, int64_t timeout_ns, struct pk_ready *ready, int max);

#endif
