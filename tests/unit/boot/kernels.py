"""Kernels made in Python: ELF files, bzImages and every compression of their payload. Shared by the boot tests."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

import lz4.block
import zstandard

from pykvm.boot.image import E820_RAM, E820_RESERVED, BootOptions, ImageFile
from pykvm.core.memory import GuestMemory

MIB = 1 << 20
LZ4_BLOCK = 8 * MIB

# setup header fields: offset and struct format
FIELDS = {
    "setup_sects": (0x1F1, "B"),
    "syssize": (0x1F4, "I"),
    "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"),
    "magic": (0x202, "4s"),
    "version": (0x206, "H"),
    "type_of_loader": (0x210, "B"),
    "loadflags": (0x211, "B"),
    "code32_start": (0x214, "I"),
    "ramdisk_image": (0x218, "I"),
    "ramdisk_size": (0x21C, "I"),
    "heap_end_ptr": (0x224, "H"),
    "cmd_line_ptr": (0x228, "I"),
    "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),
    "payload_offset": (0x248, "I"),
    "payload_length": (0x24C, "I"),
    "setup_data": (0x250, "Q"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
}

PAYLOAD_OFFSET = 0x400


def make_memory(size: int = 64 * MIB, *, memfd: bool = False) -> GuestMemory:
    """One slot of RAM from 0."""
    memory = GuestMemory(memfd=memfd)
    memory.add(0, size)
    return memory


def make_e820(size: int = 64 * MIB) -> list[tuple[int, int, int]]:
    """The map of a PC with `size` bytes of RAM, at most 3 GiB."""
    return [
        (0, 0x9FC00, E820_RAM),
        (0x9FC00, 0x400, E820_RESERVED),
        (0xE0000, 0x20000, E820_RESERVED),
        (MIB, size - MIB, E820_RAM),
    ]


def make_options(size: int = 64 * MIB, **changes: object) -> BootOptions:
    """Options for a machine of `make_memory(size)`."""
    settings: dict[str, object] = {"e820": make_e820(size), "cmdline": "console=ttyS0", "rsdp": 0xE0000}
    return BootOptions(**(settings | changes))  # type: ignore[arg-type]


def make_note(name: bytes, kind: int, desc: bytes) -> bytes:
    """One ELF note, name and description padded to 4 bytes."""
    padded = name + b"\0" + b"\0" * (-(len(name) + 1) % 4)
    return struct.pack("<III", len(name) + 1, len(desc), kind) + padded + desc + b"\0" * (-len(desc) % 4)


def make_elf(
    segments: Sequence[tuple[int, int, bytes, int]],
    entry: int,
    *,
    bits: int = 64,
    notes: bytes = b"",
) -> bytes:
    """An x86 executable with PT_LOAD `segments` of (paddr, vaddr, bytes, memsz), each page-aligned in the file."""
    ehdr, phdr = (64, 56) if bits == 64 else (52, 32)
    count = len(segments) + bool(notes)
    body = b""
    headers = b""
    start = (ehdr + phdr * count + 4095) & -4096
    for paddr, vaddr, data, memsz in segments:
        headers += _phdr(bits, 1, start + len(body), vaddr, paddr, len(data), memsz)
        body += data + b"\0" * (-len(data) % 4096)
    if notes:
        headers += _phdr(bits, 4, start + len(body), 0, 0, len(notes), len(notes))
        body += notes
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    form = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    machine = 62 if bits == 64 else 3
    header = ident + struct.pack(form, 2, machine, 1, entry, ehdr, 0, 0, ehdr, phdr, count, 0, 0, 0)
    return (header + headers).ljust(start, b"\0") + body


def _phdr(bits: int, kind: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> bytes:
    if bits == 64:
        return struct.pack("<IIQQQQQQ", kind, 7, offset, vaddr, paddr, filesz, memsz, 4096)
    return struct.pack("<8I", kind, offset, vaddr, paddr, filesz, memsz, 7, 4096)


def make_vmlinux(*, base: int = 16 * MIB, text: bytes = b"", bits: int = 64, notes: bytes = b"") -> bytes:
    """An ELF laid out as Linux is: high virtual addresses, a physical entry, a per-CPU segment at vaddr 0, bss."""
    high = 0xFFFF_FFFF_8000_0000 if bits == 64 else 0xC000_0000
    text = text or bytes(range(1, 250)) * 300
    data_at = (base + len(text) + 0xFFF) & -0x1000
    segments = [
        (base, high + base, text, len(text)),
        (data_at, 0, b"per-cpu " * 600, 4800),
        (data_at + 0x2000, high + data_at + 0x2000, b"data" * 1000, 0x4000),
    ]
    return make_elf(segments, base, bits=bits, notes=notes)


def compress(codec: str, data: bytes) -> bytes:
    """`data` as the kernel's build compresses it, with the size appended where that is done."""
    size = b"" if codec in ("gzip", "none") else struct.pack("<I", len(data))
    return COMPRESSORS[codec](data) + size


def lz4_legacy(data: bytes) -> bytes:
    """What `lz4 -l` writes: the magic, then blocks of 8 MiB each with its compressed size before it."""
    parts = [b"\x02\x21\x4c\x18"]
    for at in range(0, len(data), LZ4_BLOCK):
        block = lz4.block.compress(data[at : at + LZ4_BLOCK], store_size=False)
        parts += [struct.pack("<I", len(block)), block]
    return b"".join(parts)


_XZ_FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 0}]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=_XZ_FILTERS),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "bzip2": lambda data: bz2.compress(data, 1),
    "lz4": lz4_legacy,
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "none": bytes,
}
CODECS = tuple(COMPRESSORS)


def make_bzimage(payload: bytes = b"", *, code: bytes = b"", setup_sects: int = 3, **fields: int | bytes) -> bytes:
    """A bzImage of protocol 2.15 around `payload`; `fields` override the header's."""
    code = code or b"\xf4" * PAYLOAD_OFFSET + payload
    code += b"\0" * (-len(code) % 16)
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    header: dict[str, int | bytes] = {
        "setup_sects": setup_sects,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "magic": b"HdrS",
        "version": 0x20F,
        "loadflags": 1,
        "code32_start": 0x100000,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 2 * MIB,
        "relocatable_kernel": 1,
        "xloadflags": 3,
        "cmdline_size": 2047,
        "payload_offset": PAYLOAD_OFFSET if payload else 0,
        "payload_length": len(payload),
        "pref_address": 16 * MIB,
        "init_size": 8 * MIB,
    }
    for name, value in (header | fields).items():
        offset, form = FIELDS[name]
        struct.pack_into("<" + form, setup, offset, value)
    return bytes(setup) + code


def make_image(data: bytes) -> ImageFile:
    """`data` as a file named kernel."""
    return ImageFile("kernel", data)


def field(page: bytes, name: str) -> int:
    """A setup header field of a zero page (or of setup code)."""
    offset, form = FIELDS[name]
    value: int = struct.unpack_from("<" + form, page, offset)[0]
    return value
