"""The kinds of registers that gdb sees: how each is got from KVM's structures and put there. Layer: debug.

Sources: FXSAVE, Intel SDM vol. 1 10.5; XSAVE, vol. 1 13.4.
"""

from __future__ import annotations

from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData
    from pykvm.core.vcpu import Vcpu

XSTATE_BV = 512  # in the XSAVE header
XSTATE_X87, XSTATE_SSE, XSTATE_AVX = 1 << 0, 1 << 1, 1 << 2
FTW = 4
AVX_OFFSET = 576  # of the upper halves in the standard format (CPUID leaf 0xD, subleaf 2, EBX)
MSR_KERNEL_GS_BASE = 0xC0000102


class Snapshot:
    """All registers of one vCPU, read when first needed. `store` writes back what was changed."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.fd = vcpu.fd
        self._parts: dict[str, CData] = {}
        self._changed: set[str] = set()
        self._xsave: bytearray | None = None

    def part(self, name: str, *, change: bool = False) -> CData:
        """KVM's structure: regs or sregs."""
        if name not in self._parts:
            self._parts[name] = self.fd.get_regs() if name == "regs" else self.fd.get_sregs()
        if change:
            self._changed.add(name)
        return self._parts[name]

    @property
    def xsave(self) -> bytearray:
        """x87, SSE and AVX. (KVM_GET_FPU would do for most, but leaves out MXCSR.)"""
        if self._xsave is None:
            self._xsave = bytearray(self.fd.get_xsave())
        return self._xsave

    def use(self, component: int) -> None:
        """A component of the XSAVE area was changed: it is no longer in its initial state."""
        value = int.from_bytes(self.xsave[XSTATE_BV : XSTATE_BV + 8], "little") | component
        self.xsave[XSTATE_BV : XSTATE_BV + 8] = value.to_bytes(8, "little")
        self._changed.add("xsave")

    def store(self) -> None:
        """Write back, as few ioctls as can be. Raises KvmError when KVM refuses a value."""
        if "sregs" in self._changed:
            self.fd.set_sregs(self._parts["sregs"])
        if "regs" in self._changed:
            self.fd.set_regs(self._parts["regs"])
        if "xsave" in self._changed:
            self.fd.set_xsave(bytes(self.xsave))
        self._changed.clear()


class Register:
    """One register as gdb sees it: name, size in bits, type, and how to get and set its bytes (little-endian)."""

    __slots__ = ("bits", "get", "group", "name", "put", "type")

    def __init__(
        self,
        name: str,
        bits: int,
        kind: str,
        get: Callable[[Snapshot], int],
        put: Callable[[Snapshot, int], None],
        group: str = "",
    ) -> None:
        self.name = name
        self.bits = bits
        self.type = kind
        self.group = group
        self.get = get
        self.put = put

    @property
    def size(self) -> int:
        """In bytes."""
        return self.bits // 8

    def xml(self) -> str:
        """Its line in the target description."""
        group = f' group="{self.group}"' if self.group else ""
        return f'<reg name="{self.name}" bitsize="{self.bits}" type="{self.type}"{group}/>'


# -- one function for each kind of register --------------------------------------------------------------------


def general(name: str, bits: int, field: str, kind: str) -> Register:
    def put(values: Snapshot, value: int) -> None:
        setattr(values.part("regs", change=True), field, value)

    return Register(name, bits, kind, lambda values: int(getattr(values.part("regs"), field)), put)


def program_counter(bits: int) -> Register:
    """The linear address of the next instruction: gdb knows no segments."""

    def get(values: Snapshot) -> int:
        cs = values.part("sregs").cs
        linear: int = (0 if cs.l else cs.base) + values.part("regs").rip
        return linear

    def put(values: Snapshot, value: int) -> None:
        cs = values.part("sregs").cs
        base = 0 if cs.l else cs.base
        values.part("regs", change=True).rip = (value - base) & ((1 << bits) - 1)

    return Register("rip" if bits == 64 else "eip", bits, "code_ptr", get, put)


