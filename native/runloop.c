/* The vCPU hot loop. See runloop.h. */
#define _GNU_SOURCE
#include "runloop.h"
#include "clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int pk_ioctl(int fd, unsigned long request, void *argument) {
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int pk_ioctl_value(int fd, unsigned long request, unsigned long argument) {
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

/* -- life ------------------------------------------------------------------------------------------------ */

int pk_vcpu_init(struct pk_vcpu *vcpu, int fd, size_t run_size, size_t coalesced_offset) {
    memset(vcpu, 0, sizeof(*vcpu));
    vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (vcpu->run == MAP_FAILED) {
        vcpu->run = NULL;
        return -errno;
    }
    vcpu->fd = fd;
    vcpu->run_size = run_size;
    /* the vCPU may have had another life (core.spare) */
    vcpu->run->immediate_exit = 0;
    vcpu->run->request_interrupt_window = 0;
    vcpu->run->kvm_valid_regs = vcpu->run->kvm_dirty_regs = 0;
    if (coalesced_offset)
        vcpu->coalesced = (void *)((uint8_t *)vcpu->run + coalesced_offset);
    return 0;
}

void pk_vcpu_deinit(struct pk_vcpu *vcpu) {
    if (vcpu->run)
        munmap(vcpu->run, vcpu->run_size);
    free(vcpu->stats);
    memset(vcpu, 0, sizeof(*vcpu));
    vcpu->fd = -1;
}

int pk_vcpu_enable_stats(struct pk_vcpu *vcpu) {
    if (!vcpu->stats)
        vcpu->stats = calloc(PK_STAT_SLOTS, sizeof(*vcpu->stats));
    if (!vcpu->stats)
        return -ENOMEM;
    vcpu->stats_enabled = 1;
    return 0;
}

/* -- rings ----------------------------------------------------------------------------------------------- */

struct pk_ring *pk_ring_new(uint32_t size, int eventfd) {
    struct pk_ring *ring = calloc(1, sizeof(*ring) + size);
    if (!ring)
        return NULL;
    pthread_mutex_init(&ring->lock, NULL);
    ring->size = size;
    ring->eventfd = eventfd;
    return ring;
}

void pk_ring_free(struct pk_ring *ring) {
    if (!ring)
        return;
    pthread_mutex_destroy(&ring->lock);
    free(ring);
}

/* Appends all of `bytes` or nothing: a full ring sends the exit to Python, which drains it. */
static int ring_append(struct pk_ring *ring, const uint8_t *bytes, uint32_t count) {
    pthread_mutex_lock(&ring->lock);
    int fits = count <= ring->size - ring->used;
    int wake = fits && ring->used == 0;
    if (fits) {
        for (uint32_t i = 0; i < count; i++)
            ring->data[(ring->head + ring->used + i) % ring->size] = bytes[i];
        ring->used += count;
        ring->appended += count;
    }
    pthread_mutex_unlock(&ring->lock);
    if (wake && ring->eventfd >= 0) {
        /* the counter cannot overflow: it is written once per emptied ring, and a full one only means "wake"
         * anyway */
        ssize_t ignored = write(ring->eventfd, &(uint64_t){1}, sizeof(uint64_t));
        (void)ignored;
    }
    return fits;
}

uint32_t pk_ring_drain(struct pk_ring *ring, void *out, uint32_t size) {
    pthread_mutex_lock(&ring->lock);
    uint32_t count = ring->used < size ? ring->used : size;
    for (uint32_t i = 0; i < count; i++)
        ((uint8_t *)out)[i] = ring->data[(ring->head + i) % ring->size];
    ring->head = (ring->head + count) % ring->size;
    ring->used -= count;
    pthread_mutex_unlock(&ring->lock);
    return count;
}

/* -- exits that C answers -------------------------------------------------------------------------------- */

/* One port or MMIO exit, in one shape. */
struct access {
    uint64_t address;
    uint8_t *data;
    uint32_t size, count; /* count: elements of a string instruction */
    uint8_t mmio, write;
};

static struct access decode(struct kvm_run *run) {
    if (run->exit_reason == KVM_EXIT_IO)
        return (struct access){
            .address = run->io.port,
            .data = (uint8_t *)run + run->io.data_offset,
            .size = run->io.size,
            .count = run->io.count,
            .write = run->io.direction == KVM_EXIT_IO_OUT,
        };
    return (struct access){
        .address = run->mmio.phys_addr,
        .data = run->mmio.data,
        .size = run->mmio.len,
        .count = 1,
        .mmio = 1,
        .write = run->mmio.is_write,
    };
}

static void exchange_word(struct pk_action *action, const struct access *access) {
    uint32_t bits;
    if (action->kind == PK_LOAD) {
        bits = __atomic_load_n(action->word, __ATOMIC_SEQ_CST);
        memcpy(access->data, &bits, sizeof(bits));
    } else {
        memcpy(&bits, access->data, sizeof(bits));
        __atomic_and_fetch(action->word, ~bits | (uint32_t)action->value, __ATOMIC_SEQ_CST);
    }
}

static int perform(struct pk_action *action, const struct access *access) {
    switch (action->kind) {
    case PK_APPEND: /* a wide write is a byte to a byte-wide register at that address: the others are not the
                       console's */
        if (access->size != 1 || !ring_append(action->ring, access->data, access->count))
            return 0;
        break;
    case PK_CONSTANT:
        if (access->size > sizeof(action->value))
            return 0;
        for (uint32_t i = 0; i < access->count; i++)
            memcpy(access->data + (size_t)i * access->size, &action->value, access->size);
        break;
    case PK_COUNT:
        break;
    case PK_LOAD:
    case PK_CLEAR:
        if (access->size != sizeof(*action->word) || access->count != 1)
            return 0;
        exchange_word(action, access);
        break;
    default:
        return 0;
    }
    __atomic_add_fetch(&action->hits, access->count, __ATOMIC_RELAXED);
    return 1;
}

/* Whether an entry of the table answered the access. */
static int answer(struct pk_table *table, const struct access *access) {
    if (!table)
        return 0;
    for (uint32_t i = 0; i < table->count; i++) {
        struct pk_action *action = table->actions[i];
        uint64_t offset = access->address - action->base;
        if (offset < action->len && access->size <= action->len - offset && action->mmio == access->mmio &&
            action->write == access->write && __atomic_load_n(&action->enabled, __ATOMIC_ACQUIRE))
            return perform(action, access);
    }
    return 0;
}

/* -- statistics ------------------------------------------------------------------------------------------ */

static void count_access(struct pk_vcpu *vcpu, const struct access *access) {
    uint32_t slot = (uint32_t)((access->address * 0x9e3779b97f4a7c15u) >> 40) ^ access->mmio;
    for (uint32_t probe = 0; probe < 16; probe++) {
        struct pk_stat *stat = &vcpu->stats[(slot + probe) % PK_STAT_SLOTS];
        if (!stat->used)
            *stat = (struct pk_stat){.address = access->address, .mmio = access->mmio, .used = 1};
        if (stat->address != access->address || stat->mmio != access->mmio)
            continue;
        *(access->write ? &stat->writes : &stat->reads) += access->count;
        return;
    }
    vcpu->stats_lost++;
}

/* -- the loop -------------------------------------------------------------------------------------------- */

static void give_answer(struct pk_vcpu *vcpu) {
    if (vcpu->read_into) {
        memcpy(vcpu->read_into, &vcpu->value, vcpu->read_size);
        vcpu->read_into = NULL;
    }
}

static int64_t key_of(struct pk_vcpu *vcpu, const struct access *access) {
    int64_t key = vcpu->run->exit_reason | (int64_t)access->size << PK_KEY_SIZE_SHIFT;
    if (access->mmio)
        vcpu->address = access->address;
    else
        key |= (int64_t)access->address << PK_KEY_PORT_SHIFT;
    if (access->write)
        key |= PK_KEY_WRITE;
    if (access->count != 1)
        return key | PK_KEY_STRING; /* Python walks pk_io_data() itself */
    uint32_t size = access->size <= sizeof(vcpu->value) ? access->size : sizeof(vcpu->value);
    vcpu->value = 0;
    if (access->write) {
        memcpy(&vcpu->value, access->data, size);
    } else {
        vcpu->read_into = access->data;
        vcpu->read_size = size;
    }
    return key;
}

/* KVM_RUN once. EAGAIN: an application processor still waits for its SIPI. */
static int enter(struct pk_vcpu *vcpu) {
    uint64_t entered_at = 0;
    int result;
    if (vcpu->stats_enabled) {
        entered_at = pk_now_ns();
        if (vcpu->left_at)
            vcpu->outside_ns += entered_at - vcpu->left_at;
    }
    if (vcpu->trace)
        pk_trace_enter(vcpu->trace);
    do
        result = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    while (result == -EAGAIN);
    vcpu->pending = result != -EINTR; /* that comes after the completion, and before anything new */
    if (vcpu->trace)
        pk_trace_leave(vcpu->trace, vcpu->run, result);
    if (vcpu->stats_enabled) {
        vcpu->left_at = pk_now_ns();
        vcpu->guest_ns += vcpu->left_at - entered_at;
    }
    if (result == -EINTR) {
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        vcpu->kicks_heard = __atomic_load_n(&vcpu->kicks, __ATOMIC_SEQ_CST);
    }
    return result;
}

static int64_t run_until_exit(struct pk_vcpu *vcpu) {
    struct kvm_run *run = vcpu->run;
    for (;;) {
        int result = enter(vcpu);
        if (result == -EINTR)
            vcpu->exits[KVM_EXIT_INTR]++;
        if (result < 0)
            return result;
        uint32_t reason = run->exit_reason;
        vcpu->exits[reason < PK_EXIT_REASONS ? reason : 0]++;
        if (reason != KVM_EXIT_IO && reason != KVM_EXIT_MMIO)
            return reason & 0xff;
        struct access access = decode(run);
        if (vcpu->stats_enabled)
            count_access(vcpu, &access);
        if (!answer(__atomic_load_n(&vcpu->table, __ATOMIC_ACQUIRE), &access))
            return key_of(vcpu, &access);
        if (vcpu->trace)
            pk_trace_answered(vcpu->trace);
    }
}

static int coalesced_pending(const struct pk_vcpu *vcpu) {
    struct kvm_coalesced_mmio_ring *ring = vcpu->coalesced;
    return ring &&
           __atomic_load_n(&ring->first, __ATOMIC_RELAXED) != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
}

int64_t pk_run(struct pk_vcpu *vcpu) {
    int64_t key;
    if (vcpu->has_stashed) {
        vcpu->has_stashed = 0;
        return vcpu->stashed;
    }
    give_answer(vcpu);
    __atomic_store_n(&vcpu->tid, pk_thread_id(), __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the thread is published before KVM reads immediate_exit */
    key = run_until_exit(vcpu);
    __atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST);
    if (coalesced_pending(vcpu)) { /* older than this exit: Python takes them first */
        vcpu->stashed = key;
        vcpu->has_stashed = 1;
        return PK_KEY_COALESCED;
    }
    return key;
}

int64_t pk_settle(struct pk_vcpu *vcpu) {
    uint64_t heard = vcpu->kicks_heard;
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (vcpu->trace)
        vcpu->trace->settling = 1;
    int64_t key = pk_run(vcpu);
    if (vcpu->trace)
        vcpu->trace->settling = 0;
    if (key == -EINTR)
        vcpu->exits[KVM_EXIT_INTR]--; /* our own, no exit of the guest's */
    else
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    vcpu->kicks_heard = heard; /* Python does not look into the mailbox for this EINTR */
    if (__atomic_load_n(&vcpu->kicks, __ATOMIC_SEQ_CST) != heard)
        /* it may have eaten a kick of somebody else, also one from before: put it back */
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    return key;
}

void pk_discard(struct pk_vcpu *vcpu) {
    enum { MOST_PARTS = 64 }; /* an access across pages has two of them, a wide one a few */
    for (int i = 0; i < MOST_PARTS && (vcpu->pending || vcpu->has_stashed); i++)
        if (pk_settle(vcpu) < 0)
            break;
}

void *pk_io_data(struct pk_vcpu *vcpu) { return (uint8_t *)vcpu->run + vcpu->run->io.data_offset; }

struct kvm_sync_regs *pk_sync_regs(struct pk_vcpu *vcpu) { return &vcpu->run->s.regs; }

int pk_coalesced_pop(struct pk_vcpu *vcpu, struct kvm_coalesced_mmio *out) {
    if (!coalesced_pending(vcpu))
        return 0;
    struct kvm_coalesced_mmio_ring *ring = vcpu->coalesced;
    uint32_t capacity = (4096 - sizeof(*ring)) / sizeof(ring->coalesced_mmio[0]); /* KVM_COALESCED_MMIO_MAX */
    uint32_t first = ring->first;
    *out = ring->coalesced_mmio[first % capacity];
    __atomic_store_n(&ring->first, (first + 1) % capacity, __ATOMIC_RELEASE);
    return 1;
}
