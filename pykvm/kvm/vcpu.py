"""A vCPU's file descriptor: one method per ioctl. Layer: kvm.

Structures with many fields travel as the kernel's own struct (cffi cdata); opaque ones as bytes. vCPU ioctls belong
on the vCPU's own thread while it runs; a paused vCPU may be read from anywhere in the process.
"""

from __future__ import annotations

from pykvm._native import ffi, lib
from pykvm.errors import KvmError
from pykvm.kvm.devicefd import Attributes
from pykvm.kvm.stats import read_stats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pykvm._native import CData


class VcpuFd(Attributes):
    """An open vCPU (KVM_CREATE_VCPU). KVM_RUN itself is in native/runloop.c."""

    __slots__ = ("id",)

    def __init__(self, fd: int, vcpu_id: int) -> None:
        super().__init__(fd)
        self.id = vcpu_id

    def _get(self, name: str, struct: str) -> CData:
        state = ffi.new(f"{struct} *")
        self.ioctl(name, state)
        return state

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the vCPU (4.37)."""
        request = ffi.new("struct kvm_enable_cap *")
        request.cap = capability
        for i, value in enumerate(args):
            request.args[i] = value
        self.ioctl("KVM_ENABLE_CAP", request)

    # -- registers ----------------------------------------------------------------------------------------------

    def get_regs(self) -> CData:
        """KVM_GET_REGS (4.11): struct kvm_regs."""
        return self._get("KVM_GET_REGS", "struct kvm_regs")

    def set_regs(self, regs: CData) -> None:
        """KVM_SET_REGS (4.12)."""
        self.ioctl("KVM_SET_REGS", regs)

    def get_sregs(self) -> CData:
        """KVM_GET_SREGS (4.13): struct kvm_sregs."""
        return self._get("KVM_GET_SREGS", "struct kvm_sregs")

    def set_sregs(self, sregs: CData) -> None:
        """KVM_SET_SREGS (4.14)."""
        self.ioctl("KVM_SET_SREGS", sregs)

    def get_sregs2(self) -> CData:
        """KVM_GET_SREGS2 (4.131): struct kvm_sregs2, with the PDPTRs."""
        return self._get("KVM_GET_SREGS2", "struct kvm_sregs2")

    def set_sregs2(self, sregs: CData) -> None:
        """KVM_SET_SREGS2 (4.132)."""
        self.ioctl("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> CData:
        """KVM_GET_FPU (4.22): struct kvm_fpu."""
        return self._get("KVM_GET_FPU", "struct kvm_fpu")

    def set_fpu(self, fpu: CData) -> None:
        """KVM_SET_FPU (4.23)."""
        self.ioctl("KVM_SET_FPU", fpu)

    def get_xsave(self, size: int = 4096) -> bytes:
        """KVM_GET_XSAVE (4.42), or KVM_GET_XSAVE2 (4.134) when `size` (KVM_CAP_XSAVE2) is above 4096."""
        area = ffi.new("uint8_t[]", max(size, 4096))
        self.ioctl("KVM_GET_XSAVE2" if size > 4096 else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area))

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE (4.43)."""
        self.ioctl("KVM_SET_XSAVE", ffi.new("uint8_t[]", area))

    def get_xcrs(self) -> dict[int, int]:
        """KVM_GET_XCRS (4.44): XCR number -> value."""
        state = self._get("KVM_GET_XCRS", "struct kvm_xcrs")
        return {state.xcrs[i].xcr: state.xcrs[i].value for i in range(state.nr_xcrs)}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_XCRS (4.45)."""
        state = ffi.new("struct kvm_xcrs *")
        state.nr_xcrs = len(values)
        for i, (number, value) in enumerate(values.items()):
            state.xcrs[i].xcr, state.xcrs[i].value = number, value
        self.ioctl("KVM_SET_XCRS", state)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (4.18): the readable ones among `indices`. Set the CPUID first (Linux 6.13 and later)."""
        values: dict[int, int] = {}
        left = list(indices)
        while left:
            table = ffi.new("struct kvm_msrs *", {"entries": len(left)})
            table.nmsrs = len(left)
            for i, index in enumerate(left):
                table.entries[i].index = index
            done = self.ioctl("KVM_GET_MSRS", table)
            values.update((table.entries[i].index, table.entries[i].data) for i in range(done))
            left = left[done + 1 :]  # the one that stopped it cannot be read here
        return values

    def set_msrs(self, values: Mapping[int, int]) -> list[int]:
        """KVM_SET_MSRS (4.19): the indices that KVM refused."""
        refused: list[int] = []
        left = list(values.items())
        while left:
            table = ffi.new("struct kvm_msrs *", {"entries": len(left)})
            table.nmsrs = len(left)
            for i, (index, value) in enumerate(left):
                table.entries[i].index, table.entries[i].data = index, value
            done = self.ioctl("KVM_SET_MSRS", table)
            refused += [index for index, _ in left[done : done + 1]]
            left = left[done + 1 :]
        return refused

    def set_cpuid2(self, entries: Sequence[Sequence[int]]) -> None:
        """KVM_SET_CPUID2 (4.39 ff.): (function, index, flags, eax, ebx, ecx, edx) each; before the first run."""
        self.set_cpuid_table(cpuid_table(entries))

    def set_cpuid_table(self, table: CData) -> None:
        """The same from a `cpuid_table`, which many vCPUs may use."""
        self.ioctl("KVM_SET_CPUID2", table)

    def get_cpuid2(self) -> list[tuple[int, ...]]:
        """KVM_GET_CPUID2: what the guest sees now."""
        table = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
        table.nent = 256
        self.ioctl("KVM_GET_CPUID2", table)
        found = (table.entries[i] for i in range(table.nent))
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in found]

    def get_debugregs(self) -> CData:
        """KVM_GET_DEBUGREGS (4.33 ff.): struct kvm_debugregs."""
        return self._get("KVM_GET_DEBUGREGS", "struct kvm_debugregs")

    def set_debugregs(self, state: CData) -> None:
        """KVM_SET_DEBUGREGS."""
        self.ioctl("KVM_SET_DEBUGREGS", state)

    # -- interrupts and events ----------------------------------------------------------------------------------

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC (4.57): the 1 KiB register page."""
        return bytes(ffi.buffer(self._get("KVM_GET_LAPIC", "struct kvm_lapic_state")))

    def set_lapic(self, registers: bytes) -> None:
        """KVM_SET_LAPIC (4.58)."""
        state = ffi.new("struct kvm_lapic_state *")
        if len(registers) != ffi.sizeof("struct kvm_lapic_state"):
            raise ValueError(f"a local APIC has {ffi.sizeof('struct kvm_lapic_state')} bytes of registers")
        ffi.memmove(state, registers, len(registers))
        self.ioctl("KVM_SET_LAPIC", state)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE (4.38): KVM_MP_STATE_RUNNABLE, _HALTED, _UNINITIALIZED, ..."""
        return int(self._get("KVM_GET_MP_STATE", "struct kvm_mp_state").mp_state)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE (4.39)."""
        self.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", (state,)))

    def get_events(self) -> CData:
        """KVM_GET_VCPU_EVENTS (4.31): struct kvm_vcpu_events."""
        return self._get("KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events")

    def set_events(self, events: CData) -> None:
        """KVM_SET_VCPU_EVENTS (4.32)."""
        self.ioctl("KVM_SET_VCPU_EVENTS", events)

    def nmi(self) -> None:
        """KVM_NMI (4.64)."""
        self.ioctl_value("KVM_NMI")

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT (4.16): queue an external interrupt; without an in-kernel irqchip only."""
        self.ioctl("KVM_INTERRUPT", ffi.new("struct kvm_interrupt *", (vector,)))

    def set_guest_debug(self, control: int, debug_registers: Sequence[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG (4.87): control is KVM_GUESTDBG_*; debug_registers are DR0 to DR7."""
        request = ffi.new("struct kvm_guest_debug *")
        request.control = control
        for i, value in enumerate(debug_registers):
            request.arch.debugreg[i] = value
        self.ioctl("KVM_SET_GUEST_DEBUG", request)

    # -- the rest -----------------------------------------------------------------------------------------------

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE (4.17): the GPA of a linear address in the vCPU's current mode, None if it is not mapped."""
        request = ffi.new("struct kvm_translation *")
        request.linear_address = linear
        self.ioctl("KVM_TRANSLATE", request)
        return int(request.physical_address) if request.valid else None

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (4.56); 0 where KVM cannot tell."""
        try:
            return self.ioctl_value("KVM_GET_TSC_KHZ")
        except KvmError:
            return 0

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (4.55)."""
        self.ioctl_value("KVM_SET_TSC_KHZ", khz)

    def set_signal_mask(self, mask: bytes) -> None:
        """KVM_SET_SIGNAL_MASK (4.20): the kernel's sigset (8 bytes) blocked during KVM_RUN."""
        state = ffi.new("struct kvm_signal_mask *", {"sigset": len(mask)})
        state.len = len(mask)
        ffi.memmove(state.sigset, mask, len(mask))
        self.ioctl("KVM_SET_SIGNAL_MASK", state)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (4.69): tell the guest that it was paused, so that its watchdogs forgive."""
        self.ioctl_value("KVM_KVMCLOCK_CTRL")

    def get_nested_state(self, size: int) -> bytes:
        """KVM_GET_NESTED_STATE (4.114); `size` is KVM_CAP_NESTED_STATE."""
        area = ffi.new("uint8_t[]", max(size, ffi.sizeof("struct kvm_nested_state")))
        state = ffi.cast("struct kvm_nested_state *", area)
        state.size = len(area)
        self.ioctl("KVM_GET_NESTED_STATE", area)
        return bytes(ffi.buffer(area, state.size))

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE (4.115)."""
        self.ioctl("KVM_SET_NESTED_STATE", ffi.new("uint8_t[]", state))

    def stats(self) -> dict[str, int | list[int]]:
        """KVM_GET_STATS_FD (4.133) of the vCPU."""
        return read_stats(self.ioctl_value("KVM_GET_STATS_FD"))


def cpuid_table(entries: Sequence[Sequence[int]]) -> CData:
    """A struct kvm_cpuid2 of (function, index, flags, eax, ebx, ecx, edx) rows."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": len(entries)})
    table.nent = len(entries)
    for i, values in enumerate(entries):
        entry = table.entries[i]
        entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx = values
    return table


SYNC_REGS = lib.KVM_SYNC_X86_REGS
SYNC_SREGS = lib.KVM_SYNC_X86_SREGS
SYNC_EVENTS = lib.KVM_SYNC_X86_EVENTS
