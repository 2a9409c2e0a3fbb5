"""Megabytes into guest memory, quickly. Layer: boot.

Page faults, not copies, are what loading a kernel costs: huge pages make them 500 times fewer, and a page of
zeros that is never written needs none at all.
"""

from __future__ import annotations

import mmap

from pykvm.errors import GuestAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.core.memory import GuestMemory, Slot

PAGE = 4096
_ZERO_PAGE = bytes(PAGE)


def clear(memory: GuestMemory, start: int, end: int) -> None:
    """Make [start, end) zero by giving its pages back to the host: memory never touched stays so."""
    for slot, low, high in _parts(memory, start, end):
        first = min(_align_up(low), high)
        last = max(high & -PAGE, first)
        slot.view[low:first] = bytes(first - low)
        slot.view[last:high] = bytes(high - last)
        if first < last:
            try:
                slot.advise(mmap.MADV_DONTNEED if slot.fd < 0 else mmap.MADV_REMOVE, first, last - first)
            except OSError:  # a backing that cannot punch holes
                memory.fill(slot.gpa + first, last - first)


def prefer_huge_pages(memory: GuestMemory, start: int, end: int) -> None:
    """Ask for transparent huge pages behind [start, end), about to be filled. A hint: it cannot fail."""
    for slot, low, high in _parts(memory, start, end):
        first = low & -PAGE
        try:
            slot.advise(mmap.MADV_HUGEPAGE, first, _align_up(high) - first)
        except OSError:
            return  # a kernel without them


def write_sparse(memory: GuestMemory, gpa: int, data: bytes | bytearray) -> None:
    """Write `data` to memory that is zero already, leaving out its pages of zeros."""
    view = memoryview(data)
    pending = None  # where the run of pages that are not zero began
    for at in range(0, len(data), PAGE):
        if data.startswith(_ZERO_PAGE, at):
            if pending is not None:
                memory.write(gpa + pending, view[pending:at])
                pending = None
        elif pending is None:
            pending = at
    if pending is not None:
        memory.write(gpa + pending, view[pending:])


def _parts(memory: GuestMemory, start: int, end: int) -> Iterator[tuple[Slot, int, int]]:
    """(slot, low, high) offsets of each slot's part of [start, end)."""
    at = start
    while at < end:
        slot = memory.slot_at(at)
        if slot is None:
            raise GuestAddressError(start, end - start)
        stop = min(end, slot.end)
        yield slot, at - slot.gpa, stop - slot.gpa
        at = stop


def _align_up(value: int) -> int:
    return (value + PAGE - 1) & -PAGE
