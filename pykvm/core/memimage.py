"""Frozen guest memory, which machines share copy-on-write. Layer: core; loaded by the first snapshot.

A SlotImage is the content of a slot at one moment: extents of files (memfds, a snapshot on disk) that nobody writes any
more. `install` maps it over a slot's memory by MAP_PRIVATE, in place: host addresses, memslots and views stay valid,
and from then on the machine's own pages are exactly those that it, its devices or the host wrote. The kernel knows them
(/proc/self/pagemap), so nothing has to be logged while the guest runs, and that is what the two other verbs use:

capture   memory -> image. A memfd that was shared becomes the image itself; otherwise the own pages are copied into a
          memfd that lies over the image below, and the slot is mapped on the new image.
revert    back to the installed image, by giving the own pages back.

Source: mmap(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os

from pykvm._native import ffi, lib
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.core.memory import GuestMemory, Slot

    Range = tuple[int, int]  # [start, end), page-aligned bytes

MERGE = 64 << 10  # own pages that are nearer than this become one extent, with what lies between them
MAX_EXTENTS = 128  # of a slot: each is a mapping of every machine that uses the image
MAX_ON_BASE = 8192  # of an image over a file that may be much larger than memory: flat, all of that would be copied
COPY = 1 << 20  # bytes at a time


class Backing:
    """A file descriptor that is closed when no image refers to it any more. `outside`: others may change the file."""

    __slots__ = ("fd", "outside")

    def __init__(self, fd: int, *, outside: bool = False) -> None:
        self.fd = fd
        self.outside = outside

    def __del__(self) -> None:
        os.close(self.fd)


class Extent:
    """[start, end) of a slot is in `backing` from `offset` on."""

    __slots__ = ("backing", "end", "offset", "start")

    def __init__(self, start: int, end: int, backing: Backing, offset: int) -> None:
        self.start = start
        self.end = end
        self.backing = backing
        self.offset = offset


class SlotImage:
    """A slot's frozen content. What no extent holds is zero. Immutable.

    `base` is a file (a disk's image) that it was made over, and that whoever needs the image has as well.
    """

    __slots__ = ("base", "extents", "gpa", "index", "name", "readonly", "size")

    def __init__(
        self,
        index: int,
        gpa: int,
        size: int,
        name: str,
        readonly: bool,
        extents: Iterable[Extent],
        base: Backing | None = None,
    ) -> None:
        self.base = base
        self.index = index
        self.gpa = gpa
        self.size = size
        self.name = name
        self.readonly = readonly
        self.extents = tuple(sorted(extents, key=lambda each: each.start))

    def fits(self, slot: Slot) -> bool:
        """Whether `slot` is the same place of guest memory."""
        return (self.gpa, self.size, self.readonly) == (slot.gpa, slot.size, slot.readonly)

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the image, by offset."""
        data = bytearray(length)
        for each in self.extents:
            low, high = max(each.start, start), min(each.end, start + length)
            if low < high:
                piece = os.pread(each.backing.fd, high - low, each.offset + low - each.start)
                data[low - start : low - start + len(piece)] = piece
        return bytes(data)

    def flat(self) -> SlotImage:
        """The same content in one memfd, for an image of so many extents that mapping them would cost more."""
        backing = new_memfd(self)
        for start, end in self.data_ranges():
            for at in range(start, end, COPY):
                os.pwrite(backing.fd, self.read(at, min(COPY, end - at)), at)
        return self._with([Extent(0, self.size, backing, 0)], self.base)

    def upon(self, base: Backing) -> SlotImage:
        """The extents over that file, from its start on, instead of over zeros."""
        below = cut([Extent(0, self.size, base, 0)], [(each.start, each.end) for each in self.extents])
        image = self._with([*below, *self.extents], base)
        return image if len(image.extents) <= MAX_ON_BASE else image.flat()

    def under(self) -> SlotImage | None:
        """`base` alone, if there is one."""
        return self._with([Extent(0, self.size, self.base, 0)], self.base) if self.base is not None else None

    def _with(self, extents: Iterable[Extent], base: Backing | None) -> SlotImage:
        return SlotImage(self.index, self.gpa, self.size, self.name, self.readonly, extents, base)

    def data_ranges(self) -> list[Range]:
        """The parts of the slot that may be other than zero, ascending."""
        found: list[Range] = []
        for each in self.extents:
            shift = each.start - each.offset
            for start, end in file_data(each.backing.fd, each.offset, each.offset + each.end - each.start):
                found.append((start + shift, end + shift))
        return found


def file_data(fd: int, start: int, end: int) -> list[Range]:
    """The parts of [start, end) of a file that are no holes (lseek(2), SEEK_DATA)."""
    found = []
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            break
        if at >= end:
            break
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        found.append((at, hole))
        at = hole
    return found


# -- the process's view of its own pages -------------------------------------------------------------------------------

_pagemap: list[tuple[int, int]] = []  # (pid, fd): after os.fork the parent's would show the parent's pages
_room = [1024]


def own_ranges(start: int, end: int) -> tuple[object, int]:
    """The pages of host addresses [start, end) that this process alone has: (struct pk_range[], count)."""
    if not _pagemap or _pagemap[0][0] != os.getpid():
        try:
            _pagemap[:] = [(os.getpid(), os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))]
        except OSError as error:
            raise SnapshotError(f"snapshots need /proc/self/pagemap: {error.strerror}") from None
    while True:
        ranges = ffi.new("struct pk_range[]", _room[0])
        count = lib.pk_private_ranges(_pagemap[0][1], start, end, ranges, _room[0])
        if count >= 0:
            return ranges, count
        if count != -7:  # E2BIG
            raise SnapshotError(f"/proc/self/pagemap: {os.strerror(-count)}")
        _room[0] *= 8


