"""The 16-bit boot protocol: setup code entered in real mode. Layer: boot.

For images that have no other way in (SetupHeader.protocol has the rule): kernels before protocol 2.06, zImages,
ipxe.lkrn. The setup code lies at 0x90000, where every one of them may be, and runs as 9020:0000 after the start code
of a small BIOS (bios16), which it calls for the memory map and for its console.

Source: Documentation/arch/x86/boot.rst, "Memory Layout of The Real-Mode Code" and "Running the Kernel".
"""

from __future__ import annotations

import struct

from pykvm.boot import bios16, placement
from pykvm.boot.bulk import clear
from pykvm.boot.linux import LinuxBoot, place_initrd
from pykvm.boot.rules import check_ram
from pykvm.boot.setup_header import CAN_USE_HEAP, encode_cmdline
from pykvm.boot.zero_page import patch_header
from pykvm.x86 import layout, states

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions
    from pykvm.boot.setup_header import SetupHeader
    from pykvm.core.memory import GuestMemory
    from pykvm.x86.segments import CpuState

SETUP_BASE = 0x90000
SETUP_MAX = 0x8000  # stack and heap begin there
HEAP_END = 0x9800
CMDLINE = SETUP_BASE + HEAP_END
CMDLINE_MAX = 0x7FF
SETUP_END = CMDLINE + CMDLINE_MAX + 1  # 0x9a000: above it firmware may have put its data
ZIMAGE_BASE = 0x10000

LOADFLAGS, HEAP_END_PTR = 0x211, 0x224


def load_linux16(memory: GuestMemory, header: SetupHeader, options: BootOptions) -> LinuxBoot:
    """Load setup code, kernel, initrd, command line and the BIOS. ImageError if something does not fit."""
    image = header.image
    ram = placement.ram_ranges(memory, options.e820)
    cmdline = encode_cmdline(image, options.cmdline, min(header.cmdline_size, CMDLINE_MAX))
    if header.setup_bytes > SETUP_MAX:
        raise image.error(f"has {header.setup_bytes} bytes of setup code; real mode has room for {SETUP_MAX}")
    code = header.code
    load = layout.KERNEL_BASE if header.loaded_high else ZIMAGE_BASE
    if not header.loaded_high and len(code) > SETUP_BASE - ZIMAGE_BASE:
        raise image.error(f"is a zImage of {len(code)} bytes: too large for low memory")
    for start, end in ((SETUP_BASE, SETUP_END), (load, load + len(code))):
        check_ram(memory, image, (start, end), options.e820)
    bios16.install(memory, image, ram, options.e820)
    memory.write(load, code)
    used = [(load, load + len(code))]
    initrd = place_initrd(memory, options.initrd, ram, used, header.initrd_limit)
    setup = bytearray(image.data[: header.setup_bytes])
    # code32_start stays: a zImage has moved itself to 0x1000 by the time it jumps there
    patch_header(setup, cmdline=CMDLINE, initrd=initrd, code32_start=header.code32_start)
    setup[LOADFLAGS] |= CAN_USE_HEAP
    struct.pack_into("<H", setup, HEAP_END_PTR, HEAP_END - 0x200)
    clear(memory, SETUP_BASE, SETUP_END)
    memory.write(SETUP_BASE, setup)
    memory.write(CMDLINE, cmdline)
    entry = (bios16.SEGMENT << 4) + bios16.START
    return LinuxBoot("linux16", image.path, entry, _state(), "it is entered in real mode")


def _state() -> CpuState:
    segment = SETUP_BASE >> 4
    state = states.real_mode(bios16.SEGMENT, bios16.START, ss=segment, sp=HEAP_END)
    for each in state.data_segments:
        each.selector, each.base = segment, SETUP_BASE
    return state
