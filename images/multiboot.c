/*
 * Prints and checks what a boot loader hands over, by whichever protocol it came: multiboot 1 (multiboot.elf,
 * and multiboot_kludge.bin with load addresses in its header), multiboot2 (multiboot2.elf, an ELF64 file),
 * Xen PVH (pvh.elf). Ends with debug-exit 0, or 1 after a line for each thing that is wrong. Works in ring 3,
 * where checksums of large modules are fast on every host.
 */
#include "multiboot.h"
#include "guest.h"

enum { MAX_RANGES = 128, RAM = 1, MIB = 1 << 20 };

struct range {
    uint64_t start, end;
    uint32_t type;
};

static uint32_t magic;
static uintptr_t info;
static const char *protocol;
static struct range regions[MAX_RANGES], modules[MAX_RANGES];
static unsigned n_regions, n_modules;
static bool failed;

static void check(bool good, const char *what, uint64_t value) {
    if (good)
        return;
    print("%s: BAD %s 0x%lx\n", protocol, what, value);
    failed = true;
}

static bool in_ram(uint64_t start, uint64_t end) {
    for (unsigned i = 0; i < n_regions; i++)
        if (regions[i].type == RAM && regions[i].start <= start && end <= regions[i].end)
            return true;
    return false;
}

/* Refuses what overlaps one of the ranges that are there already. */
static void add(struct range *ranges, unsigned *n, struct range new, const char *what) {
    check(new.start < new.end, what, new.start);
    for (unsigned i = 0; i < *n; i++)
        check(new.end <= ranges[i].start || ranges[i].end <= new.start, what, new.start);
    if (*n < MAX_RANGES)
        ranges[(*n)++] = new;
}

static void on_region(uint64_t base, uint64_t length, uint32_t type) {
    print("%s: region 0x%lx + 0x%lx type %u\n", protocol, base, length, type);
    add(regions, &n_regions, (struct range){base, base + length, type}, "region");
}

static void on_memory(uint32_t lower, uint32_t upper) {
    print("%s: memory lower %u KiB, upper %u KiB\n", protocol, lower, upper);
    check(lower && lower <= 640, "lower memory", lower);
    check(upper, "upper memory", upper);
    if (n_regions)
        check(in_ram(MIB, MIB + (uint64_t)upper * 1024), "upper memory", upper);
}

static uint32_t adler32(const uint8_t *data, uint64_t size) {
    uint32_t a = 1, b = 0;
    while (size) {
        uint64_t n = size < 5552 ? size : 5552; /* as long as b stays below 2^32: RFC 1950, 9 */
        size -= n;
        for (; n; n--) {
            a += *data++;
            b += a;
        }
        a %= 65521;
        b %= 65521;
    }
    return b << 16 | a;
}

static void on_module(uint64_t start, uint64_t end, const char *cmdline) {
    print("%s: module \"%s\" %lu bytes", protocol, cmdline, end - start);
    bool good = in_ram(start, end);
    if (good)
        print(" adler32 0x%x", adler32((const uint8_t *)start, end - start));
    print("\n");
    check(good, "module outside RAM", start);
    check(start % PAGE_SIZE == 0, "module not page aligned", start);
    check(end <= (uintptr_t)image_start || start >= (uintptr_t)image_end, "module over the image", start);
    if (start != end)
        add(modules, &n_modules, (struct range){start, end, 0}, "module");
}

static void report_multiboot1(const struct mb1_info *mb) {
    if (mb->flags & MB1_LOADER)
        print("%s: loader \"%s\"\n", protocol, (const char *)(uintptr_t)mb->boot_loader_name);
    check(mb->flags & MB1_MAP, "no memory map, flags", mb->flags);
    check(mb->flags & MB1_MEMORY, "no memory size, flags", mb->flags);
    uintptr_t at = mb->mmap_addr, end = at + mb->mmap_length;
    while ((mb->flags & MB1_MAP) && at < end) {
        const struct mb1_region *region = (const void *)at;
        on_region(region->base, region->length, region->type);
        at += region->size + sizeof region->size;
    }
    if (mb->flags & MB1_MEMORY)
        on_memory(mb->mem_lower, mb->mem_upper);
    const struct mb1_module *module = (const void *)(uintptr_t)mb->mods_addr;
    for (uint32_t i = 0; (mb->flags & MB1_MODULES) && i < mb->mods_count; i++, module++)
        on_module(module->start, module->end,
                  module->cmdline ? (const char *)(uintptr_t)module->cmdline : "");
}

