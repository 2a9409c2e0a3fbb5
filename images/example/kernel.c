/*
 * A kernel small enough to read, with things worth testing: numbers in and out of text, a page allocator, and
 * a command line on COM1. Freestanding C in long mode: pykvm enters the ELF file's _start with an identity
 * map of 4 GiB.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { COM1 = 0x3f8, LINE_STATUS = COM1 + 5, DATA_READY = 1, DEBUG_EXIT = 0xf4 };
enum { PAGE = 4096, PAGES = 64, POOL = 0x400000 };

static uint8_t used[PAGES];
char greeting[32] = "example";

static inline void outb(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint8_t inb(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* -- console
 * ---------------------------------------------------------------------------------------------------- */

void print(const char *text) {
    for (; *text; text++) {
        if (*text == '\n')
            outb(COM1, '\r');
        outb(COM1, (uint8_t)*text);
    }
}

static char read_char(void) {
    while (!(inb(LINE_STATUS) & DATA_READY))
        ;
    return (char)inb(COM1);
}

static void read_line(char *line, size_t size) {
    size_t n = 0;
    for (char c; (c = read_char()) != '\n' && c != '\r';)
        if (n + 1 < size)
            line[n++] = c;
    line[n] = 0;
}

/* -- numbers
 * ---------------------------------------------------------------------------------------------------- */

/* Reads decimal digits at *text and moves *text past them; false when there are none or the value is above
 * 2^32 - 1. */
bool parse_number(const char **text, uint32_t *value) {
    uint64_t sum = 0;
    const char *start = *text;
    for (; **text >= '0' && **text <= '9'; ++*text) {
        sum = sum * 10 + (uint64_t)(**text - '0');
        if (sum > UINT32_MAX)
            return false;
    }
    *value = (uint32_t)sum;
    return *text != start;
}

/* The number that `text` is, or -1. */
int64_t to_number(const char *text) {
    uint32_t value;
    return parse_number(&text, &value) && !*text ? (int64_t)value : -1;
}

/* Writes `value` in decimal to `buffer` (11 bytes suffice); returns the length. */
size_t format_number(uint32_t value, char *buffer) {
    size_t length = 1;
    for (uint32_t rest = value; rest >= 10; rest /= 10)
        length++;
    buffer[length] = 0;
    for (size_t i = length; i--; value /= 10)
        buffer[i] = (char)('0' + value % 10);
    return length;
}

/* -- pages
 * ------------------------------------------------------------------------------------------------------ */

/* A free page, or NULL. */
void *page_alloc(void) {
    for (int i = 0; i < PAGES; i++)
        if (!used[i]) {
            used[i] = 1;
            return (void *)(uintptr_t)(POOL + i * PAGE);
        }
    return NULL;
}

/* False for what is no page of the pool, or not in use. */
bool page_free(void *page) {
    uintptr_t offset = (uintptr_t)page - POOL;
    if (offset % PAGE || offset / PAGE >= PAGES || !used[offset / PAGE])
        return false;
    used[offset / PAGE] = 0;
    return true;
}

int pages_left(void) {
    int count = 0;
    for (int i = 0; i < PAGES; i++)
        count += !used[i];
    return count;
}

/* -- commands
 * --------------------------------------------------------------------------------------------------- */

static bool starts_with(const char **text, const char *word) {
    const char *at = *text;
    while (*word && *at == *word)
        at++, word++;
    if (*word)
        return false;
    *text = at;
    return true;
}

static void print_number(uint32_t value) {
    char text[12];
    format_number(value, text);
    print(text);
}

void crash(void) { *(volatile int *)0x123456789000 = 1; /* no page is there, and no handler */ }

void hang(void) {
    for (;;)
        __asm__ volatile("pause");
}

static void run(const char *line) {
    uint32_t a, b;
    if (starts_with(&line, "add ") && parse_number(&line, &a) && starts_with(&line, " ") &&
        parse_number(&line, &b)) {
        print_number(a + b);
    } else if (starts_with(&line, "alloc")) {
        print(page_alloc() ? "ok, " : "no memory, ");
        print_number((uint32_t)pages_left());
        print(" left");
    } else if (starts_with(&line, "hello")) {
        print("hello from ");
        print(greeting);
    } else if (starts_with(&line, "crash")) {
        crash();
    } else if (starts_with(&line, "hang")) {
        hang();
    } else if (starts_with(&line, "exit ") && parse_number(&line, &a)) {
        outb(DEBUG_EXIT, (uint8_t)a);
    } else {
        print("what?");
    }
    print("\n");
}

void kmain(void) {
    char line[64];
    print("example: ready\n");
    for (;;) {
        print("> ");
        read_line(line, sizeof line);
        run(line);
    }
}
