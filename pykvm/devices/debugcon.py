"""Debug console: a port that prints (0xe9 of Bochs and QEMU, 0x402 of SeaBIOS and OVMF). Layer: devices.

Source: QEMU's isa-debugcon. Firmware prints only when a read of the port gives back 0xe9.
"""

from __future__ import annotations

from pykvm.devices.bytewide import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PRESENT = 0xE9


class DebugCon(ByteDevice):
    """One byte-wide port; each byte written goes to `sink` at once."""

    def __init__(self, sink: Callable[[bytes], None], *, name: str = "debugcon") -> None:
        self.name = name
        self._sink = sink

    def read_byte(self, offset: int) -> int:
        """0xe9, whichever address the port is at."""
        return PRESENT if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """Print one byte."""
        if offset == 0:
            self._sink(value.to_bytes(1, "little"))
