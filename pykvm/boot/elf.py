"""ELF: a small reader whose every bound is checked, and the loader of plain ELF kernels. Layer: boot.

A file is refused (ImageError) rather than half-read: whatever its headers say, time and memory are bounded by
the limits below and by the file's own size.

Source: System V gABI, chapters 4 and 5; AMD64 psABI for the 64-bit structures.
"""

from __future__ import annotations

import struct

from pykvm.boot.image import Boot
from pykvm.boot.placement import fits, ram_ranges
from pykvm.boot.rules import GDT_AREA, PAGE_TABLES, check_backed, check_clear, check_entry, refuse_options
from pykvm.x86.states import long_mode, protected_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.core.memory import GuestMemory

ELF_MAGIC = b"\x7fELF"
ET_NAMES = {1: "a relocatable object (link it first)", 4: "a core dump"}
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
SHT_NOBITS = 8

MAX_SEGMENTS = 1024  # kernels have about five; PN_XNUM (0xffff, "see section 0") is refused with the rest
MAX_SECTIONS = 0xFF00  # SHN_LORESERVE
LARGE_BSS = 1 << 20  # from here on giving pages back to the host is cheaper than filling them
MAX_NOTE_BYTES = 1 << 20  # of all PT_NOTE segments together; a kernel's notes are a few hundred bytes

_EHDR = {32: struct.Struct("<16xHHIIIIIHHHHHH"), 64: struct.Struct("<16xHHIQQQIHHHHHH")}
_PHDR = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
_SHDR = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}


class ElfSegment:
    """One program header. Offsets and sizes are bytes as the file states them: not yet checked."""

    __slots__ = ("align", "filesz", "flags", "memsz", "offset", "only_headers", "paddr", "type", "vaddr")

    def __init__(self, fields: Sequence[int], bits: int) -> None:
        self.only_headers = False
        if bits == 64:
            self.type, self.flags, self.offset, self.vaddr = fields[:4]
            self.paddr, self.filesz, self.memsz, self.align = fields[4:]
        else:
            self.type, self.offset, self.vaddr, self.paddr = fields[:4]
            self.filesz, self.memsz, self.flags, self.align = fields[4:]

    def __repr__(self) -> str:
        return f"<ElfSegment type {self.type} [{self.paddr:#x}, +{self.memsz:#x})>"


class ElfSection:
    """One section header (names are not resolved: nothing here needs them)."""

    __slots__ = ("addr", "fields", "offset", "size", "type")

    def __init__(self, fields: Sequence[int]) -> None:
        self.fields = tuple(fields)
        self.type = fields[1]
        self.addr, self.offset, self.size = fields[3:6]


class ElfNote:
    """One note: `name` without its NUL, `type`, and the `desc` bytes."""

    __slots__ = ("desc", "name", "type")

    def __init__(self, name: bytes, type: int, desc: bytes) -> None:
        self.name = name
        self.type = type
        self.desc = desc


class Elf:
    """A parsed file: `bits` 32 or 64, `machine` EM_386 or EM_X86_64, `entry` as in the header, `segments`."""

    __slots__ = ("_image", "bits", "entry", "machine", "segments", "shentsize", "shnum", "shoff", "shstrndx")

    def __init__(self, image: ImageFile, bits: int, machine: int, entry: int) -> None:
        self._image = image
        self.bits = bits
        self.machine = machine
        self.entry = entry
        self.segments: list[ElfSegment] = []
        self.shoff = self.shnum = self.shentsize = self.shstrndx = 0

    def loads(self) -> list[ElfSegment]:
        """The PT_LOAD segments that occupy memory, in order of physical address."""
        loads = [each for each in self.segments if each.type == PT_LOAD and each.memsz]
        return sorted(loads, key=lambda each: each.paddr)

    def notes(self) -> list[ElfNote]:
        """Every note of every PT_NOTE segment. ImageError if a segment or a note is truncated."""
        notes: list[ElfNote] = []
        budget = MAX_NOTE_BYTES
        for segment in self.segments:
            if segment.type == PT_NOTE:
                budget -= segment.filesz
                if budget < 0:
                    raise self._image.error(f"has more than {MAX_NOTE_BYTES} bytes of notes")
                notes += _parse_notes(self._image, segment)
        return notes

    def sections(self) -> list[ElfSection]:
        """The section headers; an empty list if there are none or the table is not all in the file."""
        shdr = _SHDR[self.bits]
        end = self.shoff + self.shnum * shdr.size
        if self.shentsize != shdr.size or not 0 < self.shnum < MAX_SECTIONS or end > len(self._image.data):
            return []
        table = memoryview(self._image.data)[self.shoff : end]
        return [ElfSection(fields) for fields in shdr.iter_unpack(table)]

    def pack_section(self, section: ElfSection, addr: int) -> bytes:
        """`section`'s header with its address replaced by `addr`."""
        return _SHDR[self.bits].pack(*section.fields[:3], addr, *section.fields[4:])

    def physical_entry(self) -> int:
        """The GPA of the entry point.

        The header's entry is a virtual address: where a segment's vaddr and paddr differ it is translated, as
        GRUB and QEMU do. An entry inside no virtual range is taken to be physical already, as linker scripts
        with ENTRY(start - KERNEL_BASE) have it. ImageError if it is in no segment at all.
        """
        for each in self.loads():
            if each.vaddr <= self.entry < each.vaddr + each.memsz:
                return self.entry - each.vaddr + each.paddr
        if any(each.paddr <= self.entry < each.paddr + each.memsz for each in self.loads()):
            return self.entry
        raise self._image.error(f"the entry point {self.entry:#x} is in no loaded segment")


