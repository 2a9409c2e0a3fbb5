"""Multiboot 1. Layer: boot.

The header is looked for in the first 8 KiB of the file, at every multiple of 4, whatever the file's format. With
flag bit 16 the addresses in the header say what to load (the "a.out kludge": raw images, but ELF files too);
without it the file is ELF32, or ELF64 with a 32-bit entry point, which the specification does not mention but
GRUB and 64-bit kernels with a 32-bit start stub have made common.

Flag bit 2 asks for a video mode; the specification calls the mode a recommendation, and like GRUB and QEMU
without a display the loader starts the kernel and leaves the video fields of the information unset.

Strings are what kernels developed with `qemu -kernel` and GRUB 0.97 know: the file's path, a space, the arguments.

Source: Multiboot Specification version 0.6.96.
"""

from __future__ import annotations

import struct

from pykvm.boot.image import Boot
from pykvm.boot.mbinfo import (
    INFO_SIZE,
    LOADER_NAME,
    Payload,
    all_modules,
    elf_payload,
    find_room,
    lower_and_upper,
    memory_map,
    place_modules,
    place_payload,
    place_sections,
    raw_payload,
)
from pykvm.boot.rules import check_entry, encode_string, refuse_options
from pykvm.x86 import layout
from pykvm.x86.states import protected_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions, ImageFile, Module
    from pykvm.boot.placement import Range
    from pykvm.core.memory import GuestMemory

MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
SEARCH = 8192  # bytes that hold all of the header

WANT_ALIGNED, WANT_MEMORY, WANT_VIDEO, HAVE_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_REQUIRED = 0xFFFF  # flags 0 to 15 must be understood; 16 to 31 may be ignored
_UNDERSTOOD = WANT_ALIGNED | WANT_MEMORY | WANT_VIDEO

INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_ELF = 1 << 0, 1 << 2, 1 << 3, 1 << 5
INFO_MMAP, INFO_LOADER_NAME = 1 << 6, 1 << 9
# flags; mem_lower, mem_upper; cmdline; mods_count, mods_addr; syms; mmap_length, mmap_addr; boot_loader_name
_INFO = struct.Struct("<III4xIII4III12xI48x")  # up to the end of the framebuffer fields
NO_SYMBOLS = (0, 0, 0, 0)


