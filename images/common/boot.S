/*
 * 32-bit entry of every C guest, whatever boot protocol brought it here: long mode on, then main(magic, info).
 *
 * Entered with EAX = the loader's magic and EBX = the physical address of its information (multiboot 1 and 2), or at
 * pvh_start with only EBX (Xen PVH). The page tables are data, not code that fills them: ring 0 is slow on some hosts.
 */
#include "guest.h"

    .section .text.boot, "ax"
    .code32
    .globl _start, pvh_start
pvh_start:
    movl $PVH_MAGIC, %eax
_start:
    cli
    cld
    movl %eax, %edi             /* the first two arguments of main */
    movl %ebx, %esi

    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    orl $(CR0_PG | CR0_WP | CR0_PE), %eax
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $KERNEL_CS, $start64

    .code64
start64:
    movl $KERNEL_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $boot_stack_top, %esp
    movl $exception_stack_top, tss + TSS_RSP0
    movw $TSS_IO_MAP, tss + TSS_IO_MAP_BASE     /* every port open: its bits are zero */
    movb $0xff, tss + TSS_LIMIT                 /* the byte after the map, SDM vol. 1, 19.5.2 */
    movl $KERNEL_TSS, %eax
    ltr %ax
    xorl %ebp, %ebp
    pushq %rdi
    pushq %rsi
    call interrupts_init
    popq %rsi
    popq %rdi
    call main
    movl %eax, %edi
    call debug_exit

/*
 * enter_user(function): call it in ring 3, where it may do port I/O by the TSS's permission map; not by IOPL, which is
 * lost on hosts that run ring 3 on their own ring 3. It must not return.
 */
    .text
    .globl enter_user
enter_user:
    pushq $USER_DS
    pushq $(boot_stack_top - 8)     /* as after a call: 16 n + 8 */
    pushq $RFLAGS_FIXED
    pushq $USER_CS
    pushq %rdi
    iretq

    .data
    .globl gdt
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* 0x08 32-bit code, ring 0 */
    .quad 0x00af9b000000ffff        /* 0x10 64-bit code, ring 0 */
    .quad 0x00cf93000000ffff        /* 0x18 data, ring 0 */
    .quad 0x00cff3000000ffff        /* 0x20 data, ring 3: before the code, as SYSRET wants it */
    .quad 0x00affb000000ffff        /* 0x28 64-bit code, ring 3 */
    .quad tss_descriptor, 0         /* 0x30 TSS; guest.ld puts the address of the tss in */
gdt_pointer:
    .word GDT_SIZE - 1
    .quad gdt

/* Identity map of 4 GiB in 2 MiB pages, all of it open to ring 3. */
    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x0007, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .quad page | 0x87               /* present, writable, user, 2 MiB */
    .set page, page + 0x200000
    .endr

    .bss
    .balign 16
    .skip 16384
boot_stack_top:
    .skip 4096
exception_stack_top:
    .globl tss
tss:
    .skip TSS_LIMIT + 1

    .section .note.GNU-stack, "", @progbits
