"""A real-mode BIOS of the least size: what the 16-bit boot protocol may call. Layer: boot.

It has the vectors, the BIOS data area, the two interrupt controllers and the timer set up; INT 10h prints on COM1,
INT 15h gives the memory map, INT 16h reads COM1, INT 1Ah counts ticks; the rest answers "unsupported" by the carry
flag. CODE is bios16.S, assembled; its first words are for the machine's memory sizes and `install` writes them.

Source: Ralf Brown's Interrupt List (INT 10h to 1Ah, memory 0040h); ACPI 6.5, 15.1 (INT 15h, E820h).
"""

from __future__ import annotations

import struct

from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.boot.image import ImageFile
    from pykvm.boot.placement import Range
    from pykvm.core.memory import GuestMemory

SEGMENT, OFFSET = 0xF000, 0xE000
BASE = layout.BIOS16  # = SEGMENT:OFFSET, in the BIOS area above the ACPI and MP tables
END = BASE + 0x1000

CODE = bytes.fromhex("""
    0000000000000000000000000000000091e0a0e0a0e0a0e0a0e0a0e0a0e0a0e0c4e0fde007e1b0e0b0e011e19ce1b0e0
    eae1eae1f8e1a6e0a6e0a6e0a6e0a6e0a6e0a7e046e0b011e620e6a0b008e621b070e6a1b004e621b002e6a1b001e621
    e6a1b0fae621b0ffe6a1b034e64330c0e640e640bafb03b080eebaf803b001ee42fec8eebafb03b003ee42eeea000020
    901e5031c08ed866ff066c04cd1c581f50b020e62058cf50b020e6a0e62058cfb4865589e5804e06015dcf5589e58066
    06fe5dcf80fc0e741f80fc0f741480fc03740980fc0875ceb82007cfb9070631d2cfb8035030ffcf525150bafd0331c9
    eca820e1fbbaf80358ee595acf1e31c08ed8a110041fcf1e31c08ed8a113041fcf3d20e874373d01e8742280fc887416
    80fc24758b30e43c0272907704b001eb8abb0300eb852ea102e0e97eff2ea104e02e8b1e06e089c189dae96eff6681fa
    50414d530f8558ff6683f9140f8250ff2e660fb70e00e06639cb0f8342ff1e56570e1f6bf31481c614e2b90a00fcf3a5
    5f5e1f432e3b1e00e0720231db66b850414d5366b914000000e91fff80e4ef80fc017205741331c0cffbe81e007503f4
    ebf72ec60608e000cf5589e5804e0640e808007404806606bf5dcf30e42ea008e084c0751452bafd03ec2401740abaf8
    03ec2ea208e084c05ac3b006baf90ceeb0fee664faf4ebfd84e40f85b4fe1e31c98ed98b166c048b0e6e0430c01fe9aa
    fe8d7400
""")

_HANDLERS_AT = 0x10
_HANDLERS = struct.unpack_from("<27H", CODE, _HANDLERS_AT)  # vectors 08h to 1Fh, others, IRQ 8 to 15, start
START = _HANDLERS[26]  # the IP where the CPU begins; it goes on at 9020:0000
_E820_MAX = (END - BASE - len(CODE)) // 20

_EBDA_SEGMENT_AT, _EQUIPMENT_AT, _BASE_MEMORY_AT = 0x40E, 0x410, 0x413
_VIDEO_AT, _ROWS_AT = 0x449, 0x484
_EQUIPMENT = 0x0220  # one serial port, 80x25 colour


def install(memory: GuestMemory, image: ImageFile, ram: Sequence[Range], e820: Sequence[tuple[int, int, int]]) -> None:
    """Put code, vectors and data area into guest memory. ImageError if there is no memory for them."""
    slot = memory.slot_at(BASE)
    if slot is None or slot.readonly or slot.end < END or not ram or ram[0][0] > 0:
        raise image.error("is entered in real mode, and the machine lacks the memory for a BIOS")
    if len(e820) > _E820_MAX:
        raise image.error(f"the memory map has {len(e820)} entries; the BIOS takes {_E820_MAX}")
    above_1m = next((high - (1 << 20) for low, high in ram if low <= 1 << 20 < high), 0)
    above_16m = max(above_1m - (15 << 20), 0)
    sizes = struct.pack(
        "<4H",
        len(e820),
        min(above_1m >> 10, 0xFC00),
        min(above_1m >> 10, 15 << 10),
        min(above_16m >> 16, 0xFFFF),
    )
    table = b"".join(struct.pack("<QQI", *entry) for entry in e820)
    memory.write(BASE, sizes + CODE[len(sizes) :] + table)
    memory.write(0, _vectors())
    _write_data_area(memory, ram[0][1])


def _vectors() -> bytes:
    by_default, irq_slave = _HANDLERS[24:26]
    offsets = [by_default] * 256
    offsets[0x08:0x20] = _HANDLERS[:24]
    offsets[0x70:0x78] = [irq_slave] * 8
    return b"".join(struct.pack("<HH", offset, SEGMENT) for offset in offsets)


def _write_data_area(memory: GuestMemory, low_ram_end: int) -> None:
    base_memory = min(low_ram_end, 0xA0000)
    memory.write(0x400, bytes(0x100))
    memory.write(0x400, struct.pack("<H", 0x3F8))
    memory.write(_EBDA_SEGMENT_AT, struct.pack("<H", base_memory >> 4))
    memory.write(_EQUIPMENT_AT, struct.pack("<H", _EQUIPMENT))
    memory.write(_BASE_MEMORY_AT, struct.pack("<H", base_memory >> 10))
    memory.write(_VIDEO_AT, struct.pack("<BHH", 3, 80, 4096))
    memory.write(_ROWS_AT, b"\x18")
