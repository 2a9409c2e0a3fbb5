/*
 * Frames between a tap interface and a guest, without Python: for backends with virtio's header, while the
 * driver keeps to the rules. Whatever else happens - a bound that is broken, an error of the interface, one
 * that takes no frame - stays in the ring, and Python (pykvm/virtio/net.py, netrx.py: the reference) serves
 * it.
 */
#ifndef PYKVM_NET_H
#define PYKVM_NET_H

#include "ioloop.h"
#include "virtqueue.h"

/* What a turn ended with. */
enum {
    PK_NET_DONE = 0,  /* nothing more to do until somebody tells of it */
    PK_NET_MORE = 1,  /* enough for one turn: serve again soon */
    PK_NET_PYTHON = 2 /* the next frame (or the ring) is for Python */
};

#define PK_NET_HEADER 12                       /* struct virtio_net_hdr_v1 */
#define PK_NET_LARGEST (PK_NET_HEADER + 65554) /* MAX_FRAME in netbackend.py */

struct pk_net;

/* A handler for pk_io_handle. */
struct pk_net_handler {
    struct pk_handler handler;
    struct pk_net *net;
};

struct pk_net {
    pthread_mutex_t *lock;    /* the transport's; guards all of this and the queues */
    int fd, epoll;            /* of the interface; of a set with nothing but that in it */
    uint32_t watched;         /* EPOLL* that are asked of `fd` there */
    uint8_t active;           /* C may serve */
    uint8_t link;             /* without it frames are dropped */
    uint8_t rx_held, tx_held; /* Python has frames of that direction, which go first */
    uint8_t mergeable, checksums;
    uint64_t features; /* negotiated */
    struct pk_virtqueue *rx, *tx;
    struct pk_poll poll; /* of `tx` */
    uint32_t vain_looks; /* for frames of the host after sending, that found none; since one came */
    struct pk_interrupt interrupt;
    uint64_t rx_frames, rx_bytes, rx_dropped, tx_frames, tx_bytes, tx_dropped;
    uint32_t expected; /* bytes of the last frame received, header included: the next one is like it */
    uint32_t waiting;  /* bytes of the frame in `frame`, for which the guest's buffers were too few */
    uint8_t spill[PK_NET_LARGEST + 1], frame[PK_NET_LARGEST];
    struct pk_net_handler on_backend, on_rx, on_tx; /* of `epoll`, and of the queues' kicks */
};

/* A struct pk_net with nothing in it but its handlers, or NULL. */
struct pk_net *pk_net_new(void);
void pk_net_free(struct pk_net *net);
/* Asks for EPOLL* events of the interface, or with 0 for none, not even its end: 0 or -errno. */
int pk_net_watch(struct pk_net *net, uint32_t events);
/* Serve the receive queue or the transmit queue under the lock, which the caller holds. */
int pk_net_receive(struct pk_net *net);
int pk_net_send(struct pk_net *net);

#endif
