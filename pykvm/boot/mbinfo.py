"""What multiboot 1 and 2 have in common: placing the image and its modules, the memory map. Layer: boot.

Source: Multiboot Specification 0.6.96 and Multiboot2 Specification 2.0, which use the same rules here.
"""

from __future__ import annotations

from pykvm.boot.elf import PT_LOAD, SHT_NOBITS, ElfSegment, check_segments, copy_segments, parse_elf
from pykvm.boot.image import E820_RAM, E820_RESERVED, Module
from pykvm.boot.placement import ram_ranges
from pykvm.boot.rules import GDT_AREA, check_backed, check_clear
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.boot.elf import Elf, ElfSection
    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.boot.placement import Range
    from pykvm.core.memory import GuestMemory

LOADER_NAME = b"pykvm\0"
INFO_SIZE = 0x10000
INFO_AREA = (layout.MULTIBOOT_INFO, layout.MULTIBOOT_INFO + INFO_SIZE, "the multiboot information")
PAGE = 4096
SECTION_ALIGN = 64  # at least what any symbol or debug section asks for
_4GIB = 1 << 32


class Payload:
    """The parts of a kernel to load, at the addresses it was linked for; `elf` is None for a raw image."""

    __slots__ = ("elf", "entry", "segments")

    def __init__(self, segments: Sequence[ElfSegment], entry: int, elf: Elf | None = None) -> None:
        self.segments = segments
        self.entry = entry
        self.elf = elf

    @property
    def start(self) -> int:
        """The lowest address."""
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        """First address past the highest one."""
        return max(each.paddr + each.memsz for each in self.segments)


def elf_payload(memory: GuestMemory, image: ImageFile, options: BootOptions, entry: int | None = None) -> Payload:
    """The image by its ELF program headers; `entry` overrides the header's.

    ELF64 is accepted as GRUB accepts it: the entry is 32-bit code below 4 GiB, and so is every segment.
    """
    elf = parse_elf(image)
    segments = check_segments(image, elf, ram_ranges(memory, options.e820))
    if segments[-1].paddr + segments[-1].memsz > _4GIB:
        raise image.error("has a segment above 4 GiB, which a multiboot loader cannot fill")
    return Payload(segments, elf.physical_entry() if entry is None else entry, elf)


def raw_payload(image: ImageFile, offset: int, load_addr: int, load_end: int, bss_end: int, entry: int) -> Payload:
    """The image by the addresses in its multiboot header (the "a.out kludge"), whatever the file's format.

    `offset` is where loading starts in the file; `load_end` 0 means up to the file's end, `bss_end` 0 no bss.
    """
    if offset < 0:
        raise image.error("its multiboot header_addr and load_addr point before the start of the file")
    filesz = load_end - load_addr if load_end else len(image.data) - offset
    if filesz < 0:
        raise image.error(f"its multiboot load_end_addr {load_end:#x} is below load_addr {load_addr:#x}")
    if offset + filesz > len(image.data):
        raise image.error(f"truncated: its multiboot header asks for {offset + filesz} bytes")
    end = bss_end or load_addr + filesz
    if end < load_addr + filesz:
        raise image.error(f"its multiboot bss_end_addr {bss_end:#x} is below the end of the loaded data")
    if not load_addr < end <= _4GIB:
        raise image.error("its multiboot header asks for nothing to load, or for more than 4 GiB hold")
    if not load_addr <= entry < end:
        raise image.error(f"the entry point {entry:#x} is not in the loaded image")
    fields = (PT_LOAD, 0, offset, load_addr, load_addr, filesz, end - load_addr, 1)
    return Payload([ElfSegment(fields, 64)], entry)


def place_payload(
    memory: GuestMemory, image: ImageFile, options: BootOptions, payload: Payload, *, shift: int = 0
) -> list[Range]:
    """Copy the payload, moved up by `shift`, into RAM that holds nothing else; returns what it occupies."""
    ranges = [(each.paddr + shift, each.paddr + each.memsz + shift) for each in payload.segments]
    check_backed(memory, image, (GDT_AREA, INFO_AREA))
    check_clear(image, ranges, (GDT_AREA, INFO_AREA))
    return copy_segments(memory, image, payload.segments, options.e820, shift=shift)


