"""KVM VMs of closed forks, kept for the next fork of the same snapshot. Layer: core; loaded by the first snapshot.

Making a VM and closing it cost milliseconds, most of them in the kernel, which waits for grace periods. A restore
undoes everything that a guest can change, in a tenth of that. So a fork that is closed leaves its VM, its vCPUs and its
memory (given back to the snapshot's content) to the snapshot, unless something was done to them that a restore does not
undo.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.core import reaper
from pykvm.core.memimage import revert
from pykvm.core.vmsetup import coalesced_offset
from pykvm.errors import PykvmError
from pykvm.kvm.vcpu import VcpuFd
from pykvm.kvm.vm import VmFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm._native import CData
    from pykvm.config import MachineConfig
    from pykvm.core.machine import Machine
    from pykvm.core.memimage import SlotImage
    from pykvm.core.memory import Slot
    from pykvm.core.wires import Wires
    from pykvm.kvm.system import Kvm

MAX_SPARES = 8  # of a snapshot: as many machines as a program may have side by side, again and again

# ioctls that leave nothing behind once a snapshot is restored, or (KVM_SET_GUEST_DEBUG) that `park` undoes itself
_NAMES = """
CHECK_EXTENSION GET_CLOCK GET_CPUID2 GET_DEBUGREGS GET_FPU GET_IRQCHIP GET_LAPIC GET_MP_STATE
GET_MSRS GET_PIT2 GET_REGS GET_SREGS GET_SREGS2 GET_STATS_FD GET_TSC_KHZ GET_VCPU_EVENTS GET_XCRS
GET_XSAVE GET_XSAVE2 INTERRUPT IRQ_LINE KVMCLOCK_CTRL NMI SET_CLOCK SET_DEBUGREGS SET_FPU
SET_GUEST_DEBUG SET_IRQCHIP SET_LAPIC SET_MP_STATE SET_PIT2 SET_REGS SET_SREGS SET_SREGS2
SET_VCPU_EVENTS SET_XCRS SET_XSAVE SIGNAL_MSI TRANSLATE
"""
UNDONE = frozenset(f"KVM_{name}" for name in _NAMES.split())


class Spare:
    """A VM that nobody uses. Who takes it out of the snapshot's list owns what is in it."""

    def __init__(self, machine: Machine) -> None:
        self.config: MachineConfig = machine.config
        self.kvm: Kvm = machine.kvm
        self.slots: list[Slot] = []
        self.wires: dict[int, Wires] = {}
        self.vm = -1
        self.vcpus: list[tuple[CData, int]] = []  # CPUID, file descriptor

    def fits(self, machine: Machine) -> bool:
        """Whether a fork of `machine` can have it: one of this process, with the same configuration and transports."""
        return self.config is machine.config and not self.kvm.foreign and _shape(self.wires) == _shape(machine.wires)

    def connect(self, machine: Machine) -> VmFd:
        """Give VM and vCPUs to a new machine, which has the memory already."""
        vm, self.vm = VmFd(self.vm, self.kvm), -1
        vcpus, self.vcpus = self.vcpus, []
        coalesced = coalesced_offset(vm)
        for vcpu, (cpuid, fd) in zip(machine.vcpus, vcpus, strict=True):
            vcpu.connect(VcpuFd(fd, vcpu.index), self.kvm.vcpu_mmap_size, coalesced)
            vcpu.cpuid = cpuid
        return vm

    def __del__(self) -> None:
        for wires in self.wires.values():
            wires.close()
        if self.vm >= 0 and not self.kvm.foreign:
            reaper.close_later([fd for fd in (*(fd for _, fd in self.vcpus), self.vm, self.kvm.fd) if fd >= 0])


def park(machine: Machine, images: Sequence[SlotImage]) -> Spare | None:
    """What another fork can use of a machine that closes, whose threads have ended; None where there is no such thing.

    The machine is without VM, vCPUs and memory then.
    """
    slots = machine.memory.slots
    try:
        if not _restorable(machine) or [slot.image for slot in slots] != [*images]:
            return None
        if not all(slot.abandon() for slot in slots):
            return None
        _quieten(machine)
        for slot in slots:
            revert(slot)
    except PykvmError:
        return None
    spare = Spare(machine)
    spare.wires, machine.wires = machine.wires, {}
    for wires in spare.wires.values():
        wires.keep()
    spare.slots = machine.memory.give()
    spare.vcpus = [(vcpu.cpuid, vcpu.disconnect()[0]) for vcpu in machine.vcpus]
    spare.vm = machine.give_vm()
    return spare


def _shape(wires: dict[int, Wires]) -> dict[int, int]:
    return {base: len(each.kicks) for base, each in wires.items()}


def _restorable(machine: Machine) -> bool:
    """Whether nothing was done to the KVM side that a restore leaves as it is."""
    handles = [machine.vm, *(vcpu.fd for vcpu in machine.vcpus)]
    if any(slot.guard is not None and slot.guard.hit() for slot in machine.memory.slots):
        return False  # a page of a file is gone
    if machine.config.stats or any(slot.copied or slot.fd >= 0 for slot in machine.memory.slots):
        return False
    return all(handle.fd >= 0 and handle.issued <= UNDONE for handle in handles)


def _quieten(machine: Machine) -> None:
    """Discard an access that was never answered, stop debugging, lower every interrupt line."""
    machine.irqs.lower()
    for vcpu in machine.vcpus:
        lib.pk_discard(vcpu.state)
        if "KVM_SET_GUEST_DEBUG" in vcpu.fd.issued:
            vcpu.fd.set_guest_debug(0)