def _merged(ranges: object, count: int, base: int) -> list[Range]:
    """Ranges of addresses as offsets from `base`, small gaps closed."""
    merged: list[Range] = []
    for i in range(count):
        start, end = ranges[i].start - base, ranges[i].end - base  # type: ignore[index]
        if merged and start - merged[-1][1] < MERGE:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


# -- the verbs ---------------------------------------------------------------------------------------------------------


def install(slot: Slot, image: SlotImage, within: Iterable[Range] | None = None) -> None:
    """Map `image` over the slot's memory; its own pages are dropped. `within` limits that to these parts."""
    if slot.copied:
        from pykvm.core.memshared import copy_in

        copy_in(slot, image)
        return
    slot.close_fd()
    pieces = [(each, each.start, each.end) for each in image.extents]
    if within is not None:
        pieces = [
            (each, max(each.start, start), min(each.end, end))
            for start, end in within
            for each in image.extents
            if each.start < end and start < each.end
        ]
    for each, start, end in pieces:
        address = ffi.cast("void *", slot.hva + start)
        result = lib.pk_map_private(address, end - start, each.backing.fd, each.offset + start - each.start)
        if result < 0:
            raise SnapshotError(f"cannot map {end - start} bytes of {slot.name}: {os.strerror(-result)}")
    slot.image = image
    outside = [(each.backing.fd, each.offset + each.end - each.start) for each in image.extents if each.backing.outside]
    if outside or slot.guard is not None:
        from pykvm.core.filememory import watch

        watch(slot, outside)


def revert(slot: Slot) -> None:
    """Give back the slot's own pages: it is as its installed image again."""
    ranges, count = own_ranges(slot.hva, slot.hva + slot.size)
    result = lib.pk_drop(ranges, count)
    if result < 0:
        raise SnapshotError(f"cannot reset {slot.name}: {os.strerror(-result)}")


def capture(slot: Slot) -> SlotImage:
    """Freeze the slot's content; nobody may write it meanwhile. The slot goes on as a copy-on-write user of it."""
    if slot.copied:
        from pykvm.core.memshared import copy_out

        return copy_out(slot)
    if slot.fd >= 0:  # was shared: the file is the content
        backing = Backing(slot.fd)
        slot.fd = -1
        image = over(slot, [Extent(0, slot.size, backing, 0)])
        install(slot, image)
        return image
    below: SlotImage | None = slot.image
    ranges, count = own_ranges(slot.hva, slot.hva + slot.size)
    if below is not None and not count:
        return below
    own = _merged(ranges, count, slot.hva)
    extents = below.extents if below is not None else ()
    most = MAX_EXTENTS if below is None or below.base is None else MAX_ON_BASE
    flatten = below is None or len(extents) + 2 * len(own) > most
    backing = new_memfd(slot)
    for start, end in below.data_ranges() if flatten and below is not None else ():
        copy_part(slot, backing, start, end)  # what is own there is in the slot's memory already
    for start, end in own:
        copy_part(slot, backing, start, end)
    if flatten:
        image = over(slot, [Extent(0, slot.size, backing, 0)])
        install(slot, image)
    else:
        image = over(slot, [*cut(extents, own), *(Extent(start, end, backing, start) for start, end in own)])
        install(slot, image, own)
    return image


def over(slot: Slot, extents: Iterable[Extent]) -> SlotImage:
    """An image of the slot with this content."""
    base = slot.image.base if slot.image is not None else None
    return SlotImage(slot.index, slot.gpa, slot.size, slot.name, slot.readonly, extents, base)


def new_memfd(slot: Slot | SlotImage) -> Backing:
    """A file of that size, all of it a hole."""
    backing = Backing(os.memfd_create(f"pykvm-{slot.name}", os.MFD_CLOEXEC))
    os.ftruncate(backing.fd, slot.size)
    return backing


def copy_part(slot: Slot, backing: Backing, start: int, end: int) -> None:
    """Write that part of the slot's memory at the same place of the file."""
    for at in range(start, end, COPY):
        with slot.view[at : min(at + COPY, end)] as piece:
            done = 0
            while done < len(piece):
                done += os.pwrite(backing.fd, piece[done:], at + done)


def cut(extents: Iterable[Extent], holes: list[Range]) -> list[Extent]:
    """The extents without what lies in `holes` (ascending)."""
    left = []
    for each in extents:
        at = each.start
        for start, end in holes:
            if end <= at or start >= each.end:
                continue
            if start > at:
                left.append(Extent(at, start, each.backing, each.offset + at - each.start))
            at = max(at, end)
        if at < each.end:
            left.append(Extent(at, each.end, each.backing, each.offset + at - each.start))
    return left


def apart(one: SlotImage, other: SlotImage) -> list[Range]:
    """The parts that two images of one slot do not have from the same place of the same file: all that may differ.

    Ascending, in multiples of MERGE; none of them twice.
    """
    edges = sorted(
        {0, one.size, *(at for image in (one, other) for each in image.extents for at in (each.start, each.end))}
    )
    found: list[Range] = []
    ours, theirs = _homes(one, edges), _homes(other, edges)
    for start, end, mine, yours in zip(edges, edges[1:], ours, theirs, strict=False):
        if mine != yours:
            low, high = start // MERGE * MERGE, min((end + MERGE - 1) // MERGE * MERGE, one.size)
            if found and low <= found[-1][1]:
                found[-1] = (found[-1][0], max(high, found[-1][1]))
            else:
                found.append((low, high))
    return found


def _homes(image: SlotImage, edges: list[int]) -> list[tuple[Backing, int] | None]:
    """Where each stretch from one edge to the next comes from: (file, offset of the slot's start in it), None: zero."""
    homes: list[tuple[Backing, int] | None] = []
    extents = iter(image.extents)
    each = next(extents, None)
    for start in edges[:-1]:
        while each is not None and each.end <= start:
            each = next(extents, None)
        inside = each is not None and each.start <= start
        homes.append((each.backing, each.offset - each.start) if each is not None and inside else None)
    return homes


def check_hugepages(memory: GuestMemory) -> None:
    """Raise SnapshotError for memory that cannot be mapped anew page by page."""
    if memory.memfd and memory.hugepages:
        raise SnapshotError("memory of hugetlbfs pages cannot be frozen: leave out memfd or hugepages")
