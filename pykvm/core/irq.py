"""Interrupt lines of a machine, whoever implements the controller. Layer: core.

irqchip   8259, IOAPIC   local APIC   IrqLine goes to
kernel    KVM            KVM          KVM_IRQ_LINE
split     our IOAPIC     KVM          the device given to `use_ioapic`, which sends MSIs
none      none           none         nowhere (counted), unless the user gives `use_ioapic` an own controller
"""

from __future__ import annotations

from pykvm._native import ffi
from pykvm.core.device import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData
    from pykvm.kvm.vm import VmFd


class IrqController:
    """Hands out IrqLines and drives them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lost = 0  # edges that no controller heard
        self._vm: VmFd | None = None
        self._set_pin: Callable[[int, bool], None] | None = None
        self._requests: dict[tuple[int, bool], CData] = {}

    def connect(self, vm: VmFd) -> None:
        """Use this VM's in-kernel irqchip from now on (a new one after a reset)."""
        self._vm = vm if self.kind == "kernel" else None

    def use_ioapic(self, set_pin: Callable[[int, bool], None]) -> None:
        """Send lines to a user-space controller."""
        self._set_pin = set_pin

    def line(self, gsi: int) -> IrqLine:
        """A new handle for interrupt `gsi`."""
        return IrqLine(gsi, self.drive)

    def drive(self, gsi: int, level: bool) -> None:
        """Set the level of a line."""
        if self._vm is not None:
            self._vm.ioctl("KVM_IRQ_LINE", self._request(gsi, level))
        elif self._set_pin is not None:
            self._set_pin(gsi, level)
        elif level:
            self.lost += 1

    def lower(self) -> None:
        """Take away every level that was ever driven: KVM keeps them apart from what its irqchip saves."""
        for gsi, level in list(self._requests):
            if level:
                self.drive(gsi, False)

    def _request(self, gsi: int, level: bool) -> CData:
        request = self._requests.get((gsi, level))
        if request is None:
            request = self._requests[gsi, level] = ffi.new("struct kvm_irq_level *")
            request.irq, request.level = gsi, level
        return request
