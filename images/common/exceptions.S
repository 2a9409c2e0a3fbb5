/* One stub per exception vector, 16 bytes apart: unexpected_exception(vector, error code, frame). */
#define HAS_ERROR_CODE(v) ((1 << (v)) & 0x60227d00) /* 8, 10-14, 17, 21, 29, 30 (SDM vol. 3A, table 6-1; APM) */

    .text
    .globl exception_stubs
    .balign 16
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if !HAS_ERROR_CODE(vector)
    pushq $0
    .endif
    movl $vector, %edi
    jmp report
    .set vector, vector + 1
    .endr

report:
    cld
    popq %rsi
    movq %rsp, %rdx
    andq $-16, %rsp
    call unexpected_exception

    .section .note.GNU-stack, "", @progbits
