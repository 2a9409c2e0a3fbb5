"""The KVM ioctls by number, and their arguments in words. Layer: debug.

Names, argument types and layouts come from the kernel's header through pykvm._native; nothing here knows a number.
Whatever a process passes is only read as bytes of bounded length.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pykvm._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    ReadMemory = Callable[[int, int], bytes]  # (address, size) -> bytes, fewer where memory ends

FOREIGN = ("KVM_ARM_", "KVM_PPC_", "KVM_S390_", "KVM_ASSIGN_", "KVM_DEASSIGN_")  # share numbers with x86's
NUMBERS = {"int": 4, "__u32": 4, "__u64": 8, "unsigned long": 8}
MAX_ELEMENTS = 1024  # read of one list
SHOWN_ELEMENTS = 6
SMALL = 8  # a structure with up to so many fields is shown whole
MAX_BYTES = 16  # an array of bytes up to this long is shown
COUNTS = ("nent", "nmsrs", "nr", "len")
DECIMAL = frozenset(
    [
        "slot",
        "fd",
        "resamplefd",
        "gsi",
        "irq",
        "level",
        "nr",
        "nent",
        "nmsrs",
        "len",
        "ndata",
        "pin",
        "irqchip",
        "slot",
        "id",
        "xcr",
        "nr_xcrs",
        "num_pages",
    ]
)
# (structure, field) -> prefix of the constants that name its value, or its bits
VALUES = {
    ("kvm_enable_cap", "cap"): "KVM_CAP_",
    ("kvm_create_device", "type"): "KVM_DEV_TYPE_",
    ("kvm_mp_state", "mp_state"): "KVM_MP_STATE_",
    ("kvm_irq_routing_entry", "type"): "KVM_IRQ_ROUTING_",
}
BITS = {
    ("kvm_userspace_memory_region", "flags"): "KVM_MEM_",
    ("kvm_userspace_memory_region2", "flags"): "KVM_MEM_",
    ("kvm_irqfd", "flags"): "KVM_IRQFD_FLAG_",
    ("kvm_ioeventfd", "flags"): "KVM_IOEVENTFD_FLAG_",
    ("kvm_msi", "flags"): "KVM_MSI_",
    ("kvm_guest_debug", "control"): "KVM_GUESTDBG_",
    ("kvm_cpuid_entry2", "flags"): "KVM_CPUID_FLAG_",
    ("kvm_clock_data", "flags"): "KVM_CLOCK_",
}
# (structure, union) -> (field that says which member holds, {constant: member})
UNIONS = {
    ("kvm_irq_routing_entry", "u"): ("type", {"KVM_IRQ_ROUTING_IRQCHIP": "irqchip", "KVM_IRQ_ROUTING_MSI": "msi"}),
}


class Ioctl:
    """One ioctl: its name, and the C type that its argument points to ("void": it is a number)."""

    __slots__ = ("kind", "name", "number", "size")

    def __init__(self, name: str, kind: str, number: int) -> None:
        self.name = name
        self.kind = kind
        self.number = number
        self.size = number >> lib._IOC_SIZESHIFT & (1 << lib._IOC_SIZEBITS) - 1


@cache
def ioctls() -> dict[int, Ioctl]:
    """Every ioctl of the header, by number."""
    table: dict[int, Ioctl] = {}
    for line in ffi.string(lib.pk_kvm_ioctls).decode().splitlines():
        name, _, kind = line.partition(" ")
        number = getattr(lib, name) & 0xFFFFFFFF
        if number not in table or table[number].name.startswith(FOREIGN):
            table[number] = Ioctl(name, kind, number)
    return table


def is_kvm(request: int) -> bool:
    """Whether an ioctl's number is of KVM's type."""
    return (request ^ lib.KVM_GET_API_VERSION) >> lib._IOC_TYPESHIFT & 0xFF == 0


def find(request: int) -> Ioctl:
    """The ioctl; one that the header does not know is named by its number."""
    known = ioctls().get(request & 0xFFFFFFFF)
    return known or Ioctl(f"KVM ioctl {request & 0xFFFFFFFF:#x}", "void", request & 0xFFFFFFFF)


@cache
def named(prefix: str) -> dict[int, str]:
    """Constants with a prefix: value -> name."""
    return {getattr(lib, name): name for name in reversed(dir(lib)) if name.startswith(prefix)}


def argument(ioctl: Ioctl, value: int, read: ReadMemory) -> str:
    """What stands behind the ioctl's argument; "" for one that means nothing."""
    if ioctl.name == "KVM_CHECK_EXTENSION":
        return named("KVM_CAP_").get(value, hex(value))
    if ioctl.name == "KVM_CREATE_VCPU":
        return str(value)
    if ioctl.kind == "void":
        return hex(value) if value else ""
    if not value:
        return "NULL"
    if ioctl.kind in NUMBERS:
        data = read(value, NUMBERS[ioctl.kind])
        return hex(int.from_bytes(data, "little")) if data else hex(value)
    return _structure(ioctl, value, read)


def _structure(ioctl: Ioctl, address: int, read: ReadMemory) -> str:
    try:
        kind = ffi.typeof(ioctl.kind)
    except ffi.error:  # the binding has no need of this one
        return f"{address:#x} /* {ioctl.kind}, {ioctl.size} bytes */"
    size = ffi.sizeof(kind)
    data = read(address, size)
    if len(data) < size:
        return f"{address:#x} /* not readable */"
    name, last = kind.fields[-1]
    if last.type.kind != "array" or last.type.length is not None:
        return render(_from_bytes(f"{ioctl.kind} *", None, data))
    head = _from_bytes(f"{ioctl.kind} *", {name: 0}, data)
    count = next((getattr(head, field) for field, _ in kind.fields if field in COUNTS), 0)
    each = ffi.sizeof(last.type.item)
    data += read(address + last.offset, each * min(count, MAX_ELEMENTS))
    whole = (len(data) - size) // each
    return render(_from_bytes(f"{ioctl.kind} *", {name: whole}, data[: size + whole * each]), whole)


def _from_bytes(pointer: str, initial: dict[str, int] | None, data: bytes) -> Any:
    value = ffi.new(pointer) if initial is None else ffi.new(pointer, initial)
    ffi.memmove(value, data, len(data))
    return value[0]


# -- values in words ---------------------------------------------------------------------------------------------


def render(value: Any, elements: int | None = None, *, short: bool = False) -> str:
    """A structure as {field=value, ...}; in a large one, or with `short`, only the first field may be zero."""
    kind = ffi.typeof(value)
    short = short or len(kind.fields) > SMALL
    parts: list[str] = []
    for name, field in kind.fields:
        text = _field(kind.cname.removeprefix("struct "), name, field.type, value, elements)
        if not short or text not in ("0", "{}") or not parts:
            parts.append(f"{name}={text}")
    return f"{{{', '.join(parts)}}}"


def _field(owner: str, name: str, kind: Any, value: Any, elements: int | None) -> str:
    content = getattr(value, name)
    if kind.kind == "primitive":
        return _number(owner, name, int.from_bytes(content, "little") if isinstance(content, bytes) else content)
    if kind.kind == "struct":
        return "{}" if _is_zero(content) else render(content, short=True)
    if kind.kind == "union":
        return _union(owner, name, value, content)
    if kind.kind == "array":
        return _array(kind, content, elements)
    return hex(int(ffi.cast("uintptr_t", content)))


def _is_zero(content: Any) -> bool:
    return not any(bytes(ffi.buffer(ffi.addressof(content))))


def _number(owner: str, name: str, number: int) -> str:
    if (owner, name) in VALUES:
        return named(VALUES[owner, name]).get(number, hex(number))
    if (owner, name) in BITS:
        return bits(number, BITS[owner, name])
    return str(number) if name in DECIMAL or -10 < number < 10 else hex(number)


def bits(number: int, prefix: str) -> str:
    """Flags as A|B|0x100."""
    parts: list[str] = []
    for value, name in sorted(named(prefix).items()):
        if value and value & (value - 1) == 0 and number & value:
            parts.append(name)
            number &= ~value
    return "|".join(parts + ([hex(number)] if number else [])) or "0"


def _union(owner: str, name: str, value: Any, content: Any) -> str:
    field, members = UNIONS.get((owner, name), ("", {}))
    for constant, member in members.items():
        if getattr(value, field) == getattr(lib, constant):
            return render(getattr(content, member), short=True)
    size = ffi.sizeof(ffi.typeof(content))
    return "{}" if _is_zero(content) else f"<{size} bytes>"


def _array(kind: Any, content: Any, elements: int | None) -> str:
    length = kind.length if kind.length is not None else elements or 0
    if kind.item.kind == "primitive" and ffi.sizeof(kind.item) == 1:
        data = bytes(ffi.buffer(content, length))
        return "0" if not any(data) else data.hex() if length <= MAX_BYTES else f"<{length} bytes>"
    shown = [_element(kind.item, content[i]) for i in range(min(length, SHOWN_ELEMENTS))]
    if length > SHOWN_ELEMENTS:
        shown.append(f"... {length - SHOWN_ELEMENTS} more")
    return "0" if kind.length is not None and set(shown[:SHOWN_ELEMENTS]) <= {"0", "{}"} else f"[{', '.join(shown)}]"


def _element(kind: Any, value: Any) -> str:
    if kind.kind in ("struct", "union"):
        return "{}" if _is_zero(value) else render(value, short=True)
    if kind.kind == "array":
        return _array(kind, value, None)
    return hex(value) if value else "0"
