"""A vCPU's state, and the VM's: which ioctls read and write it, and in which order. Layer: live objects.

The order of restoring is KVM's (its API documentation has the ioctls in section 4): system registers first, because
they hold the APIC base; the local APIC before IA32_TSC_DEADLINE, which KVM drops unless the timer is in that mode; the
TSC before anything that is relative to it; events last, because other ioctls clear or queue some. CPUID is set before
MSRs are read or written.
"""

from __future__ import annotations

from pykvm._native import ffi, lib
from pykvm.core.state import U64, Bytes, Int, Shape
from pykvm.errors import KvmError, SnapshotError
from pykvm.x86.msrs import IA32_TSC, IA32_TSC_DEADLINE
from pykvm.x86.segments import CR4_VMXE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.core.state import State
    from pykvm.core.vcpu import Vcpu
    from pykvm.kvm.vcpu import VcpuFd
    from pykvm.kvm.vm import VmFd

XSAVE_MIN, XSAVE_MAX = 4096, 1 << 16
MSR_ENTRY = ffi.sizeof("struct kvm_msr_entry")
MAX_MSRS = 4096
SREGS2 = hasattr(lib, "KVM_GET_SREGS2")

# field -> (KVM_GET_*, KVM_SET_*, struct), in the order of restoring; MSRs come after the local APIC
_PARTS = {
    "sregs": ("KVM_GET_SREGS2", "KVM_SET_SREGS2", "struct kvm_sregs2")
    if SREGS2
    else ("KVM_GET_SREGS", "KVM_SET_SREGS", "struct kvm_sregs"),
    "regs": ("KVM_GET_REGS", "KVM_SET_REGS", "struct kvm_regs"),
    "xcrs": ("KVM_GET_XCRS", "KVM_SET_XCRS", "struct kvm_xcrs"),
    "debugregs": ("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", "struct kvm_debugregs"),
}
_LAPIC = ("KVM_GET_LAPIC", "KVM_SET_LAPIC", "struct kvm_lapic_state")
_LATE = {
    "mp_state": ("KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "struct kvm_mp_state"),
    "events": ("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "struct kvm_vcpu_events"),
}
_ALL = {**_PARTS, "lapic": _LAPIC, **_LATE}

VCPU_SHAPE = Shape(
    1,
    xsave=Bytes(XSAVE_MIN, XSAVE_MAX),
    msrs=Bytes(0, MAX_MSRS * MSR_ENTRY),
    tsc_khz=Int(0, 1 << 32),
    **{
        name: Bytes(0 if name == "lapic" else ffi.sizeof(struct), ffi.sizeof(struct))
        for name, (_, _, struct) in _ALL.items()
    },
)

_IRQCHIP, _PIT = ffi.sizeof("struct kvm_irqchip"), ffi.sizeof("struct kvm_pit_state2")
_CHIPS = {
    "pic_master": lib.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": lib.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": lib.KVM_IRQCHIP_IOAPIC,
}
VM_SHAPE = Shape(1, **{name: Bytes(0, _IRQCHIP) for name in _CHIPS}, pit=Bytes(0, _PIT), clock_ns=U64, realtime_ns=U64)

# Which of the MSRs that KVM lists can be read, by what the guest's CPUID allows: asked once.
_readable: dict[tuple[object, ...], CData] = {}


def save_vcpu(machine: Machine, vcpu: Vcpu) -> State:
    """The state of a paused vCPU whose last access is complete."""
    fd, in_kernel = vcpu.fd, machine.config.irqchip != "none"
    refuse_nested(vcpu.index, fd, machine.vm.check_extension(lib.KVM_CAP_NESTED_STATE))
    state: State = {}
    for name, (get, _, struct) in _ALL.items():
        state[name] = b""
        if name != "lapic" or in_kernel:
            data = ffi.new(f"{struct} *")
            fd.ioctl(get, data)
            state[name] = bytes(ffi.buffer(data))
    size = (
        max(machine.vm.check_extension(lib.KVM_CAP_XSAVE2), XSAVE_MIN) if hasattr(lib, "KVM_CAP_XSAVE2") else XSAVE_MIN
    )
    state["xsave"] = fd.get_xsave(size)
    state["msrs"] = _save_msrs(machine, fd)
    state["tsc_khz"] = fd.get_tsc_khz()
    return state


def refuse_nested(index: int, fd: VcpuFd, size: int) -> None:
    """Raise SnapshotError for a vCPU that runs a guest of its own (4.114): such state is not saved.

    `size` is KVM_CAP_NESTED_STATE. With VMX being a hypervisor is enough: KVM keeps the VMXON pointer to itself.
    """
    if not size:
        return
    state = ffi.from_buffer("struct kvm_nested_state *", fd.get_nested_state(size))
    inside = state.flags & (lib.KVM_STATE_NESTED_GUEST_MODE | lib.KVM_STATE_NESTED_RUN_PENDING)
    if inside or (state.format == lib.KVM_STATE_NESTED_FORMAT_VMX and fd.get_sregs().cr4 & CR4_VMXE):
        raise SnapshotError(
            f"vCPU {index} runs a guest of its own, which no snapshot can hold: take it before the guest starts that"
        )


def _save_msrs(machine: Machine, fd: VcpuFd) -> bytes:
    key = (machine.config.cpu_features, machine.config.cpuid, machine.config.irqchip, machine.config.cpus)
    table = _readable.get(key)
    if table is None or fd.ioctl("KVM_GET_MSRS", table) != table.nmsrs:
        readable = fd.get_msrs(machine.kvm.msr_indices())
        # the TSC before the timer that is relative to it, which wants the rest to be in place
        order = sorted(readable, key=lambda index: (index != IA32_TSC, index == IA32_TSC_DEADLINE, index))
        table = _msr_table([(index, 0) for index in order])
        fd.ioctl("KVM_GET_MSRS", table)
        if len(_readable) < 64:
            _readable[key] = table
    return bytes(ffi.buffer(ffi.addressof(table.entries, 0), table.nmsrs * MSR_ENTRY)) if table.nmsrs else b""


def _msr_table(values: Sequence[tuple[int, int]]) -> CData:
    table = ffi.new("struct kvm_msrs *", {"entries": len(values)})
    table.nmsrs = len(values)
    for i, (index, value) in enumerate(values):
        table.entries[i].index, table.entries[i].data = index, value
    return table


def msr_values(raw: bytes) -> list[tuple[int, int]]:
    """(index, value) of a saved MSR list."""
    entries = ffi.from_buffer("struct kvm_msr_entry[]", raw)
    return [(entries[i].index, entries[i].data) for i in range(len(raw) // MSR_ENTRY)]


# -- restoring ---------------------------------------------------------------------------------------------------------

# MSRs that this process's KVM reads but does not take back (their values are facts about the CPU)
_refused: set[int] = set()


class _Row:
    """Ioctls that are issued in one go, on a file descriptor given then."""

    def __init__(self, requests: Sequence[tuple[str, CData]], what: str) -> None:
        self._names = [name for name, _ in requests]
        self._what = what
        self._data = [data for _, data in requests]  # kept for the pointers
        rows = [(getattr(lib, name), ffi.cast("void *", data)) for name, data in requests]
        self._calls = ffi.new("struct pk_call[]", rows)

    def issue(self, fd: int) -> None:
        """Raises SnapshotError at the first that fails."""
        done = lib.pk_calls(fd, self._calls, len(self._names))
        if done != len(self._names):
            problem = KvmError(self._names[done & 0xFFFF], done >> 16)
            raise SnapshotError(f"this host's KVM does not take the {self._what}'s state: {problem}")


class VcpuCalls:
    """A vCPU's saved state as a row of ioctls, ready for any vCPU of the same kind."""

    def __init__(self, state: State) -> None:
        self._requests: list[tuple[str, CData]] = []
        for name, (_, request, struct) in _PARTS.items():
            self._add(request, _struct(struct, state[name]))
        xsave = ffi.new("uint8_t[]", state["xsave"])
        self._add("KVM_SET_XSAVE", xsave)
        if state["lapic"]:
            self._add(_LAPIC[1], _struct(_LAPIC[2], state["lapic"]))
        self._msrs_at = len(self._requests)
        self._values = msr_values(state["msrs"])
        for name, (_, request, struct) in _LATE.items():
            self._add(request, _struct(struct, state[name]))
        self.tsc_khz = state["tsc_khz"]
        self._row: _Row | None = None

    def _add(self, request: str, data: CData) -> None:
        self._requests.append((request, data))

    def apply(self, fd: VcpuFd) -> None:
        """Give the state to a vCPU. Raises SnapshotError when KVM refuses a part of it."""
        if self._row is None:
            self._find_refused(fd)
            table = _msr_table([(index, value) for index, value in self._values if index not in _refused])
            self._requests.insert(self._msrs_at, ("KVM_SET_MSRS", table))
            self._row = _Row(self._requests, "vCPU")
        self._row.issue(fd.fd)

    def _find_refused(self, fd: VcpuFd) -> None:
        """Try the MSRs on the first vCPU that gets them; what KVM refuses has to have the wanted value already."""
        for name, data in self._requests[: self._msrs_at]:
            try:
                fd.ioctl(name, data)
            except KvmError as error:
                raise SnapshotError(f"this host's KVM does not take the vCPU's state: {error}") from None
        issued = set(fd.issued)
        unknown = {index: value for index, value in self._values if index not in _refused}
        for index in fd.set_msrs(unknown):
            if fd.get_msrs([index]).get(index) != unknown[index]:
                raise SnapshotError(f"this host's KVM does not take MSR {index:#x} = {unknown[index]:#x}")
            _refused.add(index)
        fd.issued = issued  # what restores a snapshot is nothing that another restore would not undo (core.spare)


def _struct(struct: str, raw: bytes) -> CData:
    data = ffi.new(f"{struct} *")
    ffi.memmove(data, raw, len(raw))
    return data


# -- the VM ------------------------------------------------------------------------------------------------------------


def save_vm(machine: Machine) -> State:
    """Interrupt controllers, timer and clock. Call before the vCPUs are saved: what they send goes to the APICs."""
    vm, in_kernel = machine.vm, machine.config.irqchip == "kernel"
    state: State = {name: vm.get_irqchip(chip) if in_kernel else b"" for name, chip in _CHIPS.items()}
    state["pit"] = vm.get_pit2() if machine.config.pit else b""
    data = ffi.new("struct kvm_clock_data *")
    vm.ioctl("KVM_GET_CLOCK", data)
    state["clock_ns"], state["realtime_ns"] = data.clock, data.realtime
    return state


class VmCalls:
    """The VM's saved state, ready for any VM of the same kind: interrupt controllers and timer, before the vCPUs."""

    def __init__(self, state: State) -> None:
        requests = [("KVM_SET_IRQCHIP", _checked("struct kvm_irqchip", state[name])) for name in _CHIPS if state[name]]
        if state["pit"]:
            requests.append(("KVM_SET_PIT2", _checked("struct kvm_pit_state2", state["pit"])))
        self._row = _Row(requests, "VM")
        clock = ffi.new("struct kvm_clock_data *")
        clock.clock = state["clock_ns"]
        self._clock = _Row([("KVM_SET_CLOCK", clock)], "VM")

    def apply(self, vm: VmFd) -> None:
        """Interrupt controllers and timer. Raises SnapshotError."""
        self._row.issue(vm.fd)

    def apply_clock(self, vm: VmFd) -> None:
        """kvmclock goes on from where it stood; after the vCPUs have their TSC."""
        self._clock.issue(vm.fd)


def _checked(struct: str, raw: bytes) -> CData:
    if len(raw) != ffi.sizeof(struct):
        raise SnapshotError(f"a {struct} of {len(raw)} bytes instead of {ffi.sizeof(struct)}")
    return _struct(struct, raw)
