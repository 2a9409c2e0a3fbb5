# The few BIOS services that a kernel entered in real mode needs: a console on COM1, the memory map, a timer tick.
# bios16.py holds the assembled bytes:
#   as --32 -o bios16.o bios16.S && ld -m elf_i386 -Ttext=0xe000 -e 0 --oformat binary -o bios16.bin bios16.o
#
# It runs at F000:E000. The words before `handlers` and the memory map at `e820` are written by the loader.

        .code16
        .text

        .equ COM1, 0x3f8
        .equ LSR, COM1 + 5
        .equ SMAP, 0x534d4150

e820_entries:   .word 0
kib_above_1m:   .word 0         # AH=88h: at most 0xfc00
kib_below_16m:  .word 0         # AX=E801h: from 1 MiB, at most 0x3c00
blocks_of_64k:  .word 0         # AX=E801h: from 16 MiB
key:            .byte 0         # read from COM1, not yet taken

        .org 0x10
handlers:       # vectors 08h to 1Fh, then all others, then IRQ 8 to 15, then where the CPU starts
        .word timer, irq, irq, irq, irq, irq, irq, irq
        .word video, equipment, base_memory, unsupported, unsupported, system, keyboard, unsupported
        .word reboot, reboot, clock, ignore, ignore, ignore, ignore, ignore
        .word ignore, irq_slave, start

start:          # DS, ES, SS:SP are the kernel's already
        mov     $0x11, %al      # the two PICs: edge triggered, cascaded
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x08, %al
        out     %al, $0x21
        mov     $0x70, %al
        out     %al, $0xa1
        mov     $0x04, %al
        out     %al, $0x21
        mov     $0x02, %al
        out     %al, $0xa1
        mov     $0x01, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfa, %al      # IRQ 0 and the cascade
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1
        mov     $0x34, %al      # channel 0: rate generator, 18.2 Hz
        out     %al, $0x43
        xor     %al, %al
        out     %al, $0x40
        out     %al, $0x40
        mov     $COM1 + 3, %dx  # 115200 8n1, no interrupts
        mov     $0x80, %al
        out     %al, %dx
        mov     $COM1, %dx
        mov     $1, %al
        out     %al, %dx
        inc     %dx
        dec     %al
        out     %al, %dx
        mov     $COM1 + 3, %dx
        mov     $3, %al
        out     %al, %dx
        inc     %dx
        out     %al, %dx
        ljmp    $0x9020, $0

# -- interrupts ----------------------------------------------------------------------------------------------------

timer:
        push    %ds
        push    %ax
        xor     %ax, %ax
        mov     %ax, %ds
        incl    0x46c
        int     $0x1c
        pop     %ax
        pop     %ds
irq:
        push    %ax
        mov     $0x20, %al
        out     %al, $0x20
        pop     %ax
ignore:
        iret

irq_slave:
        push    %ax
        mov     $0x20, %al
        out     %al, $0xa0
        out     %al, $0x20
        pop     %ax
        iret

# -- returning with the carry flag; [bp] is BP, IP, CS, FLAGS ------------------------------------------------------

unsupported:
        mov     $0x86, %ah
failure:
        push    %bp
        mov     %sp, %bp
        orb     $0x01, 6(%bp)
        pop     %bp
        iret
success:
        push    %bp
        mov     %sp, %bp
        andb    $0xfe, 6(%bp)
        pop     %bp
        iret

# -- INT 10h: what is printed goes to COM1 -------------------------------------------------------------------------

video:
        cmp     $0x0e, %ah
        je      teletype
        cmp     $0x0f, %ah
        je      video_mode
        cmp     $0x03, %ah
        je      cursor
        cmp     $0x08, %ah
        jne     ignore
        mov     $0x0720, %ax    # a blank, grey on black
        iret
cursor:
        mov     $0x0607, %cx
        xor     %dx, %dx
        iret
video_mode:
        mov     $0x5003, %ax    # 80 columns, mode 3
        xor     %bh, %bh
        iret
