"""Small images for loader tests, built field by field so that a test can break any of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pykvm.boot.image import E820_RAM, BootOptions, ImageFile
from pykvm.core.memory import GuestMemory

MIB = 1 << 20
CODE = bytes.fromhex("31c0 f4 ebfd".replace(" ", ""))  # xor eax, eax; hlt; jmp .-3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4

# what a board with 16 MiB reports: low RAM up to the EBDA, the rest from 1 MiB
E820_16M = ((0, 0x9FC00, E820_RAM), (0x9FC00, 0x60400, 2), (MIB, 15 * MIB, E820_RAM))


@contextmanager
def guest_ram(mib: int = 16) -> Iterator[GuestMemory]:
    """`mib` MiB of guest memory at address 0."""
    memory = GuestMemory()
    memory.add(0, mib * MIB)
    try:
        yield memory
    finally:
        memory.close()


def file(data: bytes, path: str = "kernel") -> ImageFile:
    """An image that was never on disk."""
    return ImageFile(path, data)


def options(**kwargs: object) -> BootOptions:
    """BootOptions with the memory map of 16 MiB."""
    kwargs.setdefault("e820", E820_16M)
    return BootOptions(**kwargs)  # type: ignore[arg-type]


class Segment:
    """One program header and its data; every field can be overridden."""

    def __init__(self, paddr: int, data: bytes = CODE, *, memsz: int | None = None, **fields: int) -> None:
        self.data = data
        self.fields = {
            "type": PT_LOAD, "flags": 7, "vaddr": paddr, "paddr": paddr,
            "filesz": len(data), "memsz": len(data) if memsz is None else memsz, "align": 4096,
        } | fields  # fmt: skip


def note(name: bytes, kind: int, desc: bytes, paddr: int = 0) -> Segment:
    """A PT_NOTE segment with one note."""
    name += b"\0"
    body = struct.pack("<III", len(name), len(desc), kind) + name + bytes(-len(name) % 4)
    return Segment(paddr, body + desc + bytes(-len(desc) % 4), type=PT_NOTE, memsz=0, align=4)


class Section:
    """One section header and its data."""

    def __init__(self, kind: int, data: bytes, *, addr: int = 0, **fields: int) -> None:
        self.data = data
        self.fields = {"name": 0, "type": kind, "flags": 0, "addr": addr, "size": len(data),
                       "link": 0, "info": 0, "align": 1, "entsize": 0} | fields  # fmt: skip


def elf(
    bits: int,
    segments: Sequence[Segment],
    *,
    entry: int = MIB,
    machine: int | None = None,
    sections: Sequence[Section] = (),
    prefix: bytes = b"",
    **header: int,
) -> bytes:
    """An ELF file; `prefix` comes between the program headers and the data (a multiboot header, aligned to 8).

    `header` overrides phoff, phnum, phentsize, type, shnum, shoff or shentsize.
    """
    ehsize, phsize, shsize = (52, 32, 40) if bits == 32 else (64, 56, 64)
    machine = (EM_386 if bits == 32 else EM_X86_64) if machine is None else machine
    at = ehsize + phsize * len(segments)
    body = bytearray(-at % 8) + prefix
    body += bytes(-(at + len(body)) % 16)
    table = b""
    for each in segments:
        table += _phdr(bits, at + len(body), each)
        body += each.data
    rows = b""
    for section in sections:
        rows += _shdr(bits, at + len(body), section)
        body += section.data
    shoff = at + len(body) if sections else 0
    fields = {
        "type": 2, "machine": machine, "version": 1, "entry": entry, "phoff": ehsize, "shoff": shoff,
        "flags": 0, "ehsize": ehsize, "phentsize": phsize, "phnum": len(segments),
        "shentsize": shsize, "shnum": len(sections), "shstrndx": max(len(sections) - 1, 0),
    } | header  # fmt: skip
    layout = "<HHIIIIIHHHHHH" if bits == 32 else "<HHIQQQIHHHHHH"
    ident = b"\x7fELF" + bytes([1 if bits == 32 else 2, 1, 1]) + bytes(9)
    return ident + struct.pack(layout, *fields.values()) + table + body + rows


def _phdr(bits: int, offset: int, segment: Segment) -> bytes:
    f = {"offset": offset} | segment.fields
    names = (
        ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align")
        if bits == 32
        else ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align")
    )
    return struct.pack("<8I" if bits == 32 else "<IIQQQQQQ", *(f[name] for name in names))


def _shdr(bits: int, offset: int, section: Section) -> bytes:
    f = {"offset": offset} | section.fields
    names = ("name", "type", "flags", "addr", "offset", "size", "link", "info", "align", "entsize")
    return struct.pack("<10I" if bits == 32 else "<IIQQQQIIQQ", *(f[name] for name in names))


def multiboot_header(flags: int = 0, *addresses: int, magic: int = 0x1BADB002, checksum: int | None = None) -> bytes:
    """A multiboot 1 header; `addresses` are header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr."""
    if checksum is None:
        checksum = -(magic + flags) & 0xFFFFFFFF
    return struct.pack(f"<III{len(addresses)}I", magic, flags, checksum, *addresses)


def tag(kind: int, body: bytes = b"", *, flags: int = 0, size: int | None = None) -> bytes:
    """A multiboot 2 header tag, padded to 8."""
    data = struct.pack("<HHI", kind, flags, 8 + len(body) if size is None else size) + body
    return data + bytes(-len(data) % 8)


END_TAG = tag(0)


def multiboot2_header(*tags: bytes, architecture: int = 0, length: int | None = None) -> bytes:
    """A multiboot 2 header with `tags` and the end tag."""
    body = b"".join(tags) + END_TAG
    size = 16 + len(body) if length is None else length
    magic = 0xE85250D6
    return struct.pack("<4I", magic, architecture, size, -(magic + architecture + size) & 0xFFFFFFFF) + body


def words(*values: int) -> bytes:
    """Little-endian 32-bit values."""
    return struct.pack(f"<{len(values)}I", *values)
