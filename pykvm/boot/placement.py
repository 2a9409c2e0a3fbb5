"""Where a boot module or an initial RAM disk may go: the highest free place in usable RAM. Layer: boot.

Ranges are half-open (start, end) pairs of GPAs. Nothing here touches memory.
"""

from __future__ import annotations

from pykvm.boot.image import E820_RAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.core.memory import GuestMemory

    Range = tuple[int, int]

PAGE = 4096
NO_LIMIT = 1 << 64


def ram_ranges(memory: GuestMemory, e820: Sequence[tuple[int, int, int]] = ()) -> list[Range]:
    """What a loader may write: the RAM entries of `e820` (without one: everything) that writable slots back.

    The result is sorted; ranges that touch are one, because a loader's data may cross from slot to slot.
    """
    slots = merge((slot.gpa, slot.end) for slot in memory.slots if not slot.readonly)
    if not e820:
        return slots
    usable = merge((base, base + size) for base, size, kind in e820 if kind == E820_RAM)
    shared = (
        (max(start, low), min(end, high))
        for start, end in usable
        for low, high in slots
        if max(start, low) < min(end, high)
    )
    return merge(shared)


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same addresses as a sorted list of ranges that neither overlap nor touch; empty ranges vanish."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def fits(ranges: Iterable[Range], start: int, end: int) -> bool:
    """Whether [start, end) lies inside one of `ranges`."""
    return any(low <= start and end <= high for low, high in ranges)


def overlapping(used: Iterable[Range], start: int, end: int) -> Range | None:
    """The first of `used` that shares a byte with [start, end), or None."""
    return next(((low, high) for low, high in used if low < end and start < high), None)


def highest_fit(
    ranges: Iterable[Range],
    used: Iterable[Range],
    size: int,
    *,
    align: int = PAGE,
    limit: int = NO_LIMIT,
) -> int | None:
    """The highest GPA where `size` bytes fit, or None.

    The place is a multiple of `align` (a power of two), lies in one range, overlaps nothing in `used`
    and ends at or below `limit`, the first address that may not be occupied.

    A size of 0 is placed as one byte, so that an empty module still has an address of its own.
    """
    taken = merge(used)
    size = max(size, 1)
    for low, high in reversed(merge(ranges)):
        start = _align_down(min(high, limit) - size, align)
        for busy_low, busy_high in reversed(taken):
            if busy_low < start + size and start < busy_high:
                start = _align_down(busy_low - size, align)
        if start >= low:
            return start
    return None


def _align_down(address: int, align: int) -> int:
    return address & ~(align - 1)
