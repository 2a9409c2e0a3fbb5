"""boot_params, the "zero page" by which a loader tells Linux about the machine. Layer: boot.

Sources: Documentation/arch/x86/boot.rst and zero-page.rst; struct boot_params in uapi asm/bootparam.h.
"""

from __future__ import annotations

import struct

from pykvm.boot.setup_header import HEADER_AT, LOADED_HIGH, MAGIC, MAGIC_AT
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions, ImageFile

SIZE = 4096
E820_MAX = 128

ACPI_RSDP_ADDR = 0x070
EXT_RAMDISK_IMAGE, EXT_RAMDISK_SIZE = 0x0C0, 0x0C4
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0

VID_MODE = 0x1FA
TYPE_OF_LOADER = 0x210
CODE32_START = 0x214
RAMDISK_IMAGE, RAMDISK_SIZE = 0x218, 0x21C
CMD_LINE_PTR = 0x228

UNDEFINED_LOADER = 0xFF
VID_MODE_NORMAL = 0xFFFF

Initrd = tuple[int, int]
NO_INITRD: Initrd = (0, 0)


def patch_header(page: bytearray, *, cmdline: int, initrd: Initrd, code32_start: int) -> None:
    """Fill in what boot.rst has a loader write. `page` is a zero page or setup code: offsets are equal.

    cmdline       GPA of the command line
    initrd        (GPA, size), NO_INITRD if there is none; the upper halves do not fit in a header
    code32_start  GPA of the protected-mode code
    """
    gpa, size = initrd
    struct.pack_into("<H", page, VID_MODE, VID_MODE_NORMAL)
    page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    struct.pack_into("<III", page, CODE32_START, code32_start, gpa & 0xFFFF_FFFF, size & 0xFFFF_FFFF)
    struct.pack_into("<I", page, CMD_LINE_PTR, cmdline)


def build_zero_page(
    image: ImageFile, header: bytes, options: BootOptions, *, initrd: Initrd, code32_start: int
) -> bytearray:
    """The page for a kernel with setup header `header`. ImageError if the memory map has over 128 entries."""
    if len(options.e820) > E820_MAX:
        raise image.error(f"the memory map has {len(options.e820)} entries; Linux takes {E820_MAX}")
    page = bytearray(SIZE)
    page[HEADER_AT : HEADER_AT + len(header)] = header
    patch_header(page, cmdline=layout.CMDLINE, initrd=initrd, code32_start=code32_start)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, options.rsdp)
    struct.pack_into("<II", page, EXT_RAMDISK_IMAGE, initrd[0] >> 32, initrd[1] >> 32)
    page[E820_ENTRIES] = len(options.e820)
    for index, entry in enumerate(options.e820):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    return page


def synthetic_header() -> bytes:
    """A setup header for a vmlinux, which has none: protocol 2.12, loaded high, nothing else promised."""
    page = bytearray(SIZE)
    struct.pack_into("<H", page, 0x1FE, 0xAA55)
    page[MAGIC_AT : MAGIC_AT + 4] = MAGIC
    struct.pack_into("<H", page, 0x206, 0x20C)
    page[0x211] = LOADED_HIGH
    struct.pack_into("<I", page, 0x238, layout.CMDLINE_MAX)
    return bytes(page[HEADER_AT:0x268])
