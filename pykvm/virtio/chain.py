"""One request of a driver: a descriptor chain as buffers of guest memory. Layer: virtio."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Bytes = bytes | bytearray | memoryview


class Chain:
    """The buffers of one descriptor chain, in order, straight in guest memory.

    readable   memoryviews of what the driver wrote, for os.writev and os.pwritev
    writable   memoryviews of what the device fills, for os.readv and os.preadv
    head       the chain's first descriptor, its name in the used ring

    The driver may change its buffers at any time: read a field once, then check it.
    """

    __slots__ = ("generation", "head", "readable", "writable")

    def __init__(self, head: int, readable: list[memoryview], writable: list[memoryview], generation: int = 0) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.generation = generation

    @property
    def readable_size(self) -> int:
        """Bytes that the driver wrote."""
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        """Bytes that the device may fill."""
        return sum(map(len, self.writable))

    def read(self, size: int | None = None, offset: int = 0) -> bytes:
        """A copy of up to `size` readable bytes from `offset` on, fewer where the chain is shorter.

        Name a size: a chain of a hostile driver has up to 4 GiB.
        """
        return b"".join(slices(self.readable, offset, size))

    def write(self, data: Bytes, offset: int = 0) -> int:
        """Copy `data` to the writable buffers at `offset`; the bytes that found room."""
        source = memoryview(data).cast("B")
        done = 0
        for piece in slices(self.writable, offset, len(source)):
            piece[:] = source[done : done + len(piece)]
            done += len(piece)
        return done


def slices(buffers: Sequence[memoryview], offset: int = 0, size: int | None = None) -> list[memoryview]:
    """The parts of `buffers` that hold their bytes [offset, offset + size), or all from `offset` on."""
    found = []
    left = sum(map(len, buffers)) if size is None else size
    for buffer in buffers:
        if left <= 0:
            break
        if offset >= len(buffer):
            offset -= len(buffer)
            continue
        piece = buffer[offset : offset + left]
        found.append(piece)
        left -= len(piece)
        offset = 0
    return found
