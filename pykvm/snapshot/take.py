"""Taking a snapshot. Layer: live objects.

The vCPUs stand between two instructions with their accesses complete. Devices are saved first, then the interrupt
controllers, then the vCPUs with their local APICs: an interrupt on its way is then seen twice at worst, never lost.
"""

from __future__ import annotations

from pykvm.core.device import Device
from pykvm.core.memimage import capture, check_hugepages
from pykvm.errors import SnapshotError
from pykvm.snapshot.cpu import VCPU_SHAPE, VM_SHAPE, save_vcpu, save_vm
from pykvm.snapshot.state import Part, Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from pykvm.core.machine import Machine

    T = TypeVar("T")


def take(machine: Machine, *, to_file: bool = False) -> Snapshot:
    """`Machine.snapshot`."""
    check_hugepages(machine.memory)
    for _, device in named_devices(machine):
        check = getattr(device, "check_snapshot", None)
        if check is not None:
            check(to_file=to_file)
    workers = holders(device for _, device in named_devices(machine))
    return machine.frozen(lambda: held(workers, lambda: _take(machine)))


def holders(devices: Iterable[Device]) -> list[Device]:
    """Those that work beside the vCPUs."""
    return [each for each in devices if getattr(type(each), "hold", Device.hold) is not Device.hold]


def held(devices: list[Device], function: Callable[[], T]) -> T:
    """function() while these devices do nothing."""
    still: list[Device] = []
    try:
        for device in devices:
            device.hold()
            still.append(device)
        return function()
    finally:
        for device in reversed(still):
            device.release()


def _take(machine: Machine) -> Snapshot:
    devices = {name: _save_device(name, device) for name, device in named_devices(machine)}
    vm = Part(VM_SHAPE.version, save_vm(machine))
    vcpus = [Part(VCPU_SHAPE.version, save_vcpu(machine, vcpu)) for vcpu in machine.vcpus]
    traps = machine.planted_traps()
    if traps is not None:
        traps.lift_all()
    try:
        memory = [capture(slot) for slot in machine.memory.slots]
    finally:
        if traps is not None:
            traps.plant_all()
    return Snapshot(vcpus=vcpus, vm=vm, devices=devices, memory=memory)


def named_devices(machine: Machine) -> Iterator[tuple[str, Device]]:
    """Each device that is part of the machine once, by its name and its first address."""
    seen: set[int] = set()
    for space in (machine.bus.ports, machine.bus.mmio):
        for region in space.regions:
            device = region.device
            if id(device) not in seen and getattr(device, "shape", True) is not None:
                seen.add(id(device))
                name = getattr(device, "kind", region.name)  # a disk's name has its path in it, which may change
                yield f"{name} at {space.name} {region.base:#x}", device


def _save_device(name: str, device: Device) -> Part:
    try:
        return Part(device.shape.version, device.save())  # type: ignore[union-attr]
    except AttributeError:
        raise SnapshotError(f"{name} cannot be saved: it lacks shape, save() and restore() of a Device") from None
