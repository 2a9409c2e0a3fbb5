"""Page tables: the boot-time identity map, and a walk of whatever tables a guest has made. Layer: x86.

The walk serves crash reports and debuggers: it reads tables that a hostile or broken guest wrote, so it never
raises, ends after at most five levels, and says why where a CPU would fault.

Source: Intel SDM vol. 3A, chapter 4 "Paging": tables 4-4 to 4-6 (32-bit), 4-8 to 4-11 (PAE), 4-14 to 4-20
(4-level and 5-level).
"""

from __future__ import annotations

import struct

from pykvm.x86 import layout
from pykvm.x86.segments import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, EFER_NX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Writable(Protocol):
        """Memory that tables are written to."""

        def write(self, gpa: int, data: bytes, /) -> None:
            """Store `data` at `gpa`."""

    class Readable(Protocol):
        """Memory that tables are read from; both raise ValueError or LookupError outside it."""

        def read_u32(self, gpa: int, /) -> int:
            """The 32-bit little-endian value at `gpa`."""

        def read_u64(self, gpa: int, /) -> int:
            """The 64-bit little-endian value at `gpa`."""


PTE_P, PTE_RW, PTE_US, PTE_PWT, PTE_PCD = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
PTE_A, PTE_D, PTE_PS, PTE_G, PTE_NX = 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
MAX_PHYS_BITS = 52  # the architecture's limit; what a given CPU has is CPUID 0x80000008 EAX[7:0]

IDENTITY_SIZE = 4 << 30  # what build_identity_map maps
_LARGE = 2 << 20

_FLAGS = ((PTE_P, "P"), (PTE_RW, "RW"), (PTE_US, "US"), (PTE_PWT, "PWT"), (PTE_PCD, "PCD"), (PTE_A, "A"))
_LEAF_FLAGS = ((PTE_D, "D"), (PTE_G, "G"))


class _Level:
    """One level of a paging mode: its entry's `name`, the lowest bit and the width of its index, the log2 of
    the page that it maps as a leaf (0: it never is one), and the bits that must be 0 in it whatever it is."""

    __slots__ = ("index_bits", "name", "page_shift", "reserved", "shift")

    def __init__(self, name: str, shift: int, index_bits: int, page_shift: int, reserved: int = 0) -> None:
        self.name = name
        self.shift = shift
        self.index_bits = index_bits
        self.page_shift = page_shift
        self.reserved = reserved


class _Mode:
    """A paging mode: size of an entry in bytes, the bits of CR3 that locate the first table, its levels."""

    __slots__ = ("cr3_mask", "entry_size", "levels", "linear_bits", "name")

    def __init__(self, name: str, entry_size: int, cr3_mask: int, levels: tuple[_Level, ...]) -> None:
        self.name = name
        self.entry_size = entry_size
        self.cr3_mask = cr3_mask
        self.levels = levels
        self.linear_bits = levels[0].shift + levels[0].index_bits


_ADDRESS = (1 << MAX_PHYS_BITS) - 0x1000
_PAGE_TABLES = (_Level("PDE", 21, 9, 21), _Level("PTE", 12, 9, 12))
_LEVELS4 = (_Level("PML4E", 39, 9, 0, PTE_PS), _Level("PDPTE", 30, 9, 30), *_PAGE_TABLES)
_MODE_32BIT = _Mode("32-bit", 4, 0xFFFF_F000, (_Level("PDE", 22, 10, 22), _Level("PTE", 12, 10, 12)))
_MODE_PAE = _Mode("PAE", 8, 0xFFFF_FFE0, (_Level("PDPTE", 30, 2, 0, PTE_NX | 0x1E6), *_PAGE_TABLES))
_MODE_4LEVEL = _Mode("4-level", 8, _ADDRESS, _LEVELS4)
_MODE_5LEVEL = _Mode("5-level", 8, _ADDRESS, (_Level("PML5E", 48, 9, 0, PTE_PS), *_LEVELS4))


def build_identity_map(memory: Writable) -> int:
    """Write tables that map the first 4 GiB to themselves in 2 MiB pages, writable; returns their CR3.

    They take six pages from layout.BOOT_PML4, BOOT_PDPT and BOOT_PD (four consecutive ones).
    """
    link = PTE_P | PTE_RW
    memory.write(layout.BOOT_PML4, struct.pack("<Q4088x", layout.BOOT_PDPT | link))
    directories = range(layout.BOOT_PD | link, layout.BOOT_PD + 0x4000, 0x1000)
    memory.write(layout.BOOT_PDPT, struct.pack("<4Q4064x", *directories))
    pages = range(link | PTE_PS, IDENTITY_SIZE, _LARGE)
    memory.write(layout.BOOT_PD, struct.pack("<2048Q", *pages))
    return layout.BOOT_PML4


class WalkLevel:
    """One entry that the walk read: its `name` (PML4E ... PTE), `gpa`, raw `value` and decoded `flags`."""

    __slots__ = ("flags", "gpa", "name", "value")

    def __init__(self, name: str, gpa: int, value: int, flags: str) -> None:
        self.name = name
        self.gpa = gpa
        self.value = value
        self.flags = flags

    def __repr__(self) -> str:
        return f"{self.name} at {self.gpa:#x}: {self.value:#x} [{self.flags}]"


