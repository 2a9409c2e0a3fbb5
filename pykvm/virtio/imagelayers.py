"""What guests write to an image that stays as it is: layers in memory over it, each a qcow2 image. Layer: virtio.

Source: QEMU docs/interop/qcow2.txt, "Header". A layer is written by one machine's daemon; a snapshot freezes it, and
every machine that goes on from there has a new one over it. Layers are memfds: nothing of them outlives their users.
"""

from __future__ import annotations

import os
import struct

from pykvm.core.state import Kind
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CLUSTER = 1 << 16
L1_COVERS = CLUSTER // 8 * CLUSTER  # bytes of the disk for each entry of the L1 table
MAX_LAYERS = 32  # a chain of files that each read of the daemon may have to go down
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to and including snapshots_offset


class Layer:
    """An image of `size` bytes in which nothing is written yet; closed when nobody refers to it any more."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("pykvm-layer", os.MFD_CLOEXEC)
        entries = -(-size // L1_COVERS)
        header = HEADER.pack(b"QFI\xfb", 2, 0, 0, 16, size, 0, entries, 3 * CLUSTER, CLUSTER, 1, 0, 0)
        table = -(-8 * entries // CLUSTER)  # clusters of the L1 table, which is the last part
        counts = struct.pack(">H", 1) * (3 + table)
        for number, data in enumerate((header, struct.pack(">Q", 2 * CLUSTER), counts)):
            os.pwrite(self.fd, data, number * CLUSTER)
        os.ftruncate(self.fd, (3 + table) * CLUSTER)
        self._table = table * CLUSTER

    @property
    def empty(self) -> bool:
        """Whether nothing was written: the L1 table, which begins with the fourth cluster, names no cluster."""
        return not any(os.pread(self.fd, self._table, 3 * CLUSTER))

    def __del__(self) -> None:
        os.close(self.fd)


class Layers(Kind):
    """What a snapshot in memory has of a disk: its frozen layers, the lowest first; None of a disk without."""

    def __init__(self) -> None:
        super().__init__("the layers of a disk, or nothing")

    def accepts(self, value: object) -> bool:
        """A tuple of them, or None."""
        return value is None or (type(value) is tuple and all(isinstance(each, Layer) for each in value))


class Stack:
    """The layers of one disk of `size` bytes: `frozen` ones, and over them the one that is written."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.frozen: tuple[Layer, ...] = ()
        self.top = Layer(size)

    def freeze(self) -> tuple[Layer, ...]:
        """The layers as they are now; what is written from now on goes into a new one. The daemon has ended."""
        if self.top.empty:
            return self.frozen
        if len(self.frozen) >= MAX_LAYERS:
            raise SnapshotError(f"the disk is {MAX_LAYERS} snapshots deep: restore one, or fork, instead")
        self.frozen = (*self.frozen, self.top)
        self.top = Layer(self.size)
        return self.frozen

    def be(self, frozen: Sequence[Layer]) -> None:
        """Have these, and nothing written since."""
        self.frozen = tuple(frozen)
        self.top = Layer(self.size)

    @property
    def fds(self) -> list[int]:
        """What the daemon needs."""
        return [layer.fd for layer in (*self.frozen, self.top)]

    def words(self, base: str, top: str) -> list[str]:
        """Options of qemu-storage-daemon that lay them over the node `base`; the uppermost is the node `top`."""
        words: list[str] = []
        below = base
        for number, fd in enumerate(self.fds):
            last = number == len(self.frozen)
            mode = f"read-only={'off' if last else 'on'},discard=unmap"
            name = top if last else f"layer{number}"
            words += ["--blockdev", f"driver=file,node-name=memory{number},filename=/dev/fd/{fd},locking=off,{mode}"]
            words += ["--blockdev", f"driver=qcow2,node-name={name},file=memory{number},backing={below},{mode}"]
            below = name
        return words
