"""The boot-time identity map and the page-table walk."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.x86 import layout
from pykvm.x86.paging import build_identity_map, is_canonical, walk
from pykvm.x86.segments import CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME, EFER_NX

PAGING = CR0_PE | CR0_PG
LONG = {"cr0": PAGING, "cr4": CR4_PAE, "efer": EFER_LMA | EFER_LME | EFER_NX}
LA57 = LONG | {"cr4": CR4_PAE | CR4_LA57}
PAE = {"cr0": PAGING, "cr4": CR4_PAE, "efer": EFER_NX}
LEGACY = {"cr0": PAGING, "cr4": CR4_PSE, "efer": 0}


class Memory:
    """One megabyte of guest memory."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def write(self, gpa: int, data: bytes) -> None:
        assert gpa + len(data) <= len(self.bytes)
        self.bytes[gpa : gpa + len(data)] = data

    def _read(self, gpa: int, size: int) -> int:
        if gpa + size > len(self.bytes):
            raise ValueError("outside guest memory")
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")

    def read_u32(self, gpa: int) -> int:
        return self._read(gpa, 4)

    def read_u64(self, gpa: int) -> int:
        return self._read(gpa, 8)

    def entry(self, gpa: int, value: int, size: int = 8) -> None:
        self.write(gpa, value.to_bytes(size, "little"))


@pytest.mark.parametrize("linear", [0, 0x1FFFFF, 0x200000, 0xDEADBEEF, 0x3FFFFFFF, 0x40000000, 0xFFFFFFFF])
def test_identity_map_maps_the_first_4_gib_to_itself(linear: int) -> None:
    """Every address under 4 GiB translates to itself through three levels."""
    memory = Memory()
    result = walk(memory, linear, cr3=build_identity_map(memory), **LONG)
    assert (result.gpa, result.page_size, result.mode) == (linear, 2 << 20, "4-level")
    assert [level.name for level in result.levels] == ["PML4E", "PDPTE", "PDE"]
    assert result.writable and result.executable and not result.user


def test_identity_map_ends_at_4_gib_and_replaces_old_tables() -> None:
    """The first byte past 4 GiB is not mapped, even if the memory was dirty before."""
    memory = Memory()
    memory.bytes[:] = b"\xff" * len(memory.bytes)
    result = walk(memory, 4 << 30, cr3=build_identity_map(memory), **LONG)
    assert result.gpa is None
    assert result.reason == "is not present (PDPTE)"
    assert walk(memory, 1 << 39, cr3=layout.BOOT_PML4, **LONG).reason == "is not present (PML4E)"


def test_identity_map_stays_inside_its_six_pages() -> None:
    """Nothing but [BOOT_PML4, BOOT_PD + 16 KiB) is written."""
    memory = Memory()
    memory.bytes[:] = b"\xa5" * len(memory.bytes)
    build_identity_map(memory)
    assert set(memory.bytes[: layout.BOOT_PML4]) == {0xA5}
    assert set(memory.bytes[layout.BOOT_PD + 0x4000 :]) == {0xA5}


def test_without_paging_the_linear_address_is_physical() -> None:
    """CR0.PG = 0: no table is read and 32 bits of the address count."""
    result = walk(Memory(), 0x1_2345_6789, cr0=CR0_PE, cr3=~0, cr4=0, efer=0)
    assert (result.gpa, result.mode, result.levels) == (0x2345_6789, "none", [])


def test_32bit_walk_of_a_4_kib_page() -> None:
    """Two levels of 4-byte entries; flags of all levels are combined."""
    memory = Memory()
    memory.entry(0x1000 + 4 * 0x300, 0x2067, 4)
    memory.entry(0x2000 + 4 * 0x012, 0xABCD_E105, 4)
    result = walk(memory, 0xC001_2345, cr3=0x1FFF, **LEGACY)
    assert result.gpa == 0xABCD_E345
    assert [(each.name, each.gpa) for each in result.levels] == [("PDE", 0x1C00), ("PTE", 0x2048)]
    assert [each.flags for each in result.levels] == ["P RW US A", "P US G"]
    assert (result.writable, result.user, result.page_size) == (False, True, 4096)


def test_32bit_large_page_needs_cr4_pse() -> None:
    """With CR4.PSE bit 7 makes a 4 MiB page whose bits 20:13 are address bits 39:32; without it, a table."""
    memory = Memory()
    memory.entry(0x1004, 0x0040_0083 | 0x12 << 13, 4)
    assert walk(memory, 0x0051_2345, cr3=0x1000, **LEGACY).gpa == 0x12_0051_2345
    assert walk(memory, 0x0051_2345, cr3=0x1000, **LEGACY | {"cr4": 0}).reason.startswith("has its PTE at")


def test_pae_walk_and_its_pdpte() -> None:
    """PAE starts at a 32-byte aligned table of four entries that carry no permissions."""
    memory = Memory()
    memory.entry(0x1020 + 8 * 3, 0x2001)
    memory.entry(0x2000 + 8 * 1, 0x3007)
    memory.entry(0x3000 + 8 * 2, 0x4_5678_9007 | 1 << 63)
    result = walk(memory, 0xC020_2ABC, cr3=0x103F, **PAE)
    assert result.gpa == 0x4_5678_9ABC
    assert (result.mode, result.writable, result.user, result.executable) == ("PAE", True, True, False)
    memory.entry(0x1020 + 8 * 3, 0x2001 | 1 << 5)
    assert walk(memory, 0xC020_2ABC, cr3=0x103F, **PAE).reason == "has reserved bits 0x20 set in its PDPTE"


