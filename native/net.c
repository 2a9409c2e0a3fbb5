#include "net.h"
#include "lock.h"
#include <errno.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_net.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

/* One turn, so that other devices and timers get theirs; and how many go before the driver hears of them. */
enum { TURN_FRAMES = 128, TURN_BYTES = 2 << 20, INTERRUPT_EVERY = 16, SLICE_NS = 4000 };
enum { VAIN_LOOKS = 4, LOOK_EVERY = 16 };
enum { MIN_FRAME = 14, MAX_FRAME = PK_NET_LARGEST - PK_NET_HEADER, MAX_HELD = 256 };

_Static_assert(sizeof(struct virtio_net_hdr_v1) == PK_NET_HEADER, "PK_NET_HEADER");

int pk_net_watch(struct pk_net *net, uint32_t events) {
    if (events == net->watched)
        return 0;
    struct epoll_event event = {.events = events, .data.fd = net->fd};
    int operation = !net->watched ? EPOLL_CTL_ADD : events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL;
    if (epoll_ctl(net->epoll, operation, net->fd, &event) < 0)
        return -errno;
    net->watched = events;
    return 0;
}

static void interrupt(struct pk_net *net, struct pk_virtqueue *queue) {
    if (pk_queue_should_interrupt(queue))
        pk_interrupt_raise(&net->interrupt, VIRTIO_MMIO_INT_VRING);
}

/* -- from the guest (5.1.6.2)
 * -------------------------------------------------------------------------------- */

static int has(const struct pk_net *net, int feature) { return net->features >> feature & 1; }

static int allows_gso(const struct pk_net *net, uint8_t type) {
    if (type & VIRTIO_NET_HDR_GSO_ECN && !has(net, VIRTIO_NET_F_HOST_ECN))
        return 0;
    switch (type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return has(net, VIRTIO_NET_F_HOST_TSO4);
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return has(net, VIRTIO_NET_F_HOST_TSO6);
    case VIRTIO_NET_HDR_GSO_UDP:
        return has(net, VIRTIO_NET_F_HOST_UFO);
#ifdef VIRTIO_NET_F_HOST_USO
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        return has(net, VIRTIO_NET_F_HOST_USO);
#endif
    default:
        return 0;
    }
}

/* Whether a frame of `size` bytes can be one, and has a header that the features allow; is_sound in net.py.
 */
static int is_sound(const struct pk_net *net, const struct virtio_net_hdr_v1 *header, uint64_t size) {
    if (size < MIN_FRAME || size > MAX_FRAME)
        return 0;
    int unfinished = header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
    uint32_t checksum_end = (uint32_t)header->csum_start + header->csum_offset + 2;
    if (unfinished && (!has(net, VIRTIO_NET_F_CSUM) || checksum_end > size))
        return 0;
    if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE)
        return 1;
    return allows_gso(net, header->gso_type) && unfinished && header->gso_size;
}

/* Sends or drops a frame; -1 when it is for Python. */
static int send_one(struct pk_net *net, struct pk_chain *chain) {
    struct virtio_net_hdr_v1 header; /* a copy: the driver cannot change what was checked */
    struct iovec *rest;
    if (chain->writable_bytes)
        return -1;
    int left = pk_chain_take(chain, &header, sizeof(header), &rest);
    if (left < 0)
        return -1;
    uint64_t size = chain->readable_bytes - sizeof(header);
    if (!net->link || !is_sound(net, &header, size)) {
        net->tx_dropped++;
        return 0;
    }
    struct iovec iov[PK_QUEUE_MAX];
    if (left >= PK_QUEUE_MAX)
        return -1;
    iov[0] = (struct iovec){&header, sizeof(header)};
    memcpy(iov + 1, rest, (size_t)left * sizeof(*rest));
    ssize_t sent;
    do
        sent = writev(net->fd, iov, left + 1);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && (errno == EAGAIN || errno == EBADFD))
        return -1;
    /* EIO: the interface is switched off; EINVAL: a frame or header that the kernel does not like */
    net->tx_frames++;
    net->tx_bytes += size;
    return 0;
}

/* What is for Python stays: the interface's set is still readable. It is as well for what is not looked for,
 * because looking was in vain the last times: each costs a system call. */
static void look_for_answers(struct pk_net *net) {
    if (!(net->watched & EPOLLIN) || (net->vain_looks >= VAIN_LOOKS && ++net->vain_looks % LOOK_EVERY))
        return;
    if (net->vain_looks < VAIN_LOOKS)
        net->vain_looks++;
    pk_net_receive(net);
}

