/*
 * Where a SIPI starts a processor: copied to a page below 1 MiB, entered in real mode at CS:0. Goes straight to long
 * mode (SDM vol. 3A, 9.8.5 does it by way of protected mode; PE and PG may be set at once), then calls ap_main.
 */
#include "guest.h"

    .text
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    lgdtl pointer - trampoline
    movl %cr0, %eax
    andl $~(CR0_CD | CR0_NW), %eax  /* as INIT leaves them */
    orl $(CR0_PG | CR0_WP | CR0_PE), %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CS, $ap_start64
    .balign 4
pointer:
    .word GDT_SIZE - 1
    .long gdt
trampoline_end:

    .code64
ap_start64:
    movl $KERNEL_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %eax
    lock xaddl %eax, ap_next
    cmpl $64, %eax                  /* MAX_CPUS */
    jae stop
    incl %eax
    shll $12, %eax                  /* STACK_SIZE */
    leal ap_stacks(%eax), %esp
    xorl %ebp, %ebp
    call ap_main
stop:
    hlt
    jmp stop

    .section .note.GNU-stack, "", @progbits
