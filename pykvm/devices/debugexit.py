"""isa-debug-exit: a port whose write ends the run with the value written. Layer: devices.

Source: QEMU's device of that name; kernel test suites configure it at port 0xf4, four bytes wide.
"""

from __future__ import annotations

from pykvm.core.device import Device
from pykvm.core.outcome import Outcome


class DebugExit(Device):
    """Writing `value`, at any offset and of any width, gives Outcome DEBUG_EXIT(value); reads give 0."""

    name = "isa-debug-exit"

    def read(self, offset: int, size: int) -> int:
        """Always 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """End the run; the process's exit status will be (value << 1) | 1."""
        return Outcome("DEBUG_EXIT", value)
