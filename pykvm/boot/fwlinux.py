"""A bzImage for a firmware to boot (QEMU's Linux option ROM, qboot, OVMF): the parts that go into fw_cfg. Layer: boot.

The firmware copies each part to its address and enters the setup code in real mode (OVMF takes the 64-bit or EFI entry
instead), so the setup header is filled in here. Addresses are QEMU's, because firmware relies on some of them.

Source: Documentation/arch/x86/boot.rst, "Memory Layout of The Real-Mode Code"; QEMU, hw/i386/x86-common.c.
"""

from __future__ import annotations

import struct

from pykvm.boot import placement
from pykvm.boot.image import E820_RAM
from pykvm.boot.setup_header import CAN_USE_HEAP, SetupHeader, encode_cmdline
from pykvm.boot.zero_page import NO_INITRD, patch_header
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.boot.image import ImageFile
    from pykvm.boot.placement import Range

    Part = tuple[int, bytes]

SETUP, CMDLINE = 0x10000, 0x20000
HEAP_END = CMDLINE - SETUP - 0x200  # boot.rst wants it 0x200 below the end of setup code, heap and stack
LOADFLAGS, HEAP_END_PTR = 0x211, 0x224
FIRMWARE_TABLES = 256 * layout.KIB  # firmware keeps ACPI tables at the top of RAM below 4 GiB


def split_for_firmware(
    image: ImageFile,
    *,
    cmdline: str,
    initrd: ImageFile | None,
    e820: Iterable[tuple[int, int, int]],
) -> dict[str, Part]:
    """The arguments of FwCfg.add_linux: setup, kernel, cmdline and initrd, each as (GPA, bytes).

    Raises ImageError if the image is no bzImage or a part does not fit.
    """
    header = SetupHeader(image)
    if not header.loaded_high:
        raise image.error("is a zImage: firmware boots bzImages only")
    if header.setup_bytes > HEAP_END:
        raise image.error(f"has {header.setup_bytes} bytes of setup code; there is room for {HEAP_END}")
    text = encode_cmdline(image, cmdline, min(header.cmdline_size, layout.CMDLINE_MAX))
    kernel = (layout.KERNEL_BASE, bytes(header.code))
    ram = [(base, base + size) for base, size, kind in e820 if kind == E820_RAM and base < layout.HIGH_RAM]
    kernel_end = kernel[0] + len(kernel[1])
    if not placement.fits(placement.merge(ram), kernel[0], kernel_end):
        raise image.error(f"does not fit into RAM: its code would end at {kernel_end:#x}")
    ramdisk = _place_initrd(initrd, header, kernel_end, ram)
    setup = bytearray(image.data[: header.setup_bytes])
    where = (ramdisk[0], len(ramdisk[1])) if ramdisk[1] else NO_INITRD
    patch_header(setup, cmdline=CMDLINE, initrd=where, code32_start=header.code32_start)
    setup[LOADFLAGS] |= CAN_USE_HEAP
    struct.pack_into("<H", setup, HEAP_END_PTR, HEAP_END)
    return {"setup": (SETUP, bytes(setup)), "kernel": kernel, "cmdline": (CMDLINE, text), "initrd": ramdisk}


def _place_initrd(initrd: ImageFile | None, header: SetupHeader, kernel_end: int, ram: Sequence[Range]) -> Part:
    """As high as the kernel's limit, 4 GiB and the firmware's own tables allow."""
    if initrd is None or not initrd.data:
        return (0, b"")
    used = [(0, max(kernel_end, layout.KERNEL_BASE + header.init_size))]
    limit = min(header.initrd_limit, max(end for _, end in ram) - FIRMWARE_TABLES)
    gpa = placement.highest_fit(ram, used, len(initrd.data), limit=limit)
    if gpa is None:
        raise initrd.error(f"the initial RAM disk of {len(initrd.data)} bytes does not fit below {limit:#x}")
    return (gpa, initrd.data)
