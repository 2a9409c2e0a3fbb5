/*
 * The vCPU hot loop: mechanism only. It knows KVM, it knows no device.
 *
 * pk_run() enters the guest again and again until an exit needs Python. What does not need Python is in a
 * table of actions, range -> what to do; an empty table gives the same guest-visible behaviour, only slower.
 */
#ifndef PYKVM_RUNLOOP_H
#define PYKVM_RUNLOOP_H

#include "trace.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

/* What a table entry does with an access that it covers. */
enum {
    PK_TO_PYTHON = 0, /* the default: return the exit */
    PK_APPEND = 1,    /* write: append the bytes to a ring (a console) */
    PK_CONSTANT = 2,  /* read: answer with a constant (a status register) */
    PK_COUNT = 3,     /* write: count it and go on (a doorbell nobody listens to, a POST code port) */
    PK_LOAD = 4,      /* four-byte read: answer with *word (an interrupt status register) */
    PK_CLEAR = 5,     /* four-byte write: clear these bits of *word, not those in `value` (an acknowledge) */
};

/* Bytes that guests wrote and Python has not taken yet. Shared by all vCPUs of a machine. */
struct pk_ring {
    pthread_mutex_t lock;
    uint32_t size, head, used;
    int eventfd; /* written when the ring stops being empty; -1: nobody waits */
    uint64_t appended;
    uint8_t data[];
};

struct pk_action {
    uint64_t base, len;
    uint8_t mmio;  /* address space: 0 ports, 1 MMIO */
    uint8_t write; /* the direction that it answers */
    uint8_t kind;
    uint8_t enabled; /* Python switches it while vCPUs run: one byte, so always whole */
    uint64_t value;
    uint64_t hits;
    struct pk_ring *ring;
    uint32_t *word; /* of PK_LOAD and PK_CLEAR; changed by atomic operations alone */
};

struct pk_table {
    struct pk_action **actions;
    uint32_t count;
};

/* Accesses to one address (--stats). */
struct pk_stat {
    uint64_t address;
    uint64_t reads, writes;
    uint8_t mmio, used;
};

#define PK_STAT_SLOTS 1024
#define PK_EXIT_REASONS 64

struct pk_vcpu {
    int fd;
    struct kvm_run *run;
    size_t run_size;
    struct kvm_coalesced_mmio_ring *coalesced;
    struct pk_table *table; /* swapped whole while vCPUs run */

    uint64_t value;     /* the value written; or Python's answer to a read, stored at the next entry */
    uint64_t address;   /* GPA of an MMIO exit */
    uint8_t *read_into; /* where the answer goes, NULL when none is owed */
    uint32_t read_size;
    int64_t stashed; /* pk_run()'s result, kept back while Python drains the coalesced ring */
    uint8_t has_stashed;
    uint8_t pending; /* the last KVM_RUN may have left an access that the next one completes */

    int tid; /* the thread inside pk_run(), 0 when there is none */
    uint64_t kicks;
    uint64_t kicks_heard; /* of `kicks`: those before the last EINTR that pk_run() returned */
    uint64_t exits[PK_EXIT_REASONS];

    uint8_t stats_enabled;
    uint64_t guest_ns, outside_ns, left_at;
    struct pk_stat *stats; /* PK_STAT_SLOTS, open addressing */
    uint64_t stats_lost;

    struct pk_trace *trace; /* NULL: exits are not recorded */
};

/*
 * The key of an exit, as pk_run() returns it: bits 0-7 the exit reason; for IO and MMIO bit 8 the direction
 * and bits 9-15 the access size; for IO bits 16-31 the port; bit 32 a string (rep ins/outs) of run->io.count
 * elements. Bit 33 alone: the coalesced ring has entries to drain first. A key is a small non-negative int:
 * Python looks it up in a dict.
 */
#define PK_KEY_WRITE (1LL << 8)
#define PK_KEY_SIZE_SHIFT 9
#define PK_KEY_PORT_SHIFT 16
#define PK_KEY_STRING (1LL << 32)
#define PK_KEY_COALESCED (1LL << 33)

/* ioctl(2) that returns -errno instead of setting errno. */
int pk_ioctl(int fd, unsigned long request, void *argument);
int pk_ioctl_value(int fd, unsigned long request, unsigned long argument);

int pk_vcpu_init(struct pk_vcpu *vcpu, int fd, size_t run_size, size_t coalesced_offset);
void pk_vcpu_deinit(struct pk_vcpu *vcpu);
int pk_vcpu_enable_stats(struct pk_vcpu *vcpu);

/* Runs until an exit needs Python: its key, -EINTR after a kick or a signal, -errno otherwise. */
int64_t pk_run(struct pk_vcpu *vcpu);
/* Completes a pending access without running the guest: call before state is read or saved. -EINTR: done; a
 * key: an exit that belongs to the same instruction (the next part of a wide MMIO access) wants handling,
 * then settle again. */
int64_t pk_settle(struct pk_vcpu *vcpu);
/* Lets KVM forget an access that nobody answers (a run that ended with it). */
void pk_discard(struct pk_vcpu *vcpu);
/* The bytes of a port exit: run->io.size * run->io.count. */
void *pk_io_data(struct pk_vcpu *vcpu);
/* The register area of kvm_run (KVM_CAP_SYNC_REGS). */
struct kvm_sync_regs *pk_sync_regs(struct pk_vcpu *vcpu);
/* Takes the oldest entry off the coalesced ring; 0 when it is empty. One caller at a time per machine. */
int pk_coalesced_pop(struct pk_vcpu *vcpu, struct kvm_coalesced_mmio *out);

struct pk_ring *pk_ring_new(uint32_t size, int eventfd);
void pk_ring_free(struct pk_ring *ring);
uint32_t pk_ring_drain(struct pk_ring *ring, void *out, uint32_t size);

/* kick.c: interrupting a vCPU from any thread. */
int pk_kick_init(int signal_offset);
int pk_kick(struct pk_vcpu *vcpu);
void pk_thread_init(void);
int pk_thread_id(void);

#endif