static const struct mb2_tag *find_tag(const struct mb2_tag *tag, uint32_t type) {
    while (tag->type != type && tag->type != MB2_TAG_END)
        tag = mb2_next(tag);
    return tag->type == type ? tag : NULL;
}

static void report_multiboot2(const struct mb2_info *mb) {
    const struct mb2_tag *end = find_tag(mb->tags, MB2_TAG_END), *tag;
    check((uintptr_t)mb % 8 == 0, "information not aligned", (uintptr_t)mb);
    check((uintptr_t)end + end->size == (uintptr_t)mb + mb->total_size, "total size", mb->total_size);
    if ((tag = find_tag(mb->tags, MB2_TAG_LOADER)))
        print("%s: loader \"%s\"\n", protocol, (const char *)(tag + 1));
    const struct mb2_map *map = (const void *)find_tag(mb->tags, MB2_TAG_MAP);
    check(map, "no memory map", 0);
    for (uint32_t at = sizeof *map; map && at < map->tag.size; at += map->entry_size) {
        const struct mb2_region *region = (const void *)((const uint8_t *)map + at);
        on_region(region->base, region->length, region->type);
    }
    const struct mb2_memory *memory = (const void *)find_tag(mb->tags, MB2_TAG_MEMORY);
    check(memory, "no memory size", 0);
    if (memory)
        on_memory(memory->lower, memory->upper);
    for (tag = mb->tags; tag->type != MB2_TAG_END; tag = mb2_next(tag)) {
        const struct mb2_module *module = (const void *)tag;
        if (tag->type == MB2_TAG_MODULE)
            on_module(module->start, module->end, module->cmdline);
    }
}

static void report_pvh(const struct pvh_start_info *pvh) {
    print("%s: version %u, flags 0x%x\n", protocol, pvh->version, pvh->flags);
    check(pvh->magic == PVH_MAGIC, "magic", pvh->magic);
    check(pvh->version >= 1, "version without a memory map", pvh->version);
    const struct pvh_region *region = (const void *)pvh->memmap;
    for (uint32_t i = 0; pvh->version >= 1 && i < pvh->memmap_entries; i++, region++)
        on_region(region->base, region->length, region->type);
    const struct pvh_module *module = (const void *)pvh->modlist;
    for (uint32_t i = 0; i < pvh->nr_modules; i++, module++)
        on_module(module->start, module->start + module->size,
                  module->cmdline ? (const char *)module->cmdline : "");
    if (pvh->rsdp)
        print("%s: rsdp signature \"%c%c%c %c%c%c\"\n", protocol, ((const char *)pvh->rsdp)[0],
              ((const char *)pvh->rsdp)[1], ((const char *)pvh->rsdp)[2], ((const char *)pvh->rsdp)[4],
              ((const char *)pvh->rsdp)[5], ((const char *)pvh->rsdp)[6]);
}

static void report(void) {
    protocol = magic == MULTIBOOT1_MAGIC ? "multiboot" : magic == MULTIBOOT2_MAGIC ? "multiboot2" : "pvh";
    print("%s: magic 0x%x\n", protocol, magic);
    print("%s: cmdline \"%s\"\n", protocol, boot_cmdline(magic, info));
    if (magic == MULTIBOOT1_MAGIC)
        report_multiboot1((const void *)info);
    else if (magic == MULTIBOOT2_MAGIC)
        report_multiboot2((const void *)info);
    else
        report_pvh((const void *)info);
    check(in_ram((uintptr_t)image_start, (uintptr_t)image_end), "image outside RAM", (uintptr_t)image_end);
    check(info < (uintptr_t)image_start || info >= (uintptr_t)image_end, "information over the image", info);
    print("%s: %s\n", protocol, failed ? "FAILED" : "ok");
    debug_exit(failed);
}

int main(uint32_t boot_magic, uintptr_t boot_info) {
    magic = boot_magic;
    info = boot_info;
    serial_init();
    enter_user(report);
}