def parse_elf(image: ImageFile) -> Elf:
    """Read the headers of an x86 executable. ImageError on anything else."""
    data = image.data
    if data[:4] != ELF_MAGIC:
        raise image.error("is not an ELF file")
    bits = {1: 32, 2: 64}.get(data[4] if len(data) > 4 else 0)
    if bits is None:
        raise image.error("has a wrong ELF class")
    header = _EHDR[bits]
    if len(data) < header.size:
        raise image.error(f"truncated ELF header: {len(data)} of {header.size} bytes")
    if data[5] != 1:
        raise image.error("is a big-endian ELF file; x86 is little-endian")
    fields = header.unpack_from(data)
    kind, machine, _version, entry, phoff, shoff, _flags, _ehsize, phentsize, phnum = fields[:10]
    if kind not in (ET_EXEC, ET_DYN):
        raise image.error(f"is {ET_NAMES.get(kind, f'of ELF type {kind}')}, not an executable")
    if machine not in (EM_386, EM_X86_64):
        raise image.error(f"is for ELF machine {machine}, not for x86 ({EM_386}) or x86-64 ({EM_X86_64})")
    elf = Elf(image, bits, machine, entry)
    elf.segments = _parse_segments(image, bits, phoff, phentsize, phnum)
    elf.shoff = shoff
    elf.shentsize, elf.shnum, elf.shstrndx = fields[10:]
    return elf


def _parse_segments(image: ImageFile, bits: int, phoff: int, phentsize: int, phnum: int) -> list[ElfSegment]:
    phdr = _PHDR[bits]
    if phnum == 0:
        return []
    if phnum > MAX_SEGMENTS:
        raise image.error(f"has {phnum} program headers; at most {MAX_SEGMENTS} are accepted")
    if phentsize != phdr.size:
        raise image.error(f"program headers of {phentsize} bytes; ELF{bits} has {phdr.size}")
    end = phoff + phnum * phdr.size
    if end > len(image.data):
        raise image.error(f"truncated: the program headers end at {end:#x}, the file at {len(image.data):#x}")
    table = memoryview(image.data)[phoff:end]
    segments = [ElfSegment(fields, bits) for fields in phdr.iter_unpack(table)]
    for each in segments:
        each.only_headers = each.offset == 0 and each.filesz == each.memsz <= end
    return segments


def _parse_notes(image: ImageFile, segment: ElfSegment) -> list[ElfNote]:
    end = segment.offset + segment.filesz
    if end > len(image.data):
        raise image.error(f"truncated: a note segment ends at {end:#x}, the file at {len(image.data):#x}")
    # 8 only for the notes of 64-bit .note.gnu.property; all else is aligned to 4, whatever the gABI says
    align = 8 if segment.align == 8 else 4
    notes: list[ElfNote] = []
    at = segment.offset
    while end - at >= 12:
        namesz, descsz, kind = struct.unpack_from("<III", image.data, at)
        name_at = at + 12
        desc_at = at + _align(12 + namesz, align)
        if desc_at + descsz > end:
            raise image.error(f"truncated: the note at {at:#x} runs past its segment")
        name = image.data[name_at : name_at + namesz].rstrip(b"\0")
        notes.append(ElfNote(name, kind, image.data[desc_at : desc_at + descsz]))
        at = desc_at + _align(descsz, align)
    return notes