/* pk_queue_poll, without leaving the other direction to itself for so long. */
static int watch_sending(struct pk_net *net) {
    struct pk_poll *poll = &net->poll;
    uint32_t whole = poll->now_ns;
    uint64_t since = 0;
    int found = PK_EMPTY;
    for (uint32_t done = 0; found == PK_EMPTY && (!done || done < whole); done += SLICE_NS) {
        poll->now_ns = whole < SLICE_NS ? whole : SLICE_NS;
        found = pk_queue_poll(net->tx, poll, NULL, 0);
        since = since ? since : poll->idle_since;
        if (found == PK_EMPTY && whole)
            look_for_answers(net);
    }
    poll->now_ns = whole;
    poll->idle_since = since;
    return found;
}

int pk_net_send(struct pk_net *net) {
    struct pk_chain chain;
    uint64_t bytes = 0;
    int answered = 0;
    for (int served = 0; served < TURN_FRAMES && bytes < TURN_BYTES;) {
        if (net->tx_held)
            return PK_NET_PYTHON;
        int found = pk_queue_pop(net->tx, &chain);
        if (found == PK_EMPTY) {
            interrupt(net, net->tx);  /* before asking for more: the driver has something to do meanwhile */
            if (served != answered) { /* the host's own answers are there as soon as a frame was sent */
                answered = served;
                look_for_answers(net);
                continue;
            }
            if (watch_sending(net) == PK_GOT)
                continue;
            found = pk_queue_want_notification(net->tx);
            if (found == PK_EMPTY)
                return PK_NET_DONE;
            if (found == PK_GOT)
                continue;
        }
        if (found == PK_FAULT)
            return PK_NET_PYTHON;
        if (send_one(net, &chain) < 0) {
            pk_queue_unpop(net->tx);
            return PK_NET_PYTHON;
        }
        bytes += chain.readable_bytes;
        pk_queue_push(net->tx, chain.head, 0);
        if (++served % INTERRUPT_EVERY == 0)
            interrupt(net, net->tx);
    }
    interrupt(net, net->tx);
    return PK_NET_MORE;
}

/* -- to the guest (5.1.6.3)
 * ---------------------------------------------------------------------------------- */

/* Chains taken from the ring, and their buffers one after the other. */
struct held {
    int chains, buffers;
    uint64_t room;
    struct {
        uint16_t head, buffers;
        uint64_t bytes;
    } chain[MAX_HELD];
    struct iovec iov[PK_QUEUE_MAX + 1]; /* the last one is for the spill */
    struct pk_chain next;
};

static void give_back(struct pk_net *net, struct held *held) {
    while (held->chains) {
        pk_queue_unpop(net->rx);
        held->chains--;
    }
    held->buffers = 0;
    held->room = 0;
}

/* Takes chains until they hold `wanted` bytes: PK_GOT, PK_EMPTY when there are too few, or PK_FAULT. Without
 * mergeable buffers a frame has one chain. */
static int gather(struct pk_net *net, struct held *held, uint64_t wanted) {
    while (net->mergeable ? held->room < wanted : !held->chains) {
        if (held->chains == MAX_HELD)
            return PK_EMPTY;
        int found = pk_queue_pop(net->rx, &held->next);
        if (found != PK_GOT)
            return found;
        const struct pk_chain *chain = &held->next;
        if (chain->readable_bytes || chain->writable_bytes < PK_NET_HEADER ||
            held->buffers + chain->count > PK_QUEUE_MAX - 1) {
            pk_queue_unpop(net->rx);
            return PK_FAULT; /* Python has the words, and another way for a great many small buffers */
        }
        held->chain[held->chains].head = chain->head;
        held->chain[held->chains].buffers = chain->count;
        held->chain[held->chains++].bytes = chain->writable_bytes;
        memcpy(held->iov + held->buffers, chain->iov, chain->count * sizeof(struct iovec));
        held->buffers += chain->count;
        held->room += chain->writable_bytes;
    }
    return PK_GOT;
}

