"""Restoring a snapshot, into the same machine or a new one. Layer: live objects."""

from __future__ import annotations

from pykvm._native import lib
from pykvm.core.device import Device
from pykvm.core.memimage import install, revert
from pykvm.errors import SnapshotError
from pykvm.snapshot.cpu import VCPU_SHAPE, VM_SHAPE
from pykvm.snapshot.take import held, holders, named_devices, take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from pykvm.core.machine import Machine
    from pykvm.snapshot.state import Snapshot

    M = TypeVar("M", bound=Machine)


def restore(machine: Machine, snapshot: Snapshot) -> None:
    """`Machine.restore`."""
    checked = check(machine, snapshot)
    machine.paused_for(lambda: held(checked.workers, lambda: _restore(machine, snapshot, checked.devices)))
    machine.forget_end()


def fork(machine: M, snapshot: Snapshot | None, attach: Callable[[M], object] | None) -> M:
    """`Machine.fork`."""
    if snapshot is None:
        snapshot = take(machine)
    spare = snapshot.take_spare(machine)
    child: M = machine.similar(snapshot.memory, spare)  # type: ignore[assignment]
    try:
        _copy_hooks(machine, child)
        if attach is not None:
            attach(child)
        put_state(child, snapshot, check(child, snapshot).devices)
        child.heir = snapshot.keep_spare
    except BaseException:
        child.close()
        raise
    return child


def _copy_hooks(machine: Machine, child: Machine) -> None:
    hooks = machine.hooks
    if hooks.rdmsr is not None or hooks.wrmsr is not None:
        child.on_msr(read=hooks.rdmsr, write=hooks.wrmsr)
    if hooks.hypercall is not None:
        child.on_hypercall(hooks.hypercall)
    child._symbols = machine._symbols


class Checked:
    """A machine that a snapshot fits: each device with its state there, and those that work beside the vCPUs."""

    def __init__(self, parts: tuple[object, ...], devices: list[tuple[Device, object]]) -> None:
        self.parts = parts
        self.workers = holders(device for device, _ in devices)
        self.devices = [(device, state) for device, state in devices if not _stateless(device)]


def _stateless(device: Device) -> bool:
    shape, restore = getattr(device, "shape", None), getattr(type(device), "restore", None)
    return shape is not None and not shape.fields and restore is Device.restore


def check(machine: Machine, snapshot: Snapshot) -> Checked:
    """Raises SnapshotError where the snapshot is of another machine.

    What was checked for a machine holds as long as its devices and slots are the same.
    """
    parts = (snapshot, machine.bus.ports.regions, machine.bus.mmio.regions, len(machine.memory.slots))
    known = machine.checked
    if known is None or any(old is not new for old, new in zip(known.parts, parts, strict=True)):
        known = machine.checked = Checked(parts, _check(machine, snapshot))
    return known


def _check(machine: Machine, snapshot: Snapshot) -> list[tuple[Device, object]]:
    if len(machine.vcpus) != len(snapshot.vcpus):
        raise SnapshotError(f"the snapshot has {len(snapshot.vcpus)} vCPUs, the machine {len(machine.vcpus)}")
    slots = machine.memory.slots
    if len(slots) != len(snapshot.memory) or not all(
        image.fits(slot) for image, slot in zip(snapshot.memory, slots, strict=True)
    ):
        raise SnapshotError("the snapshot's memory slots are not those of the machine")
    if not snapshot.checked:
        for part in snapshot.vcpus:
            VCPU_SHAPE.check("vcpu", part.version, part.state)
        VM_SHAPE.check("vm", snapshot.vm.version, snapshot.vm.state)
    return _check_devices(machine, snapshot)


def _check_devices(machine: Machine, snapshot: Snapshot) -> list[tuple[Device, object]]:
    devices = dict(named_devices(machine))
    odd = devices.keys() ^ snapshot.devices.keys()
    if odd:
        name = min(odd)
        where = "the machine, but not in the snapshot" if name in devices else "the snapshot, but not in the machine"
        raise SnapshotError(f"{name} is in {where}: attach the same devices")
    found: list[tuple[Device, object]] = []
    for name, device in devices.items():
        part = snapshot.devices[name]
        if not snapshot.checked and device.shape is not None:
            device.shape.check(name, part.version, part.state)
        found.append((device, part.state))
    beside = holders(device for device, _ in found)
    # last those that interrupt as soon as they are restored: an IOAPIC that has no routes yet would lose that
    return sorted(found, key=lambda each: each[0] in beside)


def _restore(machine: Machine, snapshot: Snapshot, devices: list[tuple[Device, object]]) -> None:
    for vcpu in machine.vcpus:
        lib.pk_discard(vcpu.state)
    traps = machine.planted_traps()
    if traps is not None:
        traps.lift_all()
    for image, slot in zip(snapshot.memory, machine.memory.slots, strict=True):
        if slot.image is image:
            revert(slot)
        else:
            install(slot, image)
    machine.watch_files()
    if traps is not None:
        traps.plant_all()
    put_state(machine, snapshot, devices)


def put_state(machine: Machine, snapshot: Snapshot, devices: list[tuple[Device, object]]) -> None:
    """Give vCPUs, VM and devices their state; memory is in place."""
    vm, vcpus = snapshot.calls()
    vm.apply(machine.vm)
    for vcpu, calls in zip(machine.vcpus, vcpus, strict=True):
        calls.apply(vcpu.fd)
    vm.apply_clock(machine.vm)
    for device, state in devices:
        device.restore(state)  # type: ignore[arg-type]
