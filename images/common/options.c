/* The command line: where each boot protocol puts it, and `name=value` words in it. */
#include "guest.h"
#include "multiboot.h"

static const char *multiboot2_cmdline(const struct mb2_info *info) {
    for (const struct mb2_tag *tag = info->tags; tag->type != MB2_TAG_END; tag = mb2_next(tag))
        if (tag->type == MB2_TAG_CMDLINE)
            return (const char *)(tag + 1);
    return "";
}

const char *boot_cmdline(uint32_t magic, uintptr_t info) {
    if (magic == MULTIBOOT1_MAGIC) {
        const struct mb1_info *mb1 = (const void *)info;
        return mb1->flags & MB1_CMDLINE ? (const char *)(uintptr_t)mb1->cmdline : "";
    }
    if (magic == MULTIBOOT2_MAGIC)
        return multiboot2_cmdline((const void *)info);
    const struct pvh_start_info *pvh = (const void *)info;
    return magic == PVH_MAGIC && pvh->cmdline ? (const char *)pvh->cmdline : "";
}

/* The value of `name=` in the command line, or NULL. It ends at a space or NUL. */
static const char *find(const char *cmdline, const char *name) {
    for (const char *word = cmdline; *word; word++) {
        if (word != cmdline && word[-1] != ' ')
            continue;
        size_t n = 0;
        while (name[n] && word[n] == name[n])
            n++;
        if (!name[n] && word[n] == '=')
            return word + n + 1;
    }
    return NULL;
}

bool option(const char *cmdline, const char *name, char *value, size_t size) {
    const char *from = find(cmdline, name);
    if (!from)
        return false;
    while (size > 1 && *from && *from != ' ') {
        *value++ = *from++;
        size--;
    }
    *value = 0;
    return true;
}

bool option_is(const char *cmdline, const char *name, const char *expected) {
    const char *value = find(cmdline, name);
    if (!value)
        return false;
    while (*expected && *value == *expected)
        value++, expected++;
    return !*expected && (!*value || *value == ' ');
}

uint64_t option_number(const char *cmdline, const char *name, uint64_t otherwise) {
    const char *value = find(cmdline, name);
    if (!value)
        return otherwise;
    unsigned base = 10;
    if (value[0] == '0' && value[1] == 'x') {
        base = 16;
        value += 2;
    }
    uint64_t number = 0;
    for (; *value && *value != ' '; value++) {
        unsigned digit = (unsigned)(*value >= 'a' ? *value - 'a' + 10 : *value - '0');
        if (digit >= base) {
            print("option %s: not a number\n", name);
            debug_exit(0x7e);
        }
        number = number * base + digit;
    }
    return number;
}
