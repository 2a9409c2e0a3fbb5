/*
 * A record of every exit, in a ring per vCPU: written by the vCPU's thread, drained to a file by another.
 *
 * A record is begun when KVM_RUN returns and finished at the next entry, when the time outside and the answer
 * to a read are known. pykvm/debug/tracefile.py documents the file, whose records these are, byte for byte.
 */
#ifndef PYKVM_TRACE_H
#define PYKVM_TRACE_H

#include <linux/kvm.h>
#include <stdint.h>

struct pk_vcpu;

#define PK_TRACE_WRITE 1  /* the guest wrote: OUT, store, WRMSR */
#define PK_TRACE_IN_C 2   /* C answered; Python never saw it */
#define PK_TRACE_LAST 4   /* the guest was not entered again: outside_ns is not known */
#define PK_TRACE_END 0x80 /* no exit: the end of the trace, written by Python */

struct pk_trace_record {
    uint64_t left_ns; /* CLOCK_MONOTONIC when KVM_RUN returned */
    uint64_t guest_ns, outside_ns;
    uint64_t rip;      /* as KVM reports it at the exit; 0 without KVM_CAP_SYNC_REGS */
    uint64_t address;  /* port, GPA, MSR, hypercall number, event type, suberror, vector, PC */
    uint64_t value;    /* the first 8 bytes that went either way; event data, ... */
    uint32_t lost;     /* records of this vCPU dropped just before this one, because the ring was full */
    uint32_t elements; /* elements of a string instruction, else 1 */
    uint16_t vcpu;
    uint8_t reason, size, flags;
    uint8_t reserved[3];
};

struct pk_trace {
    uint32_t capacity; /* records; a power of two */
    uint16_t vcpu;
    uint8_t settling; /* pk_settle() completes an access: its EINTR is no exit of the guest's */
    uint8_t pending;  /* the record at `head` is begun */
    uint32_t lost_now;
    uint64_t written, lost;
    uint64_t entered_ns;
    const uint8_t *answer; /* of the pending record: where the answer to a read will be */
    int eventfd;           /* written when the ring is half full */
    int woken;
    uint64_t head, tail; /* head: the vCPU's thread; tail: the drainer's */
    struct pk_trace_record *records;
};

struct pk_trace *pk_trace_new(uint32_t capacity, uint16_t vcpu, int eventfd);
void pk_trace_free(struct pk_trace *trace);
/* From the next entry on; NULL ends it. With `rip` KVM hands over the registers at each exit. */
void pk_trace_use(struct pk_vcpu *vcpu, struct pk_trace *trace, int rip);

/* Called by the run loop. */
void pk_trace_enter(struct pk_trace *trace);
void pk_trace_leave(struct pk_trace *trace, const struct kvm_run *run, int result);
static inline void pk_trace_answered(struct pk_trace *trace) {
    if (trace->pending)
        trace->records[trace->head & (trace->capacity - 1)].flags |= PK_TRACE_IN_C;
}

/* Writes the finished records to `fd`; their number, or -errno. One caller at a time. */
int64_t pk_trace_drain(struct pk_trace *trace, int fd);
/* Finishes the last record; only while the vCPU is not inside pk_run(). */
void pk_trace_finish(struct pk_trace *trace);

#endif
