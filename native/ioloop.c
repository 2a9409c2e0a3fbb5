#include "ioloop.h"
#include "clock.h"
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

enum { EVENTS = 32 };
#define NS_PER_MS 1000000

struct pk_io {
    pthread_mutex_t lock; /* guards the table; held while a handler works */
    struct pk_handler **by_fd;
    int size;
};

struct pk_io *pk_io_new(void) {
    struct pk_io *io = calloc(1, sizeof(*io));
    if (io)
        pthread_mutex_init(&io->lock, NULL);
    return io;
}

void pk_io_free(struct pk_io *io) {
    pthread_mutex_destroy(&io->lock);
    free(io->by_fd);
    free(io);
}

static int grow(struct pk_io *io, int size) {
    struct pk_handler **table = realloc(io->by_fd, size * sizeof(struct pk_handler *));
    if (!table)
        return -ENOMEM;
    memset(table + io->size, 0, (size - io->size) * sizeof(struct pk_handler *));
    io->by_fd = table;
    io->size = size;
    return 0;
}

int pk_io_handle(struct pk_io *io, int fd, struct pk_handler *handler) {
    int result = 0;
    pthread_mutex_lock(&io->lock);
    if (handler && fd >= io->size)
        result = grow(io, fd + 64);
    if (!result && fd < io->size)
        io->by_fd[fd] = handler;
    pthread_mutex_unlock(&io->lock);
    return result;
}

/* Whether Python has to look at `fd`. */
static int serve(struct pk_io *io, int fd) {
    pthread_mutex_lock(&io->lock);
    struct pk_handler *handler = fd < io->size ? io->by_fd[fd] : NULL;
    int python = handler ? handler->ready(handler, fd) : 1;
    pthread_mutex_unlock(&io->lock);
    return python;
}

/* Milliseconds as epoll_wait wants them, rounded up: a timer must not ring early. */
static int left_ms(int64_t deadline) {
    if (deadline < 0)
        return -1;
    int64_t left = deadline - (int64_t)pk_now_ns();
    if (left <= 0)
        return 0;
    left = (left + NS_PER_MS - 1) / NS_PER_MS;
    return left < INT_MAX ? (int)left : INT_MAX;
}

int pk_io_wait(struct pk_io *io, int epoll, int64_t timeout_ns, struct pk_ready *ready, int max) {
    int64_t deadline = timeout_ns < 0 ? -1 : (int64_t)pk_now_ns() + timeout_ns;
    for (;;) {
        struct epoll_event events[EVENTS];
        int wait_ms = left_ms(deadline);
        int found = epoll_wait(epoll, events, max < EVENTS ? max : EVENTS, wait_ms);
        if (found < 0)
            return errno == EINTR ? 0 : -errno;
        int count = 0;
        for (int i = 0; i < found; i++)
            if (serve(io, events[i].data.fd))
                ready[count++] = (struct pk_ready){events[i].data.fd, events[i].events};
        if (count || wait_ms == 0)
            return count;
    }
}
