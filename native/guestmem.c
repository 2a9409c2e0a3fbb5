#include "guestmem.h"
#include <errno.h>

enum { PAGE_SHIFT = 12, WORD_BITS = 64 };

struct pk_slot *pk_slot_at(const struct pk_slots *slots, uint64_t gpa) {
    for (uint32_t i = 0; i < slots->count; i++)
        if (gpa - slots->slot[i].gpa < slots->slot[i].size) /* unsigned: below the slot is far above it */
            return &slots->slot[i];
    return NULL;
}

int pk_memory_iov(const struct pk_slots *slots, uint64_t gpa, uint64_t length, int write, struct iovec *iov,
                  int room) {
    int count = 0;
    while (length) {
        struct pk_slot *slot = pk_slot_at(slots, gpa);
        if (!slot || (write && slot->readonly))
            return -EFAULT;
        if (count == room)
            return -E2BIG;
        uint64_t offset = gpa - slot->gpa, part = slot->size - offset;
        if (part > length)
            part = length;
        iov[count++] = (struct iovec){slot->hva + offset, part};
        gpa += part;
        length -= part;
    }
    return count;
}

uint8_t *pk_memory_view(const struct pk_slots *slots, uint64_t gpa, uint64_t length) {
    struct pk_slot *slot = pk_slot_at(slots, gpa);
    if (!slot || length > slot->size - (gpa - slot->gpa))
        return NULL;
    return slot->hva + (gpa - slot->gpa);
}

static void mark(uint64_t *bitmap, size_t offset, size_t length) {
    for (size_t page = offset >> PAGE_SHIFT; page <= (offset + length - 1) >> PAGE_SHIFT; page++)
        __atomic_fetch_or(&bitmap[page / WORD_BITS], 1ull << page % WORD_BITS, __ATOMIC_SEQ_CST);
}

void pk_memory_written(const struct pk_slots *slots, const void *hva, size_t length) {
    for (uint32_t i = 0; length && i < slots->count; i++) {
        struct pk_slot *slot = &slots->slot[i];
        size_t offset = (const uint8_t *)hva - slot->hva;
        uint64_t *dirty = __atomic_load_n(&slot->dirty, __ATOMIC_ACQUIRE);
        if (dirty && offset < slot->size)
            mark(dirty, offset, length);
    }
}
