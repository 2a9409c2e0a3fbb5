"""Clearing and filling large ranges of guest memory."""

from __future__ import annotations

import mmap
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import MIB, make_memory

from pykvm.boot.bulk import clear, prefer_huge_pages, write_sparse
from pykvm.core.memory import GuestMemory
from pykvm.errors import GuestAddressError

PAGE = 4096


@pytest.mark.parametrize("memfd", [False, True])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (PAGE, 5 * PAGE),
        (PAGE + 1, 5 * PAGE - 1),
        (PAGE + 1, PAGE + 9),
        (PAGE - 1, PAGE + 1),
        (PAGE, PAGE),
        (9, 2 * PAGE),
    ],
)
def test_clear(memfd: bool, start: int, end: int) -> None:
    """Exactly [start, end) is zero afterwards, whatever its alignment and the backing."""
    memory = make_memory(MIB, memfd=memfd)
    memory.fill(0, MIB, 0xEE)
    clear(memory, start, end)
    assert memory.read(0, MIB) == b"\xee" * start + bytes(end - start) + b"\xee" * (MIB - end)


def test_clear_where_pages_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are overwritten."""
    memory = make_memory(MIB)
    memory.fill(0, MIB, 0xEE)

    class NoAdvice:
        """A mapping whose kernel knows no madvise."""

        def madvise(self, *_: Any) -> None:
            raise OSError

    slot = memory.slots[0]
    real, slot.map = slot.map, NoAdvice()  # type: ignore[assignment]
    clear(memory, 100, 9 * PAGE)
    prefer_huge_pages(memory, 0, MIB)
    slot.map = real
    assert memory.read(0, 10 * PAGE) == b"\xee" * 100 + bytes(9 * PAGE - 100) + b"\xee" * PAGE


def test_clear_crosses_slots_and_stops_at_holes() -> None:
    """Two slots side by side are cleared in one go; a range into a hole is refused."""
    memory = make_memory(MIB)
    memory.add(MIB, MIB)
    memory.fill(0, 2 * MIB, 0xEE)
    clear(memory, MIB - 10, MIB + PAGE + 10)
    assert memory.read(MIB - 11, PAGE + 22) == b"\xee" + bytes(PAGE + 20) + b"\xee"
    with pytest.raises(GuestAddressError):
        clear(memory, MIB, 3 * MIB)


def resident(memory: GuestMemory) -> int:
    """Pages of the first slot that the host has allocated: bit 63 of each entry of the process's pagemap."""
    slot = memory.slots[0]
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(slot.hva // PAGE * 8)
        entries = struct.unpack(f"<{slot.size // PAGE}Q", file.read(slot.size // PAGE * 8))
    return sum(entry >> 63 for entry in entries)


def test_clear_and_sparse_writes_allocate_nothing_for_zeros() -> None:
    """Clearing untouched memory and writing zeros to it leaves it untouched."""
    memory = make_memory(64 * MIB)
    clear(memory, 0, 64 * MIB)
    write_sparse(memory, 0, bytes(32 * MIB) + b"x" * PAGE)
    assert resident(memory) <= 1
    memory.fill(0, 8 * MIB, 1)
    clear(memory, 0, 8 * MIB)
    assert resident(memory) <= 1


@given(
    st.lists(st.sampled_from([bytes(PAGE), b"\1" * PAGE, bytes(PAGE - 1) + b"\2"]), max_size=8),
    st.binary(max_size=9),
    st.integers(0, 3 * PAGE),
)
def test_write_sparse_writes_what_write_would(pages: list[bytes], tail: bytes, gpa: int) -> None:
    """On memory that is zero the result is that of a plain write."""
    data = b"".join(pages) + tail
    memory = make_memory(MIB)
    write_sparse(memory, gpa, data)
    assert memory.read(0, MIB) == (bytes(gpa) + data).ljust(MIB, b"\0")
    memory.close()


def test_huge_pages_are_a_hint() -> None:
    """Asking for them changes no byte."""
    memory = make_memory(8 * MIB)
    memory.write(5000, b"here")
    prefer_huge_pages(memory, 5001, 7 * MIB + 1)
    assert memory.read(5000, 4) == b"here"
    assert hasattr(mmap, "MADV_HUGEPAGE")
