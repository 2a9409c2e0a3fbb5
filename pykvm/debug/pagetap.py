"""Seeing a guest's accesses to its RAM: the pages are taken out of KVM's memory slots for as long. Layer: debug.

An access to such a page leaves KVM as MMIO does, at any privilege and on any host, and a device on the bus carries it
out. Not for pages that hold code or page tables, which the CPU itself reads; atomic instructions are not atomic there.
"""

from __future__ import annotations

from pykvm.core.device import Device
from pykvm.core.vcpu import Exit
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pykvm.core.machine import Machine
    from pykvm.core.memory import Slot
    from pykvm.core.vcpu import Vcpu
    from pykvm.kvm.vm import VmFd

PAGE_SIZE = 4096
FIRST_PIECE = 16384  # slot numbers for the pieces behind a hole; machines have a handful of slots


class Tap(Device):
    """Stands for the pages around `watched`."""

    name = "memory tap"

    def __init__(
        self, machine: Machine, pages: range, watched: range, on_access: Callable[[Vcpu, Exit], object]
    ) -> None:
        self.pages = pages
        self._machine = machine
        self._watched = watched
        self._on_access = on_access

    def read(self, offset: int, size: int) -> int:
        """The guest's load."""
        value = self._machine.memory.read_uint(self.pages.start + offset, size)
        self._tell(offset, size, value, write=False)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest's store."""
        self._machine.memory.write_uint(self.pages.start + offset, size, value)
        self._tell(offset, size, value, write=True)

    def _tell(self, offset: int, size: int, value: int, *, write: bool) -> None:
        address = self.pages.start + offset
        if address >= self._watched.stop or address + size <= self._watched.start:
            return
        event = Exit("MEMORY", None)
        event.address, event.size, event.write, event.value = address, size, write, value
        vcpus = self._machine.vcpus
        self._on_access(next((vcpu for vcpu in vcpus if vcpu.on_own_thread()), vcpus[0]), event)


class PageTaps:
    """The taps of one trace."""

    def __init__(self, machine: Machine, ranges: Iterable[range], on_access: Callable[[Vcpu, Exit], object]) -> None:
        self._machine = machine
        self._taps = [Tap(machine, self._pages(each), each, on_access) for each in ranges]
        self._pieces: dict[int, list[int]] = {}  # slot index -> numbers of its pieces, while it has holes
        if not self._taps:
            return
        attached = []
        try:
            for tap in self._taps:
                machine.attach(tap, mmio=tap.pages)
                attached.append(tap)
        except ConfigError:
            for tap in attached:
                machine.detach(tap)
            raise
        self._change(self._cut)
        machine.on_connect.append(self._cut)

    def _pages(self, watched: range) -> range:
        start, stop = watched.start & -PAGE_SIZE, (watched.stop + PAGE_SIZE - 1) & -PAGE_SIZE
        slot = self._machine.memory.slot_at(watched.start)
        if watched.step != 1 or not watched or slot is None or watched.stop > slot.end or slot.readonly:
            raise ConfigError("trace", f"{watched} is no range of guest RAM addresses")
        return range(start, stop)

    def _change(self, change: Callable[[VmFd], object]) -> None:
        self._machine.freeze()
        try:
            change(self._machine.vm)
        finally:
            self._machine.thaw()

    def _slots(self) -> dict[int, tuple[Slot, list[range]]]:
        found: dict[int, tuple[Slot, list[range]]] = {}
        for tap in sorted(self._taps, key=lambda each: each.pages.start):
            slot = self._machine.memory.slot_at(tap.pages.start)
            assert slot is not None
            found.setdefault(slot.index, (slot, []))[1].append(tap.pages)
        return found

    def _cut(self, vm: VmFd) -> None:
        """Tell KVM of what is left of each slot. A new VM (after a reset) has them whole again."""
        number = FIRST_PIECE
        for index, (slot, holes) in self._slots().items():
            vm.set_user_memory_region(index, slot.gpa, 0, slot.hva)
            numbers, start = [], slot.gpa
            for hole in [*holes, range(slot.end, slot.end)]:
                if hole.start > start:
                    number += 1
                    vm.set_user_memory_region(number, start, hole.start - start, slot.hva + start - slot.gpa)
                    numbers.append(number)
                start = hole.stop
            self._pieces[index] = numbers

    def _mend(self, vm: VmFd) -> None:
        for index, (slot, _) in self._slots().items():
            for number in self._pieces.pop(index, ()):
                vm.set_user_memory_region(number, slot.gpa, 0, slot.hva)
            vm.set_user_memory_region(index, slot.gpa, slot.size, slot.hva)

    def close(self) -> None:
        """Give KVM the pages back; again without effect."""
        if not self._taps or self._machine.closed:
            return
        self._machine.on_connect.remove(self._cut)
        self._change(self._mend)
        for tap in self._taps:
            self._machine.detach(tap)
        self._taps = []