def find_header(data: bytes) -> int | None:
    """The file offset of the multiboot header, or None."""
    magic = MAGIC.to_bytes(4, "little")
    at = data.find(magic, 0, SEARCH)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= min(len(data), SEARCH):
            _, flags, checksum = struct.unpack_from("<III", data, at)
            if (MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
                return at
        at = data.find(magic, at + 1, SEARCH)
    return None


def load_multiboot(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load a multiboot kernel and its modules; EAX and EBX as the specification says, flat protected mode."""
    header = find_header(image.data)
    if header is None:
        raise image.error("has no multiboot header in its first 8 KiB")
    refuse_options(image, options, "a multiboot kernel", "load_addr", "mode")
    payload = _payload(memory, image, options, header)
    if options.entry is not None:
        payload.entry = options.entry
    check_entry(memory, image, payload.entry)
    place_payload(memory, image, options, payload)
    modules = all_modules(options)
    placed = place_modules(memory, options, modules, payload.end)
    floor = placed[-1][1] if placed else payload.end
    symbols = _place_symbols(memory, image, options, payload, floor)
    area = _Area(image)
    _describe_machine(area, memory, options)
    _describe_boot(area, image, options, modules, placed)
    area.symbols = symbols
    memory.write(layout.MULTIBOOT_INFO, area.pack())
    state = protected_flat(memory, payload.entry)
    state.gprs |= {"rax": LOADER_MAGIC, "rbx": layout.MULTIBOOT_INFO}
    return Boot("multiboot", image.path, payload.entry, state)


def _payload(memory: GuestMemory, image: ImageFile, options: BootOptions, header: int) -> Payload:
    flags = struct.unpack_from("<I", image.data, header + 4)[0]
    unknown = flags & _REQUIRED & ~_UNDERSTOOD
    if unknown:
        raise image.error(f"its multiboot header requires unknown features (flags {unknown:#x})")
    if not flags & HAVE_ADDRESSES:
        return elf_payload(memory, image, options)
    if header + 32 > min(len(image.data), SEARCH):
        raise image.error("truncated multiboot header: its addresses are not in the first 8 KiB of the file")
    fields = struct.unpack_from("<5I", image.data, header + 12)
    header_addr, load_addr, load_end, bss_end, entry = fields
    if load_addr > header_addr:
        raise image.error(f"its multiboot load_addr {load_addr:#x} is above header_addr {header_addr:#x}")
    offset = header - (header_addr - load_addr)
    return raw_payload(image, offset, load_addr, load_end, bss_end, entry)


def _place_symbols(
    memory: GuestMemory, image: ImageFile, options: BootOptions, payload: Payload, floor: int
) -> tuple[int, int, int, int]:
    """num, size, addr and shndx of the ELF section header table in guest memory; all 0 without one."""
    elf = payload.elf
    if elf is None:
        return NO_SYMBOLS
    headers, floor = place_sections(memory, image, options, elf, floor)
    table = b"".join(headers)
    addr = find_room(memory, options, len(table), floor)
    if not table or addr is None:
        return NO_SYMBOLS
    memory.write(addr, table)
    return len(headers), elf.shentsize, addr, elf.shstrndx


class _Area:
    """The information structure and, behind it, what it points to; at most INFO_SIZE bytes together."""

    __slots__ = ("_image", "cmdline", "loader", "lower", "mmap", "mods", "symbols", "tail", "upper")

    def __init__(self, image: ImageFile) -> None:
        self._image = image
        self.tail = bytearray()
        self.lower = self.upper = self.cmdline = self.loader = 0
        self.mods = self.mmap = (0, 0)
        self.symbols = NO_SYMBOLS

    def add(self, data: bytes) -> int:
        """Append `data`; returns its GPA, a multiple of 4."""
        self.tail += bytes(-len(self.tail) % 4)
        offset = _INFO.size + len(self.tail)
        if offset + len(data) > INFO_SIZE:
            raise self._image.error(f"its command lines and memory map exceed {INFO_SIZE >> 10} KiB")
        self.tail += data
        return layout.MULTIBOOT_INFO + offset

    def pack(self) -> bytes:
        """The bytes for layout.MULTIBOOT_INFO."""
        flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME
        if self.symbols != NO_SYMBOLS:
            flags |= INFO_ELF
        fields = (self.cmdline, *self.mods, *self.symbols, *self.mmap, self.loader)
        return _INFO.pack(flags, self.lower, self.upper, *fields) + self.tail


def _describe_machine(area: _Area, memory: GuestMemory, options: BootOptions) -> None:
    area.lower, area.upper = lower_and_upper(memory, options)
    # the size in front of each entry does not count itself
    entries = [struct.pack("<IQQI", 20, *entry) for entry in memory_map(memory, options)]
    area.mmap = (len(entries) * 24, area.add(b"".join(entries)))


def _describe_boot(
    area: _Area, image: ImageFile, options: BootOptions, modules: list[Module], placed: list[Range]
) -> None:
    area.loader = area.add(LOADER_NAME)
    area.cmdline = area.add(_string(image, options.cmdline))
    table = b""
    for module, (start, end) in zip(modules, placed, strict=True):
        table += struct.pack("<IIII", start, end, area.add(_string(module.image, module.cmdline)), 0)
    area.mods = (len(modules), area.add(table))


def _string(image: ImageFile, arguments: str) -> bytes:
    return encode_string(image, f"{image.path} {arguments}" if arguments else image.path)
