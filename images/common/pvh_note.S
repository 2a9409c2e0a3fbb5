/* XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader enters the image (Xen, public/elfnote.h). */
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18          /* sizes of name and value, type */
    .asciz "Xen"
    .long pvh_start

    .section .note.GNU-stack, "", @progbits
