"""pvpanic: how a guest kernel tells that it panicked. Layer: devices.

Source: QEMU's docs/specs/pvpanic.rst, ISA interface: one byte at port 0x505, ACPI id QEMU0001.
"""

from __future__ import annotations

from pykvm.core.outcome import Outcome
from pykvm.core.state import BOOL, Shape
from pykvm.devices.bytewide import ByteDevice

PANICKED = 0x01  # the host is to handle it: the run ends
CRASH_LOADED = 0x02  # the guest handles it (kdump): the host only takes note
SHUTDOWN = 0x04  # an orderly shutdown that firmware could not do
EVENTS = PANICKED | CRASH_LOADED | SHUTDOWN


class PvPanic(ByteDevice):
    """One byte-wide port. `crash_loaded` says that the guest has panicked and went on to its crash kernel."""

    name = "pvpanic"
    shape = Shape(1, crash_loaded=BOOL)

    def __init__(self) -> None:
        self._crash_loaded = False

    @property
    def crash_loaded(self) -> bool:
        """Whether the guest has said so."""
        return self._crash_loaded

    def read_byte(self, offset: int) -> int:
        """The events that this device understands."""
        return EVENTS if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> Outcome | None:
        """Report events; unknown bits are ignored, of several the gravest counts."""
        if offset != 0:
            return None
        if value & PANICKED:
            return Outcome("CRASH", detail="guest panicked (pvpanic)")
        if value & CRASH_LOADED:
            self._crash_loaded = True
            return None
        return Outcome.POWER_OFF if value & SHUTDOWN else None

    def reset(self) -> None:
        """Forget the crash."""
        self._crash_loaded = False
