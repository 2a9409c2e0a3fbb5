#include "snapmem.h"
#include <errno.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, ENTRIES = 4096 };

/* Of /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst; no header has them. */
#define ENTRY_FILE (1ull << 61)
#define ENTRY_SWAPPED (1ull << 62)
#define ENTRY_PRESENT (1ull << 63)

#ifndef PAGEMAP_SCAN /* Linux 6.7; distributions' headers are older than the kernels that they run on */
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
struct page_region {
    uint64_t start, end, categories;
};
struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif

int pk_map_private(void *address, size_t length, int fd, uint64_t offset) {
    void *at = mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd,
                    (off_t)offset);
    return at == MAP_FAILED ? -errno : 0;
}

static int add(struct pk_range *out, size_t *count, size_t room, uint64_t start, uint64_t end) {
    if (*count && out[*count - 1].end == start) {
        out[*count - 1].end = end;
        return 0;
    }
    if (*count == room)
        return -E2BIG;
    out[(*count)++] = (struct pk_range){start, end};
    return 0;
}

/* Before Linux 6.7: one entry for each page, whether it is mapped or not. */
static int64_t read_entries(int pagemap, uint64_t start, uint64_t end, struct pk_range *out, size_t room) {
    uint64_t entries[ENTRIES];
    size_t count = 0;
    while (start < end) {
        uint64_t want = (end - start) / PAGE < ENTRIES ? (end - start) / PAGE : ENTRIES;
        ssize_t got =
            pread(pagemap, entries, want * sizeof *entries, (off_t)(start / PAGE * sizeof *entries));
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        for (size_t i = 0; i < got / sizeof *entries; i++, start += PAGE) {
            int own = entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED) && !(entries[i] & ENTRY_FILE);
            if (own && add(out, &count, room, start, start + PAGE) < 0)
                return -E2BIG;
        }
    }
    return (int64_t)count;
}

int64_t pk_private_ranges(int pagemap, uint64_t start, uint64_t end, struct pk_range *out, size_t room) {
    struct page_region regions[512];
    struct pm_scan_arg scan = {
        .size = sizeof scan,
        .end = end,
        .vec = (uintptr_t)regions,
        .vec_len = sizeof regions / sizeof *regions,
        .category_inverted = PAGE_IS_FILE | PAGE_IS_PFNZERO,
        .category_mask = PAGE_IS_FILE | PAGE_IS_PFNZERO,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT,
    };
    size_t count = 0;
    for (uint64_t at = start; at < end; at = scan.walk_end) {
        scan.start = at;
        int found = ioctl(pagemap, PAGEMAP_SCAN, &scan);
        if (found < 0)
            return errno == ENOTTY || errno == EINVAL ? read_entries(pagemap, start, end, out, room) : -errno;
        for (int i = 0; i < found; i++)
            if (add(out, &count, room, regions[i].start, regions[i].end) < 0)
                return -E2BIG;
    }
    return (int64_t)count;
}

int pk_drop(const struct pk_range *ranges, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (madvise((void *)(uintptr_t)ranges[i].start, ranges[i].end - ranges[i].start, MADV_DONTNEED) < 0)
            return -errno;
    return 0;
}

int64_t pk_advise(const struct pk_range *ranges, size_t count, int advice) {
    int64_t done = 0;
    for (size_t i = 0; i < count; i++) {
        size_t length = ranges[i].end - ranges[i].start;
        if (!madvise((void *)(uintptr_t)ranges[i].start, length, advice))
            done += (int64_t)length;
        else if (errno != EINVAL)
            return -errno;
    }
    return done;
}

int pk_calls(int fd, const struct pk_call *calls, int count) {
    for (int i = 0; i < count; i++)
        if (ioctl(fd, calls[i].request, calls[i].argument) < 0)
            return i | errno << 16;
    return count;
}
