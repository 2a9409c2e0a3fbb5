"""Multiboot 2. Layer: boot.

The header is looked for in the first 32 KiB, at every multiple of 8. A header tag that is not marked optional must
be understood and granted, or the file is refused; the EFI tags are understood and, as the specification has it for
a machine without EFI, change nothing. ELF64 files start in 32-bit protected mode like all others (machine state
i386), as GRUB does it.

Strings are what the protocol's only wide-spread loader, GRUB 2, passes: the arguments, without the file's path.

Source: Multiboot2 Specification version 2.0, chapter 3.
"""

from __future__ import annotations

import struct

from pykvm.boot.image import Boot
from pykvm.boot.mbinfo import (
    INFO_AREA,
    INFO_SIZE,
    LOADER_NAME,
    PAGE,
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
from pykvm.boot.placement import fits, highest_fit, overlapping, ram_ranges
from pykvm.boot.rules import GDT_AREA, check_entry, encode_string, refuse_options
from pykvm.x86 import layout
from pykvm.x86.states import protected_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions, ImageFile, Module
    from pykvm.boot.placement import Range
    from pykvm.core.memory import GuestMemory

MAGIC = 0xE85250D6
LOADER_MAGIC = 0x36D76289
SEARCH = 32768
ARCHITECTURE_I386 = 0
OPTIONAL = 1  # tag flag

# header tags
END, REQUEST, ADDRESS, ENTRY, CONSOLE, FRAMEBUFFER, MODULE_ALIGN = 0, 1, 2, 3, 4, 5, 6
EFI_BOOT_SERVICES, EFI_I386_ENTRY, EFI_AMD64_ENTRY, RELOCATABLE = 7, 8, 9, 10
_LENGTHS = {REQUEST: 8, ADDRESS: 24, ENTRY: 12, CONSOLE: 12, RELOCATABLE: 24}  # at least, with type and size
# granted without doing anything: a display mode is a recommendation, modules are always page-aligned, no EFI here
_NO_ACTION = (FRAMEBUFFER, MODULE_ALIGN, EFI_BOOT_SERVICES, EFI_I386_ENTRY, EFI_AMD64_ENTRY)
CONSOLE_REQUIRED = 1

# information tags
CMDLINE, LOADER, MODULE, MEMINFO, MMAP, ELF_SECTIONS, ACPI_OLD, ACPI_NEW, LOAD_BASE = 1, 2, 3, 4, 6, 9, 14, 15, 21
_ALWAYS = (CMDLINE, LOADER, MODULE, MEMINFO, MMAP, LOAD_BASE)

LOWEST, HIGHEST = 1, 2  # preferences of the relocatable tag
LOAD_FROM_START = 0xFFFF_FFFF


class Header:
    """What a header's tags ask for; None where there is no such tag."""

    __slots__ = ("address", "at", "entry", "relocatable", "requests")

    def __init__(self, at: int) -> None:
        self.at = at
        self.requests: list[int] = []  # information tag types that must be provided
        self.address: tuple[int, ...] | None = None  # header_addr, load_addr, load_end_addr, bss_end_addr
        self.entry: int | None = None
        self.relocatable: tuple[int, ...] | None = None  # min_addr, max_addr, align, preference


def find_header(data: bytes) -> int | None:
    """The file offset of the multiboot 2 header, or None."""
    magic = MAGIC.to_bytes(4, "little")
    at = data.find(magic, 0, SEARCH)
    while at >= 0:
        if at % 8 == 0 and at + 16 <= min(len(data), SEARCH):
            fields = struct.unpack_from("<4I", data, at)
            if sum(fields) & 0xFFFF_FFFF == 0:
                return at
        at = data.find(magic, at + 1, SEARCH)
    return None


def load_multiboot2(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load a multiboot 2 kernel and its modules; EAX and EBX as the specification says, flat protected mode."""
    at = find_header(image.data)
    if at is None:
        raise image.error("has no multiboot 2 header in its first 32 KiB")
    refuse_options(image, options, "a multiboot 2 kernel", "load_addr", "mode")
    header = parse_header(image, at)
    rsdp_tags = _rsdp_tags(memory, options)
    payload = _payload(memory, image, options, header)
    _check_requests(image, header, payload, [kind for kind, _ in rsdp_tags])
    base = _choose_base(memory, image, options, header, payload)
    shift = base - payload.start
    entry = payload.entry + shift if options.entry is None else options.entry
    check_entry(memory, image, entry)
    place_payload(memory, image, options, payload, shift=shift)
    modules = all_modules(options)
    placed = place_modules(memory, options, modules, payload.end + shift)
    tags = [
        *_boot_tags(image, options, modules, placed),
        *_machine_tags(memory, options),
        *rsdp_tags,
        (LOAD_BASE, struct.pack("<I", base)),
    ]
    floor = placed[-1][1] if placed else payload.end + shift
    tags += _symbol_tags(memory, image, options, payload, floor, room=INFO_SIZE - len(_pack(tags)))
    information = _pack(tags)
    if len(information) > INFO_SIZE:
        raise image.error(f"its command lines and memory map exceed {INFO_SIZE >> 10} KiB")
    memory.write(layout.MULTIBOOT_INFO, information)
    state = protected_flat(memory, entry)
    state.gprs |= {"rax": LOADER_MAGIC, "rbx": layout.MULTIBOOT_INFO}
    return Boot("multiboot2", image.path, entry, state)


# -- the header ----------------------------------------------------------------------------------------------


def parse_header(image: ImageFile, at: int) -> Header:
    """Read the header at file offset `at`. ImageError if it is malformed or requires what is not known here."""
    _, architecture, length, _ = struct.unpack_from("<4I", image.data, at)
    if architecture != ARCHITECTURE_I386:
        raise image.error(f"its multiboot 2 header is for architecture {architecture}, not for i386 (0)")
    end = at + length
    if length < 16 or end > min(len(image.data), SEARCH):
        raise image.error(f"its multiboot 2 header of {length} bytes is not all in the first 32 KiB of the file")
    header = Header(at)
    tag = at + 16
    while end - tag >= 8:
        kind, flags, size = struct.unpack_from("<HHI", image.data, tag)
        if kind == END:
            break
        if size < _LENGTHS.get(kind, 8) or tag + size > end:
            raise image.error(f"its multiboot 2 header tag {kind} has a wrong size ({size})")
        _parse_tag(image, header, kind, flags, image.data[tag + 8 : tag + size])
        tag += (size + 7) & -8
    return header


def _parse_tag(image: ImageFile, header: Header, kind: int, flags: int, body: bytes) -> None:
    required = not flags & OPTIONAL
    if kind == REQUEST:
        if required:
            header.requests += struct.unpack_from(f"<{len(body) // 4}I", body)
    elif kind == ADDRESS:
        header.address = struct.unpack_from("<4I", body)
    elif kind == ENTRY:
        header.entry = struct.unpack_from("<I", body)[0]
    elif kind == CONSOLE:
        if required and body[0] & CONSOLE_REQUIRED:
            raise image.error("requires a text or graphics console (multiboot 2 tag 4), and there is no display")
    elif kind == RELOCATABLE:
        header.relocatable = struct.unpack_from("<4I", body)
    elif kind not in _NO_ACTION and required:
        raise image.error(f"its multiboot 2 header requires tag {kind}, which is not supported")


def _check_requests(image: ImageFile, header: Header, payload: Payload, rsdp_tags: list[int]) -> None:
    granted = {*_ALWAYS, *rsdp_tags}
    if payload.elf is not None:
        granted.add(ELF_SECTIONS)
    missing = sorted(set(header.requests) - granted)
    if missing:
        raise image.error(f"requires multiboot 2 information that this machine has not: tags {missing}")


def _payload(memory: GuestMemory, image: ImageFile, options: BootOptions, header: Header) -> Payload:
    if header.address is None:
        return elf_payload(memory, image, options, header.entry)
    header_addr, load_addr, load_end, bss_end = header.address
    if header.entry is None:
        raise image.error("its multiboot 2 header has an address tag without an entry address tag")
    if load_addr == LOAD_FROM_START:
        load_addr = header_addr - header.at
        if load_addr < 0:
            raise image.error(f"its multiboot 2 header_addr {header_addr:#x} is below the header's file offset")
    if load_addr > header_addr:
        raise image.error(f"its multiboot 2 load_addr {load_addr:#x} is above header_addr {header_addr:#x}")
    offset = header.at - (header_addr - load_addr)
    return raw_payload(image, offset, load_addr, load_end, bss_end, header.entry)


def _choose_base(memory: GuestMemory, image: ImageFile, options: BootOptions, header: Header, payload: Payload) -> int:
    """Where the payload's first byte goes: where it was linked, unless it is relocatable and has to or asks to move."""
    if header.relocatable is None:
        return payload.start
    low, high, align, preference = header.relocatable
    align = align or 1
    if align & (align - 1):
        raise image.error(f"its multiboot 2 relocatable tag has an alignment of {align}, no power of two")
    size = payload.end - payload.start
    ram = ram_ranges(memory, options.e820)
    linked = (payload.start, payload.end)
    clear = not any(overlapping([linked], start, end) for start, end, _ in (GDT_AREA, INFO_AREA))
    allowed = low <= payload.start and payload.end - 1 <= high and payload.start % align == 0
    if preference not in (LOWEST, HIGHEST) and allowed and clear and fits(ram, *linked):
        return payload.start
    floor, limit = max(low, layout.KERNEL_BASE), min(high + 1, layout.PCI_HOLE)
    align = max(align, PAGE)
    if preference == HIGHEST:
        base = highest_fit(ram, [(0, floor)], size, align=align, limit=limit)
    else:
        base = find_room(memory, options, size, floor, limit=limit, align=align)
    if base is None:
        raise image.error(f"no RAM for its {size:#x} bytes in [{low:#x}, {high:#x}], where it may be loaded")
    return base


# -- the information -----------------------------------------------------------------------------------------


def _boot_tags(
    image: ImageFile, options: BootOptions, modules: list[Module], placed: list[Range]
) -> list[tuple[int, bytes]]:
    tags = [(CMDLINE, encode_string(image, options.cmdline)), (LOADER, LOADER_NAME)]
    for module, span in zip(modules, placed, strict=True):
        tags.append((MODULE, struct.pack("<II", *span) + encode_string(module.image, module.cmdline)))
    return tags


def _machine_tags(memory: GuestMemory, options: BootOptions) -> list[tuple[int, bytes]]:
    entries = [struct.pack("<QQII", *entry, 0) for entry in memory_map(memory, options)]
    return [
        (MEMINFO, struct.pack("<II", *lower_and_upper(memory, options))),
        (MMAP, struct.pack("<II", 24, 0) + b"".join(entries)),
    ]


def _rsdp_tags(memory: GuestMemory, options: BootOptions) -> list[tuple[int, bytes]]:
    """Copies of the RSDP: its ACPI 1.0 part if that has an RSDT, and all of it from revision 2 on (ACPI 5.2.5.3)."""
    if not options.rsdp or not memory.contains(options.rsdp, 36):
        return []
    rsdp = memory.read(options.rsdp, 36)
    if rsdp[:8] != b"RSD PTR ":
        return []
    old = [(ACPI_OLD, rsdp[:20])] if rsdp[16:20] != bytes(4) else []
    return [*old, (ACPI_NEW, rsdp)] if rsdp[15] >= 2 else old


def _symbol_tags(
    memory: GuestMemory, image: ImageFile, options: BootOptions, payload: Payload, floor: int, *, room: int
) -> list[tuple[int, bytes]]:
    """The ELF sections tag, if the file has sections and their headers fit in `room` bytes."""
    elf = payload.elf
    if elf is None or elf.shnum * elf.shentsize + 32 > room:
        return []
    headers, _ = place_sections(memory, image, options, elf, floor)
    if not headers:
        return []
    return [(ELF_SECTIONS, struct.pack("<III", len(headers), elf.shentsize, elf.shstrndx) + b"".join(headers))]


def _pack(tags: list[tuple[int, bytes]]) -> bytes:
    """The information structure: total size, then each tag at a multiple of 8, then the end tag."""
    parts = bytearray()
    for kind, body in [*tags, (END, b"")]:
        parts += struct.pack("<II", kind, 8 + len(body)) + body
        parts += bytes(-len(parts) % 8)
    return struct.pack("<II", len(parts) + 8, 0) + parts
