"""An interrupt line for device tests to look at."""

from __future__ import annotations

from pykvm.core.device import IrqLine


class Wire(IrqLine):
    """An interrupt line that remembers every change of its level."""

    __slots__ = ("changes",)

    def __init__(self, gsi: int = 0) -> None:
        self.changes: list[bool] = []
        super().__init__(gsi, lambda _gsi, level: self.changes.append(level))

    @property
    def edges(self) -> int:
        """Rising edges so far."""
        return self.changes.count(True)
