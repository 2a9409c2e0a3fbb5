"""Registers of a paused vCPU as attributes. Layer: core."""

from __future__ import annotations

from pykvm._native import ffi
from pykvm.x86.segments import GPR_NAMES, SEGMENT_NAMES, CpuState, DescriptorTable, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData

_SEGMENT_FIELDS = (
    "base",
    "limit",
    "selector",
    "type",
    "s",
    "dpl",
    "present",
    "avl",
    "l",
    "db",
    "g",
    "unusable",
)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")


class Registers:
    """The fields of a kernel structure, read once and written through: `vcpu.regs.rip += 1`.

    Names are the structure's own (struct kvm_regs: rax ... r15, rip, rflags). Assigning stores the whole structure.
    """

    __slots__ = ("_store", "_struct")

    def __init__(self, struct: CData, store: Callable[[CData], None]) -> None:
        self._struct: CData
        self._store: Callable[[CData], None]
        object.__setattr__(self, "_struct", struct)
        object.__setattr__(self, "_store", store)

    if TYPE_CHECKING:
        rax: int
        rbx: int
        rcx: int
        rdx: int
        rsi: int
        rdi: int
        rsp: int
        rbp: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int
        rip: int
        rflags: int

    else:

        def __getattr__(self, name):
            return getattr(self._struct, name)

    def __setattr__(self, name: str, value: int) -> None:
        self.update(**{name: value})

    def update(self, **values: int) -> None:
        """Set several at once, with one ioctl."""
        for name, value in values.items():
            setattr(self._struct, name, value & 0xFFFF_FFFF_FFFF_FFFF)
        self._store(self._struct)

    def as_dict(self) -> dict[str, int]:
        """All general registers by name."""
        return {name: getattr(self._struct, name) for name in GPR_NAMES}

    def __repr__(self) -> str:
        return "<" + " ".join(f"{name}={value:#x}" for name, value in self.as_dict().items()) + ">"


def state_to_kvm(state: CpuState, regs: CData, sregs: CData) -> None:
    """Fill struct kvm_regs and struct kvm_sregs (or _sregs2) from a CpuState; other fields stay."""
    ffi.memmove(regs, bytes(ffi.sizeof(regs[0])), ffi.sizeof(regs[0]))
    for name, value in state.gprs.items():
        setattr(regs, name, value)
    for name in SEGMENT_NAMES:
        source, target = getattr(state, name), getattr(sregs, name)
        for field in _SEGMENT_FIELDS:
            setattr(target, field, getattr(source, field))
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        table.base, table.limit = getattr(state, name).base, getattr(state, name).limit
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))


def state_from_kvm(regs: CData, sregs: CData) -> CpuState:
    """A CpuState of what the vCPU has now."""
    state = CpuState()
    state.gprs = {name: getattr(regs, name) for name in GPR_NAMES}
    for name in SEGMENT_NAMES:
        source = getattr(sregs, name)
        setattr(state, name, Segment(**{field: getattr(source, field) for field in _SEGMENT_FIELDS}))
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        setattr(state, name, DescriptorTable(table.base, table.limit))
    for name in _CONTROL:
        setattr(state, name, getattr(sregs, name))
    return state