@pytest.mark.parametrize(
    ("level", "value", "linear", "gpa"),
    [
        ("PDPTE", 0x40_0000_0083, 0x3F12_3456, 0x40_3F12_3456),
        ("PDE", 0x40_0020_0083, 0x0012_3456, 0x40_0032_3456),
        ("PTE", 0x40_0020_1003, 0x0000_0456, 0x40_0020_1456),
    ],
)
def test_4level_page_sizes(level: str, value: int, linear: int, gpa: int) -> None:
    """1 GiB, 2 MiB and 4 KiB pages end the walk at their level."""
    memory = Memory()
    for at, (name, link) in zip((0x1000, 0x2000, 0x3000, 0x4000), TABLES, strict=True):
        memory.entry(at + 8 * ((linear >> SHIFTS[name]) & 511), value if name == level else link)
    result = walk(memory, linear, cr3=0x1000, **LONG)
    assert (result.gpa, result.levels[-1].name) == (gpa, level)


TABLES = (("PML4E", 0x2003), ("PDPTE", 0x3003), ("PDE", 0x4003), ("PTE", 0))
SHIFTS = {"PML4E": 39, "PDPTE": 30, "PDE": 21, "PTE": 12}


def test_la57_adds_a_level_and_moves_the_canonical_hole() -> None:
    """With CR4.LA57 the walk starts at the PML5, and 57-bit addresses are canonical."""
    memory = Memory()
    linear = 0x00FF_8000_0000_0000
    memory.entry(0x1000 + 8 * 255, 0x9003)
    memory.entry(0x9000 + 8 * 256, 0xA003)
    memory.entry(0xA000, 0x4000_0083)
    result = walk(memory, linear, cr3=0x1000, **LA57)
    assert [level.name for level in result.levels] == ["PML5E", "PML4E", "PDPTE"]
    assert result.gpa == 0x4000_0000
    assert walk(memory, linear, cr3=0x1000, **LONG).reason == "is not canonical"


def test_reserved_bits_are_named() -> None:
    """A large page with offset bits, NX without EFER.NX, address bits the CPU lacks: all are faults."""
    memory = Memory()
    memory.entry(0x1000, 0x2003)
    memory.entry(0x2000, 0x4000_2083)
    assert walk(memory, 0, cr3=0x1000, **LONG).reason == "has reserved bits 0x2000 set in its PDPTE"
    memory.entry(0x2000, 1 << 63 | 0x83)
    assert walk(memory, 0, cr3=0x1000, **LONG).gpa == 0
    assert "0x8000000000000000" in walk(memory, 0, cr3=0x1000, **LONG | {"efer": EFER_LMA}).reason
    memory.entry(0x2000, 1 << 45 | 0x83)
    assert walk(memory, 0, cr3=0x1000, **LONG, phys_bits=40).reason.startswith("has reserved bits")
    memory.entry(0x1000, 0x2083)
    assert walk(memory, 0, cr3=0x1000, **LONG).reason == "has reserved bits 0x80 set in its PML4E"


def test_tables_outside_memory_end_the_walk() -> None:
    """A table that lies beyond memory is reported with its address; the levels so far are kept."""
    memory = Memory()
    memory.entry(0x1000, 0xF_FFFF_FFFF_F003)
    result = walk(memory, 0x1234, cr3=0x1000, **LONG)
    assert (len(result.levels), result.gpa) == (1, None)
    assert result.reason == "has its PDPTE at 0xffffffffff000, outside guest memory"
    assert result.lines()[-1] == f"0x1234 (4-level paging) {result.reason}"


def test_a_table_that_points_to_itself_ends() -> None:
    """The recursive-mapping trick reads the same entry four times and stops."""
    memory = Memory()
    memory.entry(0x1000 + 8 * 510, 0x1003)
    linear = 0xFFFF_0000_0000_0000 | 510 << 39 | 510 << 30 | 510 << 21 | 510 << 12 | 8
    result = walk(memory, linear, cr3=0x1000, **LONG)
    assert (result.gpa, len(result.levels)) == (0x1008, 4)


@pytest.mark.parametrize(
    ("address", "bits", "expected"),
    [
        (0x7FFF_FFFF_FFFF, 48, True),
        (0x8000_0000_0000, 48, False),
        (0xFFFF_8000_0000_0000, 48, True),
        (0xFFFF_7FFF_FFFF_FFFF, 48, False),
        (0x8000_0000_0000, 57, True),
        (0x0100_0000_0000_0000, 57, False),
        (0xFF00_0000_0000_0000, 57, True),
    ],
)
def test_canonical_addresses(address: int, bits: int, expected: bool) -> None:
    """Bits 63 to N-1 are all equal in a canonical address."""
    assert is_canonical(address, bits) is expected


U64 = st.integers(0, (1 << 64) - 1)


@settings(max_examples=200, deadline=None)
@given(
    linear=U64,
    registers=st.fixed_dictionaries({"cr0": U64, "cr3": st.one_of(U64, st.just(0x1000)), "cr4": U64, "efer": U64}),
    table=st.lists(st.one_of(U64, st.sampled_from([0x1003, 0x2007, 0x1083])), min_size=1, max_size=8),
)
def test_no_tables_make_the_walk_raise(linear: int, registers: dict[str, int], table: list[int]) -> None:
    """Whatever registers and tables a guest leaves: at most five levels, and an address or a reason."""
    memory = Memory()
    page = b"".join(each.to_bytes(8, "little") for each in table)
    memory.write(0x1000, (page * 512)[:8192])
    result = walk(memory, linear, **registers)
    assert len(result.levels) <= 5
    assert (result.gpa is None) == bool(result.reason)
    assert result.lines()
