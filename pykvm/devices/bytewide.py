"""The base of devices with 8-bit registers on a wider bus. Layer: devices.

The ISA bridge of a PC splits an access that is wider than the device into byte cycles at consecutive
addresses, lowest first: `outw %ax, $0x70` sets the RTC's index and then writes its data register.
"""

from __future__ import annotations

from pykvm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.outcome import Outcome


class ByteDevice(Device):
    """A device that implements `read_byte` and `write_byte`; any offset may come, the guest chooses it."""

    def read_byte(self, offset: int) -> int:
        """The byte register at `offset`; an empty bus floats high."""
        return 0xFF

    def write_byte(self, offset: int, value: int) -> Outcome | None:
        """Write 0 <= value <= 0xff to the register at `offset`."""
        return None

    def read(self, offset: int, size: int) -> int:
        """`size` byte registers, the lowest address in the lowest byte."""
        if size == 1:
            return self.read_byte(offset)
        value = 0
        for index in range(size):
            value |= self.read_byte(offset + index) << (8 * index)
        return value

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """`size` byte writes, lowest address first; the first one that ends the run is the last one made."""
        if size == 1:
            return self.write_byte(offset, value)
        for index in range(size):
            outcome = self.write_byte(offset + index, (value >> (8 * index)) & 0xFF)
            if outcome is not None:
                return outcome
        return None
