/* What every C guest shares: constants of the start-up code, port I/O, printing, options, interrupts. */
#ifndef GUEST_H
#define GUEST_H

#define MULTIBOOT1_MAGIC 0x2badb002
#define MULTIBOOT2_MAGIC 0x36d76289
#define PVH_MAGIC 0x336ec578 /* hvm_start_info.magic, "xEn3" with the top bit of the E set */

#define CR0_PE (1 << 0)
#define CR0_WP (1 << 16)
#define CR0_NW (1 << 29)
#define CR0_CD (1 << 30)
#define CR0_PG (1 << 31)
#define CR4_PAE (1 << 5)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)
#define RFLAGS_FIXED 0x2

#define KERNEL_CS32 0x08
#define KERNEL_CS 0x10
#define KERNEL_DS 0x18
#define USER_DS 0x23
#define USER_CS 0x2b
#define KERNEL_TSS 0x30
#define GDT_SIZE 0x40

/* 64-bit TSS with a permission map for all ports */
#define TSS_RSP0 0x04
#define TSS_IO_MAP_BASE 0x66
#define TSS_IO_MAP 0x68
#define TSS_LIMIT 0x2068

#ifndef __ASSEMBLER__
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { COM1 = 0x3f8, DEBUG_EXIT = 0xf4 };
enum { PAGE_SIZE = 4096, LAPIC = 0xfee00000 };

/* start-up and its linker script */
extern uint64_t pml4[512];
extern uint8_t image_start[], image_end[];
int main(uint32_t magic, uintptr_t info); /* what it returns is the debug-exit code */
_Noreturn void enter_user(void (*function)(void));

/* processor */
static inline void outb(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline void outw(uint16_t port, uint16_t value) {
    __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port));
}
static inline void outl(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint8_t inb(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint16_t inw(uint16_t port) {
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint32_t inl(uint16_t port) {
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint64_t rdtsc(void) {
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
struct cpuid {
    uint32_t a, b, c, d;
};
static inline struct cpuid cpuid(uint32_t leaf) {
    struct cpuid r;
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
    return r;
}
static inline uint32_t lapic_read(uint32_t reg) { return *(volatile uint32_t *)(uintptr_t)(LAPIC + reg); }
static inline void lapic_write(uint32_t reg, uint32_t value) {
    *(volatile uint32_t *)(uintptr_t)(LAPIC + reg) = value;
}
static inline void cli(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void hlt(void) { __asm__ volatile("hlt" ::: "memory"); }
/* STI holds interrupts off for one more instruction: no wake-up can slip in before the HLT. */
static inline void sti_hlt_cli(void) { __asm__ volatile("sti; hlt; cli" ::: "memory"); }
static inline void lidt(const void *base, uint16_t limit) {
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) idtr = {limit, (uintptr_t)base};
    __asm__ volatile("lidt %0" ::"m"(idtr));
}

void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
_Noreturn void debug_exit(int code);
_Noreturn void halt(void); /* cli; hlt: can never wake */

/* print.c: COM1, "\n" goes out as CR LF. Conversions: %s %c %u %x %lu %lx %%, no width. */
void serial_init(void);
void put_char(char c);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* options.c: `name=value` words of the command line; a word without one is not an option */
const char *boot_cmdline(uint32_t magic, uintptr_t info);
bool option(const char *cmdline, const char *name, char *value, size_t size);
bool option_is(const char *cmdline, const char *name, const char *expected);
uint64_t option_number(const char *cmdline, const char *name, uint64_t otherwise); /* decimal or 0x... */

/* interrupts.c */
struct frame {
    uint64_t rip, cs, rflags, rsp, ss;
};
void interrupts_init(
    void); /* IDT that reports every exception and ends with debug-exit 0x7f; main finds it set */
void set_gate(unsigned vector, const void *handler);
void pic_init(uint16_t enabled); /* IRQ n at vector 0x20 + n; a bit of `enabled` per IRQ */
void pic_eoi(unsigned irq);
enum { IRQ_BASE = 0x20 };
#endif
#endif
