/* Multiboot 0.6.96, 3.1. With -DKLUDGE the addresses are in the header, so that a flat file can be loaded too. */
    .set MAGIC, 0x1badb002
#ifdef KLUDGE
    .set FLAGS, 0x10003     /* modules page aligned, memory information, address fields valid */
#else
    .set FLAGS, 0x00003
#endif

    .section .header, "a"
    .balign 4
header:
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)
#ifdef KLUDGE
    .long header, image_start, image_data_end, image_end, _start
#endif

    .section .note.GNU-stack, "", @progbits
