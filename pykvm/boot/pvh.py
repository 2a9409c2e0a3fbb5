"""vmlinux ELF files: the PVH boot ABI, or the 64-bit and 32-bit boot protocols where there is no PVH note. Layer: boot.

Sources: Xen docs/misc/pvh.pandoc ("x86/HVM direct boot ABI"); Xen public/arch-x86/hvm/start_info.h;
Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import struct

from pykvm.boot import placement
from pykvm.boot.elf import parse_elf, place_segments
from pykvm.boot.image import Boot
from pykvm.boot.linux import FOUR_GIB, enter_kernel, place_initrd, require_low_ram
from pykvm.boot.rules import check_clear, encode_string, refuse_options
from pykvm.boot.setup_header import encode_cmdline
from pykvm.boot.zero_page import build_zero_page, synthetic_header
from pykvm.x86 import layout, states

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.elf import Elf
    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.boot.placement import Range
    from pykvm.core.memory import GuestMemory

XEN_ELFNOTE_GUEST_OS = 6
XEN_ELFNOTE_PHYS32_ENTRY = 18

START_MAGIC = 0x336E_C578  # "xEn3" with bit 7 of the E set
START_VERSION = 1  # has the memory map
_START_INFO = struct.Struct("<IIIIQQQQII")
_MEMMAP_ENTRY = struct.Struct("<QQII")
_MODULE_ENTRY = struct.Struct("<QQQQ")
TABLES_AT = layout.MULTIBOOT_INFO  # memory map, module list and the modules' command lines
TABLES_MAX = layout.CMDLINE - TABLES_AT

# from the GDT to the end of the command line
BOOT_AREA = (layout.BOOT_GDT, layout.CMDLINE + layout.CMDLINE_MAX + 1, "boot-time tables and parameters")

# what arch/x86/boot/header.S gives every kernel; a vmlinux cannot say otherwise
INITRD_LIMIT = 0x8000_0000
COMMAND_LINE_SIZE = 2047


def pvh_entry(elf: Elf) -> int | None:
    """The entry point that an XEN_ELFNOTE_PHYS32_ENTRY note names, None without one.

    The ABI says 4 bytes, Linux/x86-64 writes 8: the low 4 count. A shorter note is none.
    """
    for note in elf.notes():
        if note.name == b"Xen" and note.type == XEN_ELFNOTE_PHYS32_ENTRY and len(note.desc) >= 4:
            return int.from_bytes(note.desc[:4], "little")
    return None


def load_vmlinux(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load an ELF kernel, by its PVH note if it has one. `options.entry` overrides either entry point.

    protocol is pvh, vmlinux64 or vmlinux32. ImageError if the file, initrd or command line is broken or does
    not fit.
    """
    refuse_options(image, options, "a Linux kernel", "mode", "load_addr")
    elf = parse_elf(image)
    entry = pvh_entry(elf)
    ram = placement.ram_ranges(memory, options.e820)
    require_low_ram(image, ram)
    used = place_segments(memory, image, elf, options.e820)
    check_clear(image, used, [BOOT_AREA])
    if entry is None:
        return _load_by_boot_params(memory, image, elf, options, ram, used)
    entry = options.entry if options.entry is not None else entry
    _check_entry(image, entry, used)
    cmdline = encode_cmdline(image, options.cmdline, _cmdline_limit(elf))
    memory.write(layout.CMDLINE, cmdline)
    modules = _place_modules(memory, options, ram, used)
    _write_start_info(memory, image, options, modules)
    state = states.protected_flat(memory, entry, stack=0)
    state.gprs["rbx"] = layout.PVH_START_INFO
    return Boot("pvh", image.path, entry, state)


def _cmdline_limit(elf: Elf) -> int:
    """PVH has no limit, but Linux, which says who it is in another note, cuts what is longer than its own."""
    for note in elf.notes():
        if note.name == b"Xen" and note.type == XEN_ELFNOTE_GUEST_OS and note.desc.rstrip(b"\0") == b"linux":
            return COMMAND_LINE_SIZE
    return layout.CMDLINE_MAX


def _check_entry(image: ImageFile, entry: int, used: list[Range]) -> None:
    if entry >= FOUR_GIB or not placement.fits(used, entry, entry + 1):
        raise image.error(f"the entry point {entry:#x} is in no loaded segment below 4 GiB")


# -- PVH ------------------------------------------------------------------------------------------------------------


def _place_modules(
    memory: GuestMemory, options: BootOptions, ram: list[Range], used: list[Range]
) -> list[tuple[int, int, bytes]]:
    """(GPA, size, command line) of each: the initrd, which Linux wants first, then the other modules."""
    files = [(options.initrd, "")] if options.initrd else []
    files += [(each.image, each.cmdline) for each in options.modules]
    taken = list(used)
    placed: list[tuple[int, int, bytes]] = []
    for file, text in files:
        cmdline = encode_string(file, text) if text else b""
        gpa, size = place_initrd(memory, file, ram, taken, FOUR_GIB)
        taken.append((gpa, gpa + size))
        placed.append((gpa, size, cmdline))
    return placed


def _write_start_info(
    memory: GuestMemory, image: ImageFile, options: BootOptions, modules: list[tuple[int, int, bytes]]
) -> None:
    """hvm_start_info at layout.PVH_START_INFO, what it points to at TABLES_AT."""
    memmap = b"".join(_MEMMAP_ENTRY.pack(*entry, 0) for entry in options.e820)
    modlist_at = TABLES_AT + len(memmap)
    strings_at = modlist_at + len(modules) * _MODULE_ENTRY.size
    modlist = strings = b""
    for gpa, size, cmdline in modules:
        text_at = strings_at + len(strings) if cmdline else 0
        modlist += _MODULE_ENTRY.pack(gpa, size, text_at, 0)
        strings += cmdline
    tables = memmap + modlist + strings
    if len(tables) > TABLES_MAX:
        raise image.error(f"memory map and modules take {len(tables)} bytes of tables; {TABLES_MAX} are there")
    memory.write(TABLES_AT, tables)
    info = _START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,
        len(modules),
        modlist_at if modules else 0,
        layout.CMDLINE,
        options.rsdp,
        TABLES_AT if memmap else 0,
        len(options.e820),
        0,
    )
    memory.write(layout.PVH_START_INFO, info)


# -- no note: boot_params -------------------------------------------------------------------------------------------


def _load_by_boot_params(
    memory: GuestMemory,
    image: ImageFile,
    elf: Elf,
    options: BootOptions,
    ram: list[Range],
    used: list[Range],
) -> Boot:
    refuse_options(image, options, "a Linux kernel without a PVH note", "modules")
    entry = options.entry if options.entry is not None else elf.physical_entry()
    _check_entry(image, entry, used)
    cmdline = encode_cmdline(image, options.cmdline, COMMAND_LINE_SIZE)
    initrd = place_initrd(memory, options.initrd, ram, used, INITRD_LIMIT, beyond_limit=elf.bits == 64)
    page = build_zero_page(image, synthetic_header(), options, initrd=initrd, code32_start=used[0][0])
    memory.write(layout.ZERO_PAGE, page)
    memory.write(layout.CMDLINE, cmdline)
    state = enter_kernel(memory, elf.bits, entry)
    return Boot(f"vmlinux{elf.bits}", image.path, entry, state)
