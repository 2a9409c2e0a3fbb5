"""Guests in C that a test brings along: compiled for long or protected mode, loaded as a plain ELF file."""

from __future__ import annotations

import subprocess
from pathlib import Path

_COMPILE = """-g -O1 -std=gnu11 -Wall -Wextra -Werror -march=x86-64 -mgeneral-regs-only -mno-red-zone -ffreestanding
-fno-pic -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables"""
_LINK = "-nostdlib -static -no-pie -Wl,--build-id=none -Wl,-Ttext=0x100000 -Wl,-z,noexecstack"

PRELUDE = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
__attribute__((noinline)) void put(char c) { outb(0x3f8, c); }
__attribute__((noinline)) void print(const char *s) { while (*s) put(*s++); }
static inline char get(void) { while (!(inb(0x3fd) & 1)); return inb(0x3f8); }
static u64 stack[2048];
void kmain(void);
"""
START = {
    64: '__asm__(".globl _start\\n_start: mov $stack + 16384, %rsp\\n call kmain\\n1: cli\\n hlt\\n jmp 1b");\n',
    32: '__asm__(".globl _start\\n_start: mov $stack + 16384, %esp\\n call kmain\\n1: cli\\n hlt\\n jmp 1b");\n',
}


def build(folder: Path, source: str, bits: int = 64, name: str = "guest", *flags: str) -> str:
    """The path of the ELF file made of `source`, which has a kmain; PRELUDE gives it serial output."""
    code = folder / f"{name}{bits}.c"
    code.write_text(
        PRELUDE.replace("static u64 stack", "__attribute__((used)) static u64 stack") + START[bits] + source
    )
    output = code.with_suffix(".elf")
    options = [*_COMPILE.split(), *flags, *_LINK.split(), f"-m{bits}"] + (["-march=i686"] if bits == 32 else [])
    subprocess.run(["gcc", *options, "-o", str(output), str(code)], check=True)
    return str(output)