def all_modules(options: BootOptions) -> list[Module]:
    """The modules in order; the initial RAM disk is the first."""
    initrd = [Module(options.initrd)] if options.initrd is not None else []
    return [*initrd, *options.modules]


def place_modules(memory: GuestMemory, options: BootOptions, modules: Iterable[Module], floor: int) -> list[Range]:
    """Copy each module to the lowest free page at or above `floor`; returns where they are, ascending.

    Lowest, because a kernel that maps only its first megabytes must reach them; GRUB and QEMU do the same.
    """
    placed: list[Range] = []
    for module in modules:
        data = module.image.data
        start = find_room(memory, options, len(data), floor)
        if start is None:
            total = memory.size >> 20
            raise module.image.error(f"no room for {len(data)} bytes above the kernel in {total} MiB of memory")
        memory.write(start, data)
        placed.append((start, start + len(data)))
        floor = start + max(len(data), 1)
    return placed


def find_room(
    memory: GuestMemory,
    options: BootOptions,
    size: int,
    floor: int,
    *,
    limit: int = layout.PCI_HOLE,
    align: int = PAGE,
) -> int | None:
    """The lowest multiple of `align` above 1 MiB and `floor` where `size` bytes of RAM end at or below `limit`."""
    floor = max(layout.KERNEL_BASE, floor)
    for low, high in ram_ranges(memory, options.e820):
        start = _align_up(max(low, floor), align)
        if start + max(size, 1) <= min(high, limit):
            return start
    return None


def memory_map(memory: GuestMemory, options: BootOptions) -> list[tuple[int, int, int]]:
    """(base, size, type) of the machine: the e820 given, or what the memory slots say."""
    if options.e820:
        return list(options.e820)
    return [
        (slot.gpa, slot.size, E820_RESERVED if slot.readonly else E820_RAM)
        for slot in sorted(memory.slots, key=lambda each: each.gpa)
    ]


def lower_and_upper(memory: GuestMemory, options: BootOptions) -> tuple[int, int]:
    """KiB of RAM from address 0 (640 at most), and from 1 MiB up to the first hole."""
    lower = upper = 0
    for start, end in ram_ranges(memory, options.e820):
        if start == 0:
            lower = min(end, layout.LOW_RAM_END) >> 10
        if start <= layout.KERNEL_BASE < end:
            upper = min(end - layout.KERNEL_BASE >> 10, 0xFFFF_FFFF)
    return lower, upper


def place_sections(
    memory: GuestMemory, image: ImageFile, options: BootOptions, elf: Elf, floor: int
) -> tuple[list[bytes], int]:
    """The ELF section headers, with every section that no segment holds (symbols, debug data) loaded above `floor`.

    The second value is the floor for what comes next. Symbols are a gift to the kernel, not its due: a table
    that is damaged, or too big for memory, gives no headers.
    """
    nothing: tuple[list[bytes], int] = ([], floor)
    sections = elf.sections()
    wanted = [each for each in sections if _is_unloaded(each)]
    # honest sections share no bytes, so together they are no larger than the file
    if sum(each.size for each in wanted) > len(image.data):
        return nothing
    if any(each.offset + each.size > len(image.data) for each in wanted):
        return nothing
    block = find_room(memory, options, sum(_align_up(each.size, SECTION_ALIGN) for each in wanted), floor)
    if block is None:
        return nothing
    headers = []
    data = memoryview(image.data)
    for each in sections:
        addr = each.addr
        if _is_unloaded(each):
            addr = block
            memory.write(addr, data[each.offset : each.offset + each.size])
            block += _align_up(each.size, SECTION_ALIGN)
        headers.append(elf.pack_section(each, addr))
    return headers, block


def _is_unloaded(section: ElfSection) -> bool:
    return section.addr == 0 and section.size > 0 and section.type not in (0, SHT_NOBITS)


def _align_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment
