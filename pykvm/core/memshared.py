"""Frozen memory of machines whose memory other processes have mapped. Layer: core; loaded by their first snapshot.

The back ends of vhost-user devices write guest memory through memfds: a slot cannot become a copy-on-write user of an
image (core.memimage): a snapshot copies what the memfd holds, and a restore copies it back.
"""

from __future__ import annotations

import os

from pykvm._native import lib
from pykvm.core.memimage import COPY, Extent, SlotImage, copy_part, file_data, new_memfd, over

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.memory import Slot


def copy_out(slot: Slot) -> SlotImage:
    """The slot's content in a memfd of its own; holes stay holes."""
    backing = new_memfd(slot)
    for start, end in file_data(slot.fd, 0, slot.size):
        copy_part(slot, backing, start, end)
    return over(slot, [Extent(0, slot.size, backing, 0)])


def copy_in(slot: Slot, image: SlotImage) -> None:
    """Have the image's content, in the same memfd."""
    at = 0
    for start, end in image.data_ranges():
        _clear(slot, at, start)
        for place in range(start, end, COPY):
            data = image.read(place, min(COPY, end - place))
            with slot.view[place : place + len(data)] as piece:
                piece[:] = data
        at = end
    _clear(slot, at, slot.size)


def _clear(slot: Slot, start: int, end: int) -> None:
    """Make a hole."""
    if start < end:
        result = lib.pk_fallocate(slot.fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, start, end - start)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