def _align(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment


def check_segments(image: ImageFile, elf: Elf, ram: Sequence[tuple[int, int]]) -> list[ElfSegment]:
    """`elf.loads()`, each of them sane in itself and overlapping no other; else ImageError.

    GNU ld puts the file's own headers into a segment in front of -Ttext, for a kernel at 1 MiB onto the BIOS area.
    No kernel misses them there: such a segment is left out if it does not lie in `ram`.
    """
    loads = [each for each in elf.loads() if not each.only_headers or fits(ram, each.paddr, each.paddr + each.memsz)]
    if not loads:
        raise image.error("has no loadable segment")
    end_of_last = 0
    for each in loads:
        where = f"the segment at {each.paddr:#x}"
        if each.filesz > each.memsz:
            raise image.error(f"{where} has filesz {each.filesz:#x} > memsz {each.memsz:#x}")
        if each.offset + each.filesz > len(image.data):
            raise image.error(f"truncated: {where} ends at file offset {each.offset + each.filesz:#x}")
        if each.paddr + each.memsz > 1 << elf.bits:
            raise image.error(f"{where} of {each.memsz:#x} bytes wraps the address space")
        if each.paddr < end_of_last:
            raise image.error(f"{where} overlaps another segment")
        end_of_last = each.paddr + each.memsz
    return loads


def place_segments(
    memory: GuestMemory, image: ImageFile, elf: Elf, e820: Sequence[tuple[int, int, int]] = ()
) -> list[tuple[int, int]]:
    """Copy every PT_LOAD segment to its physical address and zero the rest of it.

    Returns the [start, end) GPAs, ascending. ImageError if a segment is malformed, overlaps another or lies
    outside the RAM that `e820` names (without one: outside guest memory); then nothing was written.
    """
    return copy_segments(memory, image, check_segments(image, elf, ram_ranges(memory, e820)), e820)


def copy_segments(
    memory: GuestMemory,
    image: ImageFile,
    segments: Sequence[ElfSegment],
    e820: Sequence[tuple[int, int, int]] = (),
    *,
    shift: int = 0,
) -> list[tuple[int, int]]:
    """What `place_segments` does, for segments that are checked already; each moves up by `shift` bytes."""
    ram = ram_ranges(memory, e820)
    ranges = [(each.paddr + shift, each.paddr + each.memsz + shift) for each in segments]
    for start, end in ranges:
        if not fits(ram, start, end):
            raise image.error(
                f"[{start:#x}, {end:#x}), where it must be loaded, is not all RAM ({memory.size >> 20} MiB in all)"
            )
    data = memoryview(image.data)
    for each in segments:
        gpa = each.paddr + shift
        memory.write(gpa, data[each.offset : each.offset + each.filesz])
        _clear(memory, gpa + each.filesz, gpa + each.memsz)
    return ranges


def _clear(memory: GuestMemory, start: int, end: int) -> None:
    if end - start < LARGE_BSS:
        memory.fill(start, end - start)
    else:
        from pykvm.boot.bulk import clear

        clear(memory, start, end)


def load_elf(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load an executable of no known boot protocol in the mode of its class.

    ELF32 starts in flat 32-bit protected mode, ELF64 in long mode with the first 4 GiB mapped to themselves; the
    segments go to their physical addresses (p_paddr). ImageError if anything about the file is wrong.
    """
    elf = parse_elf(image)
    if any(each.type == PT_INTERP for each in elf.segments):
        raise image.error("is a dynamically linked program, not a kernel")
    refuse_options(image, options, "a plain ELF file", "cmdline", "initrd", "modules", "load_addr")
    segments = check_segments(image, elf, ram_ranges(memory, options.e820))
    occupied = [(each.paddr, each.paddr + each.memsz) for each in segments]
    structures = (GDT_AREA, PAGE_TABLES) if elf.bits == 64 else (GDT_AREA,)
    check_backed(memory, image, structures)
    check_clear(image, occupied, structures)
    entry = elf.physical_entry() if options.entry is None else options.entry
    check_entry(memory, image, entry)
    copy_segments(memory, image, segments, options.e820)
    state = (long_mode if elf.bits == 64 else protected_flat)(memory, entry)
    return Boot(f"elf{elf.bits}", image.path, entry, state)
