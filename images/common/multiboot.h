/* Boot information as the specifications lay it out: multiboot 0.6.96 (3.3), multiboot2 2.0 (3.6), Xen PVH.
 */
#ifndef MULTIBOOT_H
#define MULTIBOOT_H

#include <stdint.h>

enum {
    MB1_MEMORY = 1 << 0,
    MB1_CMDLINE = 1 << 2,
    MB1_MODULES = 1 << 3,
    MB1_MAP = 1 << 6,
    MB1_LOADER = 1 << 9
};

struct mb1_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
    uint32_t syms[4];
    uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name;
};

struct mb1_module {
    uint32_t start, end, cmdline, reserved;
};

struct mb1_region { /* `size` does not count itself */
    uint32_t size;
    uint64_t base, length;
    uint32_t type;
} __attribute__((packed));

enum { MB2_TAG_END, MB2_TAG_CMDLINE, MB2_TAG_LOADER, MB2_TAG_MODULE, MB2_TAG_MEMORY, MB2_TAG_MAP = 6 };

struct mb2_tag {
    uint32_t type, size;
};

struct mb2_info {
    uint32_t total_size, reserved;
    struct mb2_tag tags[];
};

struct mb2_module {
    struct mb2_tag tag;
    uint32_t start, end;
    char cmdline[];
};

struct mb2_memory {
    struct mb2_tag tag;
    uint32_t lower, upper;
};

struct mb2_region {
    uint64_t base, length;
    uint32_t type, reserved;
};

struct mb2_map {
    struct mb2_tag tag;
    uint32_t entry_size, entry_version;
    uint8_t entries[];
};

/* Tags start on 8-byte boundaries; their size does not count the padding. */
static inline const struct mb2_tag *mb2_next(const struct mb2_tag *tag) {
    return (const void *)((uintptr_t)tag + ((tag->size + 7) & ~7ul));
}

struct pvh_start_info {
    uint32_t magic, version, flags, nr_modules;
    uint64_t modlist, cmdline, rsdp, memmap; /* memmap from version 1 on */
    uint32_t memmap_entries, reserved;
};

struct pvh_module {
    uint64_t start, size, cmdline, reserved;
};

struct pvh_region {
    uint64_t base, length;
    uint32_t type, reserved;
};
#endif