teletype:
        push    %dx
        push    %cx
        push    %ax
        mov     $LSR, %dx
        xor     %cx, %cx        # a COM1 that never is ready costs 65536 rounds, not for ever
1:      in      %dx, %al
        test    $0x20, %al
        loopz   1b
        mov     $COM1, %dx
        pop     %ax
        out     %al, %dx
        pop     %cx
        pop     %dx
        iret

# -- INT 11h, INT 12h ----------------------------------------------------------------------------------------------

equipment:
        push    %ds
        xor     %ax, %ax
        mov     %ax, %ds
        mov     0x410, %ax
        pop     %ds
        iret
base_memory:
        push    %ds
        xor     %ax, %ax
        mov     %ax, %ds
        mov     0x413, %ax
        pop     %ds
        iret

# -- INT 15h -------------------------------------------------------------------------------------------------------

system:
        cmp     $0xe820, %ax
        je      memory_map
        cmp     $0xe801, %ax
        je      memory_sizes
        cmp     $0x88, %ah
        je      memory_size
        cmp     $0x24, %ah
        jne     unsupported
        xor     %ah, %ah        # A20: always open; 2402h asks for its state, 2403h for the ways to switch it
        cmp     $0x02, %al
        jb      success
        ja      1f
        mov     $0x01, %al
        jmp     success
1:      mov     $0x0003, %bx
        jmp     success
memory_size:
        mov     %cs:kib_above_1m, %ax
        jmp     success
memory_sizes:
        mov     %cs:kib_below_16m, %ax
        mov     %cs:blocks_of_64k, %bx
        mov     %ax, %cx
        mov     %bx, %dx
        jmp     success
memory_map:
        cmp     $SMAP, %edx
        jne     unsupported
        cmp     $20, %ecx
        jb      unsupported
        movzwl  %cs:e820_entries, %ecx
        cmp     %ecx, %ebx
        jae     unsupported
        push    %ds
        push    %si
        push    %di
        push    %cs
        pop     %ds
        imul    $20, %bx, %si
        add     $e820, %si
        mov     $10, %cx
        cld
        rep movsw
        pop     %di
        pop     %si
        pop     %ds
        inc     %bx
        cmp     %cs:e820_entries, %bx
        jb      1f
        xor     %bx, %bx        # that was the last one
1:      mov     $SMAP, %eax
        mov     $20, %ecx
        jmp     success

# -- INT 16h: the keyboard is COM1's input -------------------------------------------------------------------------

keyboard:
        and     $0xef, %ah      # 10h to 12h are the same for other keyboards
        cmp     $0x01, %ah
        jb      read_key
        je      peek_key
        xor     %ax, %ax        # no shift key is down
        iret
read_key:
        sti
        call    poll
        jnz     1f
        hlt                     # until the next tick
        jmp     read_key
1:      movb    $0, %cs:key
        iret
peek_key:
        push    %bp
        mov     %sp, %bp
        orb     $0x40, 6(%bp)
        call    poll
        jz      1f
        andb    $0xbf, 6(%bp)
1:      pop     %bp
        iret
poll:           # AL: the waiting character; ZF is set if there is none
        xor     %ah, %ah
        mov     %cs:key, %al
        test    %al, %al
        jnz     2f
        push    %dx
        mov     $LSR, %dx
        in      %dx, %al
        and     $0x01, %al
        jz      1f
        mov     $COM1, %dx
        in      %dx, %al
        mov     %al, %cs:key
        test    %al, %al
1:      pop     %dx
2:      ret

# -- INT 18h, INT 19h, INT 1Ah -------------------------------------------------------------------------------------

reboot:
        mov     $0x06, %al
        mov     $0xcf9, %dx
        out     %al, %dx
        mov     $0xfe, %al
        out     %al, $0x64
        cli
1:      hlt
        jmp     1b
clock:
        test    %ah, %ah
        jnz     failure
        push    %ds
        xor     %cx, %cx
        mov     %cx, %ds
        mov     0x46c, %dx
        mov     0x46e, %cx
        xor     %al, %al
        pop     %ds
        jmp     success

        .balign 4
e820:
