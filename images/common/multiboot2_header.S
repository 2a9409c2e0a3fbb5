/* Multiboot2 2.0, 3.1. */
    .set MAGIC, 0xe85250d6
    .set ARCHITECTURE, 0    /* i386: entered in 32-bit protected mode, whatever the class of the ELF file */

    .section .header, "a"
    .balign 8
header:
    .long MAGIC, ARCHITECTURE, header_end - header, -(MAGIC + ARCHITECTURE + (header_end - header))
    .balign 8
    .short 1, 0             /* information request: command line, modules, memory, map */
    .long 8 + 4 * 4, 1, 3, 4, 6
    .balign 8
    .short 6, 0             /* modules page aligned */
    .long 8
    .balign 8
    .short 0, 0
    .long 8
header_end:

    .section .note.GNU-stack, "", @progbits
