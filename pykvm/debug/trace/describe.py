"""What a trace record says, in words; names of ports, pages and RIPs. Layer: debug."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm._native import lib
from pykvm.kvm.exits import reason_name
from pykvm.x86.layout import PAGE_SIZE

if TYPE_CHECKING:
    from pykvm.debug.symbols import Symbols
    from pykvm.debug.trace.tracefile import Record, TraceFile

# reasons whose address is not a place -> what it is
ADDRESS_IS = {
    lib.KVM_EXIT_HYPERCALL: "nr",
    lib.KVM_EXIT_SYSTEM_EVENT: "type",
    lib.KVM_EXIT_INTERNAL_ERROR: "suberror",
    lib.KVM_EXIT_FAIL_ENTRY: "hardware reason",
    lib.KVM_EXIT_IOAPIC_EOI: "vector",
    lib.KVM_EXIT_DEBUG: "pc",
}
MSRS = (lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR)


class Names:
    """Names of places: device regions by the trace's own comments, code by symbols."""

    def __init__(self, trace: TraceFile | None = None, symbols: Symbols | None = None) -> None:
        self._symbols = symbols
        self._regions: list[tuple[str, int, int, str]] = []
        regions = trace.meta.get("regions") if trace is not None else None
        for each in regions if isinstance(regions, list) else []:
            match each:
                case [str(space), int(base), int(length), str(name)]:
                    self._regions.append((space, base, length, name))

    def device(self, space: str, address: int) -> str:
        """The device at a port ("port") or GPA ("MMIO"); "" where none is known."""
        for own, base, length, name in self._regions:
            if own == space and base <= address < base + length:
                return name
        return ""

    def code(self, rip: int) -> str:
        """ "main+0x10", or the number."""
        return self._symbols.describe(rip) if self._symbols is not None else hex(rip)

    def function(self, rip: int) -> str:
        """The symbol alone, or the number."""
        found = self._symbols.find(rip) if self._symbols is not None else None
        return found[0].name if found else hex(rip)


def describe(record: Record, names: Names | None = None) -> str:
    """One exit without its times: "IO out 0x3f8 1 byte = 0x41 (COM1)"."""
    reason, direction = record.reason, "out" if record.write else "in"
    if reason == lib.KVM_EXIT_IO:
        return f"IO {direction} {record.address:#x}{_data(record)}{_at(names, 'port', record.address)}"
    if reason == lib.KVM_EXIT_MMIO:
        direction = "write" if record.write else "read"
        return f"MMIO {direction} {record.address:#x}{_data(record)}{_at(names, 'MMIO', record.address)}"
    name = reason_name(reason)
    if reason in MSRS:
        return f"{name} {record.address:#x} = {record.value:#x}"
    if reason in ADDRESS_IS:
        return f"{name} {ADDRESS_IS[reason]} {record.address:#x}"
    return name


def place(record: Record) -> tuple[str, int] | None:
    """("port", number) or ("page", GPA of the page) of an access; None for other exits."""
    if record.reason == lib.KVM_EXIT_IO:
        return "port", record.address
    if record.reason == lib.KVM_EXIT_MMIO:
        return "page", record.address & -PAGE_SIZE
    return None


def _data(record: Record) -> str:
    many = f" x {record.elements}" if record.elements != 1 else ""
    value = f" = {record.value:#x}" + ("..." if record.size * record.elements > 8 else "")
    return f" {record.size} byte{'s' if record.size != 1 else ''}{many}{value}"


def _at(names: Names | None, space: str, address: int) -> str:
    name = names.device(space, address) if names is not None else ""
    return f" ({name})" if name else ""