/* Copies to (or from) the bytes [offset, offset + length) of the buffers. */
static void copy(struct held *held, uint64_t offset, uint8_t *data, uint64_t length, int to_guest) {
    for (int i = 0; length && i < held->buffers; i++) {
        struct iovec *buffer = &held->iov[i];
        if (offset >= buffer->iov_len) {
            offset -= buffer->iov_len;
            continue;
        }
        uint64_t part = buffer->iov_len - offset < length ? buffer->iov_len - offset : length;
        uint8_t *at = (uint8_t *)buffer->iov_base + offset;
        memcpy(to_guest ? at : data, to_guest ? data : at, part);
        data += part;
        length -= part;
        offset = 0;
    }
}

static void mark_written(struct pk_net *net, struct held *held, uint64_t length) {
    const struct pk_slots *slots = __atomic_load_n(&net->rx->memory->slots, __ATOMIC_ACQUIRE);
    for (int i = 0; length && i < held->buffers; i++) {
        uint64_t part = held->iov[i].iov_len < length ? held->iov[i].iov_len : length;
        pk_memory_written(slots, held->iov[i].iov_base, part);
        length -= part;
    }
}

/* Hands `total` bytes, which are in the first buffers, to the driver. */
static void deliver(struct pk_net *net, struct held *held, uint64_t total) {
    int chains = 0, buffers = 0;
    for (uint64_t bytes = 0; bytes < total; bytes += held->chain[chains++].bytes)
        buffers += held->chain[chains].buffers;
    uint8_t count[2] = {(uint8_t)chains, (uint8_t)(chains >> 8)}, none = 0;
    copy(held, offsetof(struct virtio_net_hdr_v1, num_buffers), count, sizeof(count), 1);
    if (!net->checksums) /* no flag has a meaning then, and the kernel sets one all the same (5.1.6.4.1) */
        copy(held, offsetof(struct virtio_net_hdr_v1, flags), &none, 1, 1);
    mark_written(net, held, total);
    net->rx_frames++;
    net->rx_bytes += total - PK_NET_HEADER;
    for (int i = 0; i < chains; i++) {
        uint64_t part = held->chain[i].bytes < total ? held->chain[i].bytes : total;
        pk_queue_push(net->rx, held->chain[i].head, (uint32_t)part);
        held->room -= held->chain[i].bytes;
        total -= part;
    }
    held->chains -= chains;
    held->buffers -= buffers;
    memmove(held->chain, held->chain + chains, (size_t)held->chains * sizeof(held->chain[0]));
    memmove(held->iov, held->iov + buffers, (size_t)held->buffers * sizeof(held->iov[0]));
}

/* The frame that waits: PK_GOT when it is done with, PK_EMPTY, or PK_FAULT. */
static int deliver_waiting(struct pk_net *net, struct held *held) {
    int found = gather(net, held, net->waiting);
    if (found == PK_FAULT)
        return found;
    if (held->room >= net->waiting) {
        copy(held, 0, net->frame, net->waiting, 1);
        deliver(net, held, net->waiting);
    } else if (held->chains < net->rx->size) {
        return PK_EMPTY;
    } else {
        net->rx_dropped++; /* the whole ring is too small for it */
    }
    net->waiting = 0;
    return PK_GOT;
}

/* The frame was longer than the buffers: what is behind them, in the spill, follows as soon as there are
 * more. */
static int deliver_spilled(struct pk_net *net, struct held *held, uint64_t total) {
    uint64_t room = held->room;
    if (!net->mergeable || total > PK_NET_LARGEST) {
        net->rx_dropped++;
        return PK_GOT;
    }
    if (gather(net, held, total) == PK_GOT) {
        copy(held, room, net->spill, total - room, 1);
        deliver(net, held, total);
        return PK_GOT;
    }
    copy(held, 0, net->frame, room, 0);
    memcpy(net->frame + room, net->spill, total - room);
    net->waiting = (uint32_t)total;
    return PK_GOT;
}

/* One frame: PK_GOT, PK_EMPTY when there is none, or PK_FAULT for Python. */
static int receive_one(struct pk_net *net, struct held *held) {
    int buffers = net->link ? held->buffers : 0;
    held->iov[buffers] = (struct iovec){net->spill, sizeof(net->spill)};
    ssize_t got;
    do
        got = readv(net->fd, held->iov, buffers + 1);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        return got < 0 && errno == EAGAIN ? PK_EMPTY : PK_FAULT;
    if (!net->link || got < PK_NET_HEADER) {
        net->rx_dropped++;
        return PK_GOT;
    }
    net->expected = (uint32_t)got;
    if ((uint64_t)got > held->room)
        return deliver_spilled(net, held, (uint64_t)got);
    deliver(net, held, (uint64_t)got);
    return PK_GOT;
}

