"""The PC test device that x86 kernel test suites (kvm-unit-tests) drive. Layer: devices.

Source: QEMU's hw/misc/pc-testdev.c and what the suite's tests of string I/O, interrupts and MMIO expect of it.
"""

from __future__ import annotations

from pykvm.core.device import Device
from pykvm.core.state import Bytes, Shape
from pykvm.devices.bytewide import ByteDevice
from pykvm.x86.layout import IOAPIC_PINS, TESTDEV_MMIO_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LATCH_SIZE = 4
PAGE_MASK = ~0xFFF


class PcTestDevice:
    """Five regions.

    attribute     where        bytes  what
    latch         0xe0         4      reads back what was written, in any width
    flush         0xe4         4      takes a GPA: `flush(gpa)` has to make the host forget its mapping of that page
    latch_byte    0xe8         4      the same latch, byte by byte (attach one byte where 0xe9 is a debug console)
    irq_lines     0x2000       24     byte n drives interrupt line n: `irq(n, value != 0)`
    iomem         0xff000000   64 Ki  memory that every access exits for
    """

    def __init__(self, irq: Callable[[int, bool], None], flush: Callable[[int], None]) -> None:
        latch = bytearray(LATCH_SIZE)
        self.latch: Device = _Buffer("testdev latch", latch)
        self.latch_byte: Device = _ByteLatch(latch)
        self.flush: Device = _Flush(flush)
        self.irq_lines: Device = _IrqLines(irq)
        self.iomem: Device = _Buffer("testdev iomem", bytearray(TESTDEV_MMIO_SIZE))


class _Buffer(Device):
    """Plain memory; what an access has beyond its end reads as 0 and is not written."""

    def __init__(self, name: str, data: bytearray) -> None:
        self.name = name
        self._data = data
        self.shape = Shape(1, data=Bytes(len(data)))

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        size = max(min(size, len(self._data) - offset), 0)
        self._data[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def reset(self) -> None:
        self._data[:] = bytes(len(self._data))


class _ByteLatch(ByteDevice):
    name = "testdev byte latch"

    def __init__(self, latch: bytearray) -> None:
        self._latch = latch

    def read_byte(self, offset: int) -> int:
        return self._latch[offset] if offset < LATCH_SIZE else 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        if offset < LATCH_SIZE:
            self._latch[offset] = value

    def reset(self) -> None:
        self._latch[:] = bytes(LATCH_SIZE)


class _Flush(Device):
    name = "testdev flush"

    def __init__(self, flush: Callable[[int], None]) -> None:
        self._flush = flush

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._flush(value & PAGE_MASK)


class _IrqLines(ByteDevice):
    name = "testdev irq lines"

    def __init__(self, irq: Callable[[int, bool], None]) -> None:
        self._irq = irq

    def write_byte(self, offset: int, value: int) -> None:
        if offset < IOAPIC_PINS:
            self._irq(offset, value != 0)
