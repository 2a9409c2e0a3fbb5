/* The smallest real-mode kernel: loaded at CS:0, prints on COM1 and halts for good. */
    .code16
    .globl _start
_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    movw $message, %si
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
    .asciz "Hello from real mode\r\n"

    .section .note.GNU-stack, "", @progbits