/* Makes room for the next frame: PK_GOT, PK_EMPTY when the driver has offered too little, PK_FAULT. */
static int make_room(struct pk_net *net, struct held *held) {
    if (!net->link)
        return PK_GOT;
    while (net->waiting) {
        int found = deliver_waiting(net, held);
        if (found != PK_GOT)
            return found;
    }
    int found = gather(net, held, net->expected > PK_NET_HEADER ? net->expected : PK_NET_HEADER);
    return found == PK_EMPTY && held->chains ? PK_GOT : found;
}

static int receive_frames(struct pk_net *net, struct held *held) {
    uint64_t end = net->rx_bytes + TURN_BYTES;
    for (int served = 0; served < TURN_FRAMES && net->rx_bytes < end; served++) {
        int found = make_room(net, held);
        if (found == PK_EMPTY) {
            interrupt(net, net->rx);
            found = pk_queue_want_notification(net->rx);
            if (found == PK_EMPTY) {
                pk_net_watch(net, net->watched & ~EPOLLIN); /* until the driver notifies of buffers */
                return PK_NET_DONE;
            }
            if (found == PK_GOT)
                continue;
        }
        if (found == PK_GOT)
            found = receive_one(net, held);
        if (found != PK_GOT)
            return found == PK_EMPTY ? PK_NET_DONE : PK_NET_PYTHON;
        if (served % INTERRUPT_EVERY == INTERRUPT_EVERY - 1)
            interrupt(net, net->rx);
    }
    return PK_NET_MORE;
}

int pk_net_receive(struct pk_net *net) {
    struct held held;
    held.chains = held.buffers = 0;
    held.room = 0;
    if (net->rx_held || pk_net_watch(net, net->watched | EPOLLIN) < 0)
        return PK_NET_PYTHON;
    uint64_t before = net->rx_frames;
    int verdict = receive_frames(net, &held);
    give_back(net, &held);
    if (net->rx_frames != before)
        net->vain_looks = 0;
    interrupt(net, net->rx);
    return verdict;
}

/* -- handlers
 * ------------------------------------------------------------------------------------------------ */

/* The interface has frames: as long as it has, and is watched, its set is readable. */
static int backend_ready(struct pk_handler *handler, int fd) {
    struct pk_net *net = ((struct pk_net_handler *)handler)->net;
    (void)fd;
    pk_mutex_lock(net->lock);
    int python = !net->active || net->watched & EPOLLOUT || pk_net_receive(net) == PK_NET_PYTHON;
    pk_mutex_unlock(net->lock);
    return python;
}

static int kick_ready(struct pk_net *net, int fd, int (*serve)(struct pk_net *net)) {
    uint64_t count;
    if (read(fd, &count, sizeof(count)) != sizeof(count))
        return 0;
    pk_mutex_lock(net->lock);
    int verdict = net->active ? serve(net) : PK_NET_PYTHON;
    pk_mutex_unlock(net->lock);
    count = 1;
    if (verdict != PK_NET_DONE && write(fd, &count, sizeof(count)) < 0)
        return 1; /* cannot be: but never lose a turn */
    return verdict == PK_NET_PYTHON;
}

/* More frames show at the interface itself. */
static int receive_kicked(struct pk_net *net) {
    int verdict = pk_net_receive(net);
    return verdict == PK_NET_MORE ? PK_NET_DONE : verdict;
}

static int rx_ready(struct pk_handler *handler, int fd) {
    return kick_ready(((struct pk_net_handler *)handler)->net, fd, receive_kicked);
}

static int send_kicked(struct pk_net *net) {
    pk_queue_woken(&net->poll);
    return pk_net_send(net);
}

static int tx_ready(struct pk_handler *handler, int fd) {
    return kick_ready(((struct pk_net_handler *)handler)->net, fd, send_kicked);
}

struct pk_net *pk_net_new(void) {
    struct pk_net *net = calloc(1, sizeof(*net));
    if (!net)
        return NULL;
    net->on_backend = (struct pk_net_handler){{backend_ready}, net};
    net->on_rx = (struct pk_net_handler){{rx_ready}, net};
    net->on_tx = (struct pk_net_handler){{tx_ready}, net};
    return net;
}

void pk_net_free(struct pk_net *net) { free(net); }
