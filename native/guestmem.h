/*
 * Guest physical memory as C sees it: the slots of a machine, and the marking of what the host writes there.
 *
 * Python (core/memory.py) publishes a new table whenever a slot comes or goes; old tables live as long as the
 * machine.
 */
#ifndef PYKVM_GUESTMEM_H
#define PYKVM_GUESTMEM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct pk_slot {
    uint64_t gpa, size;
    uint8_t *hva;
    uint64_t *dirty; /* a bit for each 4 KiB page that the host wrote; NULL: nobody wants to know */
    uint8_t readonly;
};

struct pk_slots {
    uint32_t count;
    struct pk_slot *slot;
};

struct pk_memory {
    struct pk_slots *slots; /* swapped whole */
};

/* The slot that holds `gpa`, or NULL. */
struct pk_slot *pk_slot_at(const struct pk_slots *slots, uint64_t gpa);
/*
 * Appends [gpa, gpa + length) to `iov`, one entry for each slot that holds a part of it: the entries added;
 * -EFAULT where a byte is in no slot, or in a read-only one and `write` is set; -E2BIG when `room` entries
 * are too few.
 */
int pk_memory_iov(const struct pk_slots *slots, uint64_t gpa, uint64_t length, int write, struct iovec *iov,
                  int room);
/* HVA of [gpa, gpa + length) if it lies in one slot, else NULL. */
uint8_t *pk_memory_view(const struct pk_slots *slots, uint64_t gpa, uint64_t length);
/* Whoever wrote guest memory says so afterwards: marks its pages where the slot has a bitmap (atomically). */
void pk_memory_written(const struct pk_slots *slots, const void *hva, size_t length);

#endif
