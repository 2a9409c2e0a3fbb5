"""The two address spaces, ports and MMIO: which device answers an access. Layer: core.

An access that lies inside one region goes to its device with the region's base subtracted. One that straddles a
region's edge is split into bytes, each of which finds its own region, as an ISA bus would do it. Where no device is,
reads give all ones and writes vanish; both are counted, and each address is logged once.
"""

from __future__ import annotations

from bisect import bisect_right

from pykvm import log
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.device import Device
    from pykvm.core.outcome import Outcome

MAX_UNMAPPED = 1024  # addresses remembered: a hostile guest must not grow the host


class Region:
    """[base, base + length) of an address space, answered by `device`."""

    __slots__ = ("base", "device", "length", "name")

    def __init__(self, base: int, length: int, device: Device, name: str) -> None:
        self.base = base
        self.length = length
        self.device = device
        self.name = name

    @property
    def end(self) -> int:
        """First address past the region."""
        return self.base + self.length

    def __repr__(self) -> str:
        return f"<Region {self.name} [{self.base:#x}, {self.end:#x})>"


class AddressSpace:
    """Regions of one space, sorted and without overlap. Lookups need no lock: changes replace the lists whole."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.regions: list[Region] = []
        self.unmapped: dict[int, int] = {}
        self.on_unmapped: Callable[[int, bool], object] | None = None  # called with address, and whether it is a write
        self._bases: list[int] = []

    def add(self, addresses: range, device: Device, name: str) -> Region:
        """Let `device` answer `addresses` (a range with step 1); ConfigError if another device does already."""
        if addresses.step != 1 or not addresses or addresses.start < 0 or addresses.stop > self.limit:
            raise ConfigError(self.name, f"{addresses} is no range of {self.name} addresses")
        at = bisect_right(self._bases, addresses.start)
        for other in self.regions[max(at - 1, 0) : at + 1]:  # the neighbours: regions do not overlap
            if addresses.start < other.base + other.length and other.base < addresses.stop:
                raise ConfigError(self.name, f"{name} at {addresses.start:#x} overlaps {other}")
        region = Region(addresses.start, len(addresses), device, name)
        # Readers bisect _bases and then index regions: publish the longer list of regions first
        self.regions = [*self.regions[:at], region, *self.regions[at:]]
        self._bases = [*self._bases[:at], region.base, *self._bases[at:]]
        return region

    def remove(self, device: Device) -> None:
        """Take away every region of `device`."""
        left = [region for region in self.regions if region.device is not device]
        self._bases = [region.base for region in left]  # the shorter list of regions last
        self.regions = left

    def find(self, address: int, size: int) -> Region | None:
        """The region that holds all of [address, address + size)."""
        at = bisect_right(self._bases, address) - 1
        if at < 0 or at >= len(self.regions):
            return None
        region = self.regions[at]
        return region if region.base <= address and address + size <= region.end else None

    def read(self, address: int, size: int) -> int:
        """The value of an access of `size` bytes, masked to that size."""
        region = self.find(address, size)
        if region is not None:
            return region.device.read(address - region.base, size) & ((1 << size * 8) - 1)
        if size > 1 and self._touches(address, size):
            return sum(self.read(address + i, 1) << i * 8 for i in range(size))
        self._note(address, size, "read")
        return (1 << size * 8) - 1

    def write(self, address: int, size: int, value: int) -> Outcome | None:
        """Deliver a write; the device's Outcome, if it ends the run."""
        region = self.find(address, size)
        if region is not None:
            return region.device.write(address - region.base, size, value)
        if size > 1 and self._touches(address, size):
            outcomes = [self.write(address + i, 1, value >> i * 8 & 0xFF) for i in range(size)]
            return next((outcome for outcome in outcomes if outcome is not None), None)
        self._note(address, size, "write")
        return None

    def _touches(self, address: int, size: int) -> bool:
        return any(self.find(address + i, 1) is not None for i in range(size))

    def _note(self, address: int, size: int, direction: str) -> None:
        if self.on_unmapped is not None:
            self.on_unmapped(address, direction == "write")
        seen = self.unmapped.get(address)
        if seen is None:
            if len(self.unmapped) >= MAX_UNMAPPED:
                return
            log.debug("unmapped access", space=self.name, address=hex(address), size=size, direction=direction)
        self.unmapped[address] = (seen or 0) + 1

    def describe(self, address: int) -> str:
        """The name of what is at `address`, for messages."""
        region = self.find(address, 1)
        return region.name if region is not None else "nothing"


class Bus:
    """Both spaces of a machine, and the cache that makes a port exit one dict lookup.

    `routes` maps an exit's key (see native/runloop.h) to (function, offset, size, is_write); it is filled by the exit
    handler and emptied whenever a device comes or goes. Its size is bounded: keys come from the guest.
    """

    MAX_ROUTES = 4096

    def __init__(self) -> None:
        self.ports = AddressSpace("port", 0x10000)
        self.mmio = AddressSpace("MMIO", 1 << 52)
        self.routes: dict[int, tuple[object, int, int, bool]] = {}

    def attach(self, device: Device, ports: range | None, mmio: range | None, name: str) -> None:
        """Put a device on the bus at port and/or MMIO addresses."""
        if ports is None and mmio is None:
            raise ConfigError("attach", f"{name} needs ports= or mmio=")
        if ports is not None:
            self.ports.add(ports, device, name)
        if mmio is not None:
            self.mmio.add(mmio, device, name)
        self.routes.clear()

    def detach(self, device: Device) -> None:
        """Take a device off the bus."""
        self.ports.remove(device)
        self.mmio.remove(device)
        self.routes.clear()

    @property
    def devices(self) -> list[Device]:
        """Every device once, in address order, ports first."""
        found = [region.device for space in (self.ports, self.mmio) for region in space.regions]
        return list({id(device): device for device in found}.values())
