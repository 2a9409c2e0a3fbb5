"""Where modules and initial RAM disks are put."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.boot.image import E820_ACPI, E820_RAM, E820_RESERVED
from pykvm.boot.placement import fits, highest_fit, merge, overlapping, ram_ranges

MIB = 1 << 20


def memory_of(*slots: tuple[int, int, bool]) -> Any:
    """What ram_ranges looks at in a GuestMemory: (gpa, end, readonly) of each slot."""
    return SimpleNamespace(slots=[SimpleNamespace(gpa=g, end=e, readonly=ro) for g, e, ro in slots])


@pytest.mark.parametrize(
    ("used", "size", "align", "limit", "expected"),
    [
        ([], 0x1000, 0x1000, 1 << 64, 0xFF000),
        ([], 0x1001, 0x1000, 1 << 64, 0xFE000),
        ([], 0, 0x1000, 1 << 64, 0xFF000),
        ([], 0x100000, 0x1000, 1 << 64, 0),
        ([], 0x100001, 0x1000, 1 << 64, None),
        ([], 0x1000, 0x1000, 0x80000, 0x7F000),
        ([], 0x1000, 0x1000, 0x7FFFF, 0x7E000),
        ([], 0x1000, 0x1000, 0xFFF, None),
        ([], 1, 1, 0x1234, 0x1233),
        ([(0xFF000, 0x100000)], 0x1000, 0x1000, 1 << 64, 0xFE000),
        ([(0xFE000, 0xFF000)], 0x1000, 0x1000, 1 << 64, 0xFF000),
        ([(0xFE000, 0xFF000)], 0x2000, 0x1000, 1 << 64, 0xFC000),
        ([(0xF0000, 0xFF800), (0xE0001, 0xE0002)], 0x10000, 0x1000, 1 << 64, 0xD0000),
        ([(0, 0x100000)], 1, 1, 1 << 64, None),
        ([(0, 1)], 0x100000, 0x1000, 1 << 64, None),
    ],
)
def test_highest_fit(used: Any, size: int, align: int, limit: int, expected: int | None) -> None:
    """The place is the highest aligned one below the limit that avoids what is used, or None."""
    assert highest_fit([(0, 0x100000)], used, size, align=align, limit=limit) == expected


def test_lower_range_is_tried_when_the_highest_is_too_small() -> None:
    """A range that cannot hold the module does not end the search."""
    assert highest_fit([(0, 16 * MIB), (32 * MIB, 33 * MIB)], [], 2 * MIB) == 14 * MIB


def test_touching_ranges_hold_one_module() -> None:
    """Two slots side by side are one piece of RAM."""
    assert highest_fit([(MIB, 2 * MIB), (0, MIB)], [], 2 * MIB) == 0


def test_merge_sorts_joins_and_drops_empty() -> None:
    """Overlapping, touching, nested, unsorted and empty ranges come out as the plain set of addresses."""
    assert merge([(8, 9), (5, 5), (0, 4), (4, 6), (1, 2), (7, 3)]) == [(0, 6), (8, 9)]


def test_ram_ranges_without_e820_are_the_writable_slots() -> None:
    """Firmware slots are no place for a module."""
    memory = memory_of((0, MIB, False), (4 * MIB, 5 * MIB, True), (MIB, 2 * MIB, False))
    assert ram_ranges(memory) == [(0, 2 * MIB)]


def test_ram_ranges_are_the_e820_ram_that_slots_back() -> None:
    """Reserved entries and RAM entries without memory behind them are left out."""
    memory = memory_of((0, 8 * MIB, False))
    e820 = [
        (0, 0x9FC00, E820_RAM),
        (0x9FC00, 0x400, E820_RESERVED),
        (0xE0000, 0x20000, E820_ACPI),
        (MIB, 6 * MIB, E820_RAM),
        (7 * MIB, 16 * MIB, E820_RAM),
    ]
    assert ram_ranges(memory, e820) == [(0, 0x9FC00), (MIB, 8 * MIB)]


def test_fits_and_overlapping() -> None:
    """Containment takes one whole range; overlap takes one shared byte."""
    assert fits([(0, 4), (6, 9)], 6, 9)
    assert not fits([(0, 4), (4, 9)], 3, 5)
    assert overlapping([(0, 4), (6, 9)], 4, 6) is None
    assert overlapping([(0, 4), (6, 9)], 3, 7) == (0, 4)


RANGES = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), max_size=5)


@given(RANGES, RANGES, st.integers(0, 20), st.sampled_from([1, 2, 4, 8]), st.integers(0, 70))
def test_highest_fit_equals_trying_every_address(
    ranges: list[tuple[int, int]], used: list[tuple[int, int]], size: int, align: int, limit: int
) -> None:
    """The answer is what a search over all addresses finds."""
    free = {a for low, high in ranges for a in range(low, high)} - {a for low, high in used for a in range(low, high)}
    need = max(size, 1)
    fitting = [at for at in range(0, 65, align) if at + need <= limit and all(at + i in free for i in range(need))]
    assert highest_fit(ranges, used, size, align=align, limit=limit) == max(fitting, default=None)
