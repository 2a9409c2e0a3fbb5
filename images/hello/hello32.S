/* The smallest protected mode kernel: loaded at 1 MiB with flat segments, prints on COM1 and halts for good. */
    .code32
    .globl _start
_start:
    cli
    cld
    mov $message, %esi
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
    .asciz "Hello from protected mode\r\n"

    .section .note.GNU-stack, "", @progbits