class Walk:
    """A finished walk of `linear`.

    mode      none, 32-bit, PAE, 4-level or 5-level
    levels    the entries read, from the top
    gpa       the guest physical address, or None: then `reason` says why there is none
    page_size bytes of the page found, 0 without one
    writable, user, executable   what all levels together allow (CR0.WP, SMEP, SMAP and keys aside)
    """

    __slots__ = ("executable", "gpa", "levels", "linear", "mode", "page_size", "reason", "user", "writable")

    def __init__(self, linear: int, mode: str) -> None:
        self.linear = linear
        self.mode = mode
        self.levels: list[WalkLevel] = []
        self.gpa: int | None = None
        self.reason = ""
        self.page_size = 0
        self.writable = self.user = self.executable = True

    def lines(self) -> list[str]:
        """The walk for people: one line per level and one for the result."""
        result = f"-> {self.gpa:#x}" if self.gpa is not None else self.reason
        return [*map(repr, self.levels), f"{self.linear:#x} ({self.mode} paging) {result}"]

    def _fail(self, reason: str) -> None:
        self.reason = reason
        self.writable = self.user = self.executable = False

    def _restrict(self, entry: int) -> None:
        self.writable &= bool(entry & PTE_RW)
        self.user &= bool(entry & PTE_US)
        self.executable &= not entry & PTE_NX


def walk(
    memory: Readable,
    linear: int,
    *,
    cr0: int,
    cr3: int,
    cr4: int,
    efer: int,
    phys_bits: int = MAX_PHYS_BITS,
) -> Walk:
    """Translate `linear` as a CPU with these control registers would; never raises.

    PAE paging reads the PDPTE from memory, where a CPU uses the copy that it made when CR3 was loaded.
    """
    if not cr0 & CR0_PG:
        result = Walk(linear & 0xFFFF_FFFF, "none")
        result.gpa = result.linear
        return result
    mode = _mode(cr4, efer)
    long_mode = mode.linear_bits >= 48
    result = Walk(linear & (0xFFFF_FFFF_FFFF_FFFF if long_mode else 0xFFFF_FFFF), mode.name)
    if long_mode and not is_canonical(result.linear, mode.linear_bits):
        result._fail("is not canonical")
        return result
    table = cr3 & mode.cr3_mask
    for level in mode.levels:
        entry = _read_entry(memory, table, level, mode, result)
        if entry is None:
            break
        leaf = _is_leaf(entry, level, mode, cr4)
        result.levels[-1].flags = _decode(entry, level, leaf)
        reserved = level.reserved | _reserved(level, mode, leaf, efer, phys_bits)
        if not entry & PTE_P:
            result._fail(f"is not present ({level.name})")
            break
        if entry & reserved:
            result._fail(f"has reserved bits {entry & reserved:#x} set in its {level.name}")
            break
        if not (mode is _MODE_PAE and level.shift == 30):  # a PDPTE of PAE paging has no permissions
            result._restrict(entry)
        if leaf:
            result.page_size = 1 << level.page_shift
            result.gpa = _leaf_base(entry, level, mode) | (result.linear & (result.page_size - 1))
            break
        table = entry & _ADDRESS
    return result


def is_canonical(address: int, bits: int) -> bool:
    """Whether bits 63 down to `bits` - 1 of `address` are all equal (`bits`: 48, or 57 with LA57)."""
    return address >> (bits - 1) in (0, (1 << (65 - bits)) - 1)


def _mode(cr4: int, efer: int) -> _Mode:
    if efer & EFER_LMA:
        return _MODE_5LEVEL if cr4 & CR4_LA57 else _MODE_4LEVEL
    return _MODE_PAE if cr4 & CR4_PAE else _MODE_32BIT


def _read_entry(memory: Readable, table: int, level: _Level, mode: _Mode, result: Walk) -> int | None:
    index = (result.linear >> level.shift) & ((1 << level.index_bits) - 1)
    gpa = table + index * mode.entry_size
    try:
        entry = memory.read_u64(gpa) if mode.entry_size == 8 else memory.read_u32(gpa)
    except (ValueError, LookupError):
        result._fail(f"has its {level.name} at {gpa:#x}, outside guest memory")
        return None
    result.levels.append(WalkLevel(level.name, gpa, entry, ""))
    return entry


def _is_leaf(entry: int, level: _Level, mode: _Mode, cr4: int) -> bool:
    if level.page_shift == 12:
        return True
    # bit 7 of a 32-bit PDE is ignored without CR4.PSE; the other modes need no enabling
    return bool(entry & PTE_PS and level.page_shift and (mode is not _MODE_32BIT or cr4 & CR4_PSE))


def _reserved(level: _Level, mode: _Mode, leaf: bool, efer: int, phys_bits: int) -> int:
    """The mask of bits that the mode reserves in an entry: address bits the CPU lacks, offset bits, NX."""
    if mode is _MODE_32BIT:
        # PSE-36: bits 20:13 of a 4 MiB PDE are address bits 39:32, bit 21 is reserved
        return 1 << 21 if leaf and level.page_shift > 12 else 0
    top = 63 if mode is _MODE_PAE else MAX_PHYS_BITS  # bits 62:52 are ignored in long mode only
    reserved = (1 << top) - (1 << phys_bits)
    if leaf and level.page_shift > 12:
        reserved |= (1 << level.page_shift) - (1 << 13)  # bit 12 is PAT
    if not efer & EFER_NX:
        reserved |= PTE_NX
    return reserved


def _leaf_base(entry: int, level: _Level, mode: _Mode) -> int:
    if mode is _MODE_32BIT and level.page_shift > 12:
        return (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32
    return entry & _ADDRESS & -(1 << level.page_shift)


def _decode(entry: int, level: _Level, leaf: bool) -> str:
    if not entry & PTE_P:
        return "not present"
    flags = [text for bit, text in _FLAGS if entry & bit]
    if leaf:
        flags += [text for bit, text in _LEAF_FLAGS if entry & bit]
        if level.page_shift > 12:
            flags.append("PS")
    if entry & PTE_NX:
        flags.append("NX")
    return " ".join(flags)
