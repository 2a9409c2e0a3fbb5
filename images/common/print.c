/* Printing on COM1 (a 16550A), polled. */
#include "guest.h"

enum { THR = 0, IER = 1, FCR = 2, LCR = 3, MCR = 4, LSR = 5, LSR_THRE = 0x20, LCR_DLAB = 0x80, LCR_8N1 = 3 };

void serial_init(void) {
    outb(COM1 + IER, 0);
    outb(COM1 + LCR, LCR_DLAB | LCR_8N1);
    outb(COM1 + THR, 1); /* divisor 1: 115200 baud */
    outb(COM1 + IER, 0);
    outb(COM1 + LCR, LCR_8N1);
    outb(COM1 + FCR, 0x07); /* FIFOs on and empty */
    outb(COM1 + MCR, 0x0b); /* DTR, RTS, and OUT2, which lets the interrupt through on a PC */
}

static void transmit(char c) {
    while (!(inb(COM1 + LSR) & LSR_THRE))
        ;
    outb(COM1 + THR, (uint8_t)c);
}

void put_char(char c) {
    if (c == '\n')
        transmit('\r');
    transmit(c);
}

static void put_number(uint64_t value, unsigned base) {
    char digits[20];
    int n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    while (n)
        put_char(digits[--n]);
}

static void put_string(const char *s) {
    while (*s)
        put_char(*s++);
}

void print(const char *format, ...) {
    va_list args;
    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            put_char(*format);
            continue;
        }
        bool is_long = *++format == 'l';
        format += is_long;
        if (*format == 's')
            put_string(va_arg(args, const char *));
        else if (*format == 'c')
            put_char((char)va_arg(args, int));
        else if (*format == '%')
            put_char('%');
        else
            put_number(is_long ? va_arg(args, uint64_t) : va_arg(args, uint32_t), *format == 'x' ? 16 : 10);
    }
    va_end(args);
}

void debug_exit(int code) {
    outb(DEBUG_EXIT, (uint8_t)code);
    halt(); /* a machine without the device: the guest still ends */
}

void halt(void) {
    for (;;) {
        cli();
        hlt();
    }
}

/* gcc may call these for copies and initialisers even with -ffreestanding. */
void *memcpy(void *to, const void *from, size_t n) {
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
    return start;
}

void *memset(void *to, int value, size_t n) {
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return start;
}
