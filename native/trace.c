/* Exit tracing. See trace.h. */
#define _GNU_SOURCE
#include "trace.h"
#include "clock.h"

#include "runloop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct pk_trace *pk_trace_new(uint32_t capacity, uint16_t vcpu, int eventfd) {
    struct pk_trace *trace = calloc(1, sizeof(*trace));
    if (!trace)
        return NULL;
    trace->records = calloc(capacity, sizeof(*trace->records));
    if (!trace->records) {
        free(trace);
        return NULL;
    }
    trace->capacity = capacity;
    trace->vcpu = vcpu;
    trace->eventfd = eventfd;
    return trace;
}

void pk_trace_free(struct pk_trace *trace) {
    if (!trace)
        return;
    free(trace->records);
    free(trace);
}

void pk_trace_use(struct pk_vcpu *vcpu, struct pk_trace *trace, int rip) {
    if (trace)
        pk_trace_finish(trace); /* its answer would have come through the kvm_run of an earlier KVM vCPU */
    vcpu->trace = trace;
    vcpu->run->kvm_valid_regs = trace && rip ? KVM_SYNC_X86_REGS : 0;
}

static struct pk_trace_record *at_head(struct pk_trace *trace) {
    return &trace->records[trace->head & (trace->capacity - 1)];
}

/* -- the vCPU's side ------------------------------------------------------------------------------------- */

static void take_value(struct pk_trace_record *record, const void *data) {
    uint64_t bytes = (uint64_t)record->size * record->elements;
    memcpy(&record->value, data, bytes < sizeof(record->value) ? bytes : sizeof(record->value));
}

/* A port or MMIO access; the answer to a read comes later. */
static void take_access(struct pk_trace *trace, struct pk_trace_record *record, uint64_t address,
                        const void *data, int write) {
    record->address = address;
    if (write) {
        record->flags |= PK_TRACE_WRITE;
        take_value(record, data);
    } else {
        trace->answer = data;
    }
}

static void take_details(struct pk_trace *trace, struct pk_trace_record *record, const struct kvm_run *run) {
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        record->size = run->io.size;
        record->elements = run->io.count;
        take_access(trace, record, run->io.port, (const uint8_t *)run + run->io.data_offset,
                    run->io.direction == KVM_EXIT_IO_OUT);
        break;
    case KVM_EXIT_MMIO:
        record->size = run->mmio.len <= sizeof(run->mmio.data) ? run->mmio.len : sizeof(run->mmio.data);
        take_access(trace, record, run->mmio.phys_addr, run->mmio.data, run->mmio.is_write);
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        record->size = sizeof(run->msr.data);
        take_access(trace, record, run->msr.index, &run->msr.data, run->exit_reason == KVM_EXIT_X86_WRMSR);
        break;
    case KVM_EXIT_HYPERCALL:
        record->address = run->hypercall.nr;
        record->value = run->hypercall.args[0];
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        record->address = run->system_event.type;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        record->address = run->internal.suberror;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        record->address = run->fail_entry.hardware_entry_failure_reason;
        break;
    case KVM_EXIT_IOAPIC_EOI:
        record->address = run->eoi.vector;
        break;
    case KVM_EXIT_DEBUG:
        record->address = run->debug.arch.pc;
        record->value = run->debug.arch.dr6;
        break;
    default:
        break;
    }
}

static void publish(struct pk_trace *trace) {
    trace->pending = 0;
    trace->answer = NULL;
    __atomic_store_n(&trace->head, trace->head + 1, __ATOMIC_RELEASE);
    if (trace->head - __atomic_load_n(&trace->tail, __ATOMIC_ACQUIRE) < trace->capacity / 2 ||
        __atomic_exchange_n(&trace->woken, 1, __ATOMIC_SEQ_CST) || trace->eventfd < 0)
        return;
    ssize_t ignored = write(trace->eventfd, &(uint64_t){1}, sizeof(uint64_t)); /* written once per drain */
    (void)ignored;
}

void pk_trace_enter(struct pk_trace *trace) {
    trace->entered_ns = pk_now_ns();
    if (!trace->pending)
        return;
    struct pk_trace_record *record = at_head(trace);
    record->outside_ns = trace->entered_ns - record->left_ns;
    if (trace->answer)
        take_value(record, trace->answer);
    publish(trace);
}

void pk_trace_leave(struct pk_trace *trace, const struct kvm_run *run, int result) {
    if (result && (result != -EINTR || trace->settling))
        return;
    if (trace->head - __atomic_load_n(&trace->tail, __ATOMIC_ACQUIRE) >= trace->capacity) {
        trace->lost_now++;
        __atomic_add_fetch(&trace->lost, 1, __ATOMIC_RELAXED);
        return;
    }
    struct pk_trace_record *record = at_head(trace);
    *record = (struct pk_trace_record){
        .left_ns = pk_now_ns(),
        .lost = trace->lost_now,
        .elements = 1,
        .vcpu = trace->vcpu,
        .reason = result ? KVM_EXIT_INTR : (uint8_t)run->exit_reason,
    };
    record->guest_ns = record->left_ns - trace->entered_ns;
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS)
        record->rip = run->s.regs.regs.rip;
    if (!result)
        take_details(trace, record, run);
    trace->lost_now = 0;
    trace->pending = 1;
}

void pk_trace_finish(struct pk_trace *trace) {
    if (!trace->pending)
        return;
    at_head(trace)->flags |= PK_TRACE_LAST;
    publish(trace);
}

/* -- the drainer's side ---------------------------------------------------------------------------------- */

static int write_all(int fd, const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t count = write(fd, (const uint8_t *)data + done, size - done);
        if (count < 0 && errno != EINTR)
            return -errno;
        done += count > 0 ? (size_t)count : 0;
    }
    return 0;
}

int64_t pk_trace_drain(struct pk_trace *trace, int fd) {
    int64_t total = 0;
    __atomic_store_n(&trace->woken, 0, __ATOMIC_SEQ_CST);
    uint64_t head = __atomic_load_n(&trace->head, __ATOMIC_ACQUIRE); /* not beyond: a busy vCPU must end it */
    while (trace->tail != head) {
        uint64_t at = trace->tail & (trace->capacity - 1), count = head - trace->tail;
        if (count > trace->capacity - at)
            count = trace->capacity - at;
        int result = write_all(fd, &trace->records[at], count * sizeof(*trace->records));
        if (result < 0)
            return result;
        __atomic_store_n(&trace->tail, trace->tail + count, __ATOMIC_RELEASE);
        total += (int64_t)count;
    }
    trace->written += (uint64_t)total;
    return total;
}
