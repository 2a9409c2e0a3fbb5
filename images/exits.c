/*
 * Provokes every kind of exit that lets a guest run on, one line each, and prints what the machine answered.
 *
 * Options: port=0x5000 (four bytes from there on) mmio=0xfd000000 (4 KiB + 4) msr=0x12345678 hlt=1 (0: leave
 * the wake-up by an interrupt out, for machines without interrupt controllers). Ends with debug-exit 0.
 */
#include "guest.h"

enum {
    GENERAL_PROTECTION = 13,
    COUNT = 16,
    PIT_CHANNEL0 = 0x40,
    PIT_COMMAND = 0x43,
    PIT_RATE_GENERATOR = 0x34
};

static volatile bool fault, tick;

/* Skips the RDMSR or WRMSR (two bytes both). */
__attribute__((interrupt)) static void on_general_protection(struct frame *frame, uint64_t error) {
    (void)error;
    fault = true;
    ((volatile struct frame *)frame)->rip += 2;
}

__attribute__((interrupt)) static void on_pit(struct frame *frame) {
    (void)frame;
    tick = true;
    pic_eoi(0);
}

static void pio(uint16_t port) {
    outb(port, 0xa5);
    print("exits: out1 0xa5, in1 0x%x\n", (uint32_t)inb(port));
    outw(port, 0xa55a);
    print("exits: out2 0xa55a, in2 0x%x\n", (uint32_t)inw(port));
    outl(port, 0xa55a1234);
    print("exits: out4 0xa55a1234, in4 0x%x\n", inl(port));
}

/* The sum of the elements says whether all of them came. */
#define STRING_IO(type, suffix, size)                                                                        \
    static void string_io##size(uint16_t port) {                                                             \
        type data[COUNT];                                                                                    \
        const void *from = data;                                                                             \
        void *to = data;                                                                                     \
        uint64_t n = COUNT, sum = 0;                                                                         \
        for (unsigned i = 0; i < COUNT; i++)                                                                 \
            data[i] = (type)(i + 1);                                                                         \
        __asm__ volatile("rep outs" suffix : "+S"(from), "+c"(n) : "d"(port) : "memory");                    \
        n = COUNT;                                                                                           \
        __asm__ volatile("rep ins" suffix : "+D"(to), "+c"(n) : "d"(port) : "memory");                       \
        for (unsigned i = 0; i < COUNT; i++)                                                                 \
            sum += data[i];                                                                                  \
        print("exits: rep outs" #size " 1..16, rep ins" #size " sum 0x%lx\n", sum);                          \
    }
STRING_IO(uint8_t, "b", 1)
STRING_IO(uint16_t, "w", 2)
STRING_IO(uint32_t, "l", 4)

static void mmio(uintptr_t address) {
    *(volatile uint8_t *)address = 0xa5;
    print("exits: mmio write1 0xa5, read1 0x%x\n", *(volatile uint8_t *)address);
    *(volatile uint16_t *)address = 0xa55a;
    print("exits: mmio write2 0xa55a, read2 0x%x\n", *(volatile uint16_t *)address);
    *(volatile uint32_t *)address = 0xa55a1234;
    print("exits: mmio write4 0xa55a1234, read4 0x%x\n", *(volatile uint32_t *)address);
    *(volatile uint64_t *)address = 0xa55a123456789abc;
    print("exits: mmio write8 0xa55a123456789abc, read8 0x%lx\n", *(volatile uint64_t *)address);
    print("exits: mmio read8 across pages 0x%lx\n", *(volatile uint64_t *)(address + PAGE_SIZE - 4));
}

static void msr(uint32_t index) {
    uint32_t low = 0, high = 0;
    fault = false;
    __asm__ volatile("rdmsr" : "+a"(low), "+d"(high) : "c"(index) : "memory");
    if (fault)
        print("exits: rdmsr 0x%x #GP\n", index);
    else
        print("exits: rdmsr 0x%x 0x%lx\n", index, (uint64_t)high << 32 | low);
    fault = false;
    __asm__ volatile("wrmsr" ::"a"(0x5678), "d"(0x1234), "c"(index) : "memory");
    print("exits: wrmsr 0x%x %s\n", index, fault ? "#GP" : "accepted");
}

static void processor(void) {
    char vendor[13] = "", signature[13] = "";
    struct cpuid r = cpuid(0);
    memcpy(vendor, (uint32_t[]){r.b, r.d, r.c}, 12);
    r = cpuid(0x40000000);
    memcpy(signature, (uint32_t[]){r.b, r.c, r.d}, 12);
    print("exits: cpuid vendor \"%s\", hypervisor \"%s\"\n", vendor, signature);
}

static void wake_from_hlt(void) {
    set_gate(IRQ_BASE + 0, on_pit);
    pic_init(1 << 0);
    outb(PIT_COMMAND, PIT_RATE_GENERATOR);
    outb(PIT_CHANNEL0, 0xa9); /* 1193182 / 1193: 1 kHz */
    outb(PIT_CHANNEL0, 0x04);
    while (!tick)
        sti_hlt_cli();
    print("exits: hlt, woken by an interrupt\n");
}

int main(uint32_t magic, uintptr_t info) {
    const char *cmdline = boot_cmdline(magic, info);
    uint16_t port = (uint16_t)option_number(cmdline, "port", 0x5000);
    serial_init();
    set_gate(GENERAL_PROTECTION, on_general_protection);
    pio(port);
    string_io1(port);
    string_io2(port);
    string_io4(port);
    mmio(option_number(cmdline, "mmio", 0xfd000000));
    msr((uint32_t)option_number(cmdline, "msr", 0x12345678));
    processor();
    if (option_number(cmdline, "hlt", 1))
        wake_from_hlt();
    print("exits: done\n");
    return 0;
}