def selector(name: str) -> Register:
    def put(values: Snapshot, value: int) -> None:
        sregs = values.part("sregs", change=True)
        if sregs.cr0 & 1 and not values.part("regs").rflags & 1 << 17:
            raise UsageError("a selector cannot be loaded in protected mode: no descriptor is read")
        segment = getattr(sregs, name)
        segment.selector, segment.base = value & 0xFFFF, (value & 0xFFFF) << 4

    return Register(name, 32, "int32", lambda values: int(getattr(values.part("sregs"), name).selector), put)


def area(name: str, kind: str, offset: int, size: int, component: int, *, bits: int = 0, group: str = "") -> Register:
    """`size` bytes at `offset` of the XSAVE area, which gdb sees as `bits`."""

    def get(values: Snapshot) -> int:
        return int.from_bytes(values.xsave[offset : offset + size], "little")

    def put(values: Snapshot, value: int) -> None:
        values.xsave[offset : offset + size] = (value & (1 << size * 8) - 1).to_bytes(size, "little")
        values.use(component)

    return Register(name, bits or size * 8, kind, get, put, group)


def tag_word() -> Register:
    """The x87 tag word of FXSAVE's one-bit form: 00 in use, 11 empty (SDM vol. 1 10.5.1.1)."""

    def get(values: Snapshot) -> int:
        in_use = values.xsave[FTW]
        return sum((0 if in_use >> index & 1 else 3) << 2 * index for index in range(8))

    def put(values: Snapshot, value: int) -> None:
        values.xsave[FTW] = sum((value >> 2 * index & 3 != 3) << index for index in range(8))
        values.use(XSTATE_X87)

    return Register("ftag", 32, "int", get, put, "float")


def x87() -> list[Register]:
    def field(name: str, offset: int, size: int) -> Register:
        return area(name, "int", offset, size, XSTATE_X87, bits=32, group="float")

    stack = [area(f"st{index}", "i387_ext", 32 + 16 * index, 10, XSTATE_X87) for index in range(8)]
    return [
        *stack, field("fctrl", 0, 2), field("fstat", 2, 2), tag_word(), field("fiseg", 12, 2), field("fioff", 8, 4),
        field("foseg", 20, 2), field("fooff", 16, 4), field("fop", 6, 2),
    ]  # fmt: skip


def segment_base(name: str) -> Register:
    def put(values: Snapshot, value: int) -> None:
        getattr(values.part("sregs", change=True), name).base = value

    return Register(f"{name}_base", 64, "int", lambda values: int(getattr(values.part("sregs"), name).base), put)


def control(name: str) -> Register:
    kind = f"pykvm_{name}" if name in ("cr0", "cr4", "efer") else "int64"

    def put(values: Snapshot, value: int) -> None:
        setattr(values.part("sregs", change=True), name, value)

    return Register(name, 64, kind, lambda values: int(getattr(values.part("sregs"), name)), put, "system")


def table_register(name: str, field: str) -> Register:
    bits = 64 if field == "base" else 32

    def get(values: Snapshot) -> int:
        return int(getattr(getattr(values.part("sregs"), name), field))

    def put(values: Snapshot, value: int) -> None:
        table = getattr(values.part("sregs", change=True), name)
        setattr(table, field, value & 0xFFFF if field == "limit" else value)

    return Register(f"{name}_{field}", bits, f"int{bits}", get, put, "system")


def kernel_gs_base() -> Register:
    def get(values: Snapshot) -> int:
        return values.fd.get_msrs([MSR_KERNEL_GS_BASE]).get(MSR_KERNEL_GS_BASE, 0)

    def put(values: Snapshot, value: int) -> None:
        if values.fd.set_msrs({MSR_KERNEL_GS_BASE: value}):
            raise UsageError("KVM refuses this base")

    return Register("k_gs_base", 64, "int64", get, put, "system")
