/* The smallest long mode kernel: loaded at 1 MiB with identity paging, prints on COM1 and halts for good. */
    .code64
    .globl _start
_start:
    cli
    cld
    mov $message, %rsi
    movw $0x3f8, %dx
next:
    lodsb
    testb %al, %al
    jz stop
    outb %al, %dx       /* no wait for the transmitter: an emulated one is always ready */
    jmp next
stop:
    hlt
    jmp stop            /* an NMI wakes a processor even with interrupts off */

message:
    .asciz "Hello from long mode\r\n"

    .section .note.GNU-stack, "", @progbits
