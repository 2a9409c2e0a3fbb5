/* The first instruction: a stack, then C. */
    .globl _start
_start:
    movq $stack_top, %rsp
    call kmain
1:  cli
    hlt
    jmp 1b

    .bss
    .balign 16
    .skip 16384
stack_top:

    .section .note.GNU-stack, "", @progbits
