"""A disk image whose changes stay in memory. Layer: virtio.

The image is mapped copy-on-write: the kernel keeps what was written as this process's own pages, and a snapshot of the
disk is what a snapshot of memory is (core.memimage). The file itself is opened for reading, which any number of
machines may do; who holds it for writing is refused, so that it cannot change or shrink under the mapping.
"""

from __future__ import annotations

import mmap
import os

from pykvm._native import lib
from pykvm.core.memimage import Backing, Extent, SlotImage, capture, install, revert
from pykvm.core.memory import PAGE_SIZE, Slot, release
from pykvm.core.state import Kind
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.diskfile import DiskFile, move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Layers(Kind):
    """What a disk's state holds of its overlay: a SlotImage, or None without one.

    That of a snapshot file has no base: it holds what is other than in the disk's image, which is not in the file.
    """

    def __init__(self) -> None:
        super().__init__("the content of an overlay")

    def accepts(self, value: object) -> bool:
        """Such an object, or None."""
        return value is None or isinstance(value, SlotImage)


class OverlayFile(DiskFile):
    """A DiskFile that is written in memory. Raises ConfigError.

    The memory is accessed through /proc/self/mem: should somebody cut the file short, a page of the mapping that is no
    longer there is EIO for the guest, where touching it would be SIGBUS for pykvm.
    """

    _mem = -1

    def __init__(self, path: str) -> None:
        super().__init__(path, readonly=True)
        self.readonly = False
        size = (self.size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        try:
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE)
            self._slot = Slot(0, 0, size, memory, "disk", False, -1)
            base = Backing(os.dup(self.plain_fd))
            install(self._slot, SlotImage(0, 0, size, "disk", False, [Extent(0, size, base, 0)], base))
            self._mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, SnapshotError) as error:
            self.close()
            raise ConfigError("disk", f"{path}: cannot be mapped: {error}") from None

    def close(self) -> None:
        """Forget what was written."""
        slot = getattr(self, "_slot", None)
        if slot is not None and slot.image is not None:
            release(slot)
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1
        super().close()

    def freeze(self) -> SlotImage:
        """The content now; this file goes on as a copy-on-write user of it. Raises SnapshotError."""
        try:
            return capture(self._slot)
        except OSError as error:  # EFAULT: a page that is not in the image any more
            raise SnapshotError(f"{self.path}: the overlay cannot be kept: {error.strerror}") from None

    def be(self, image: SlotImage) -> None:
        """Have this content. Raises SnapshotError when it is that of another disk."""
        if not image.fits(self._slot):
            raise SnapshotError(f"{self.path}: the snapshot's disk has {image.size} bytes")
        if image.base is None:
            image = image.upon(Backing(os.dup(self.plain_fd)))
        if self._slot.image is image:
            revert(self._slot)
        else:
            install(self._slot, image)

    # -- moving data: offsets were checked against `size` ---------------------------------------------------------

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` from `offset` on."""
        self._access(os.preadv, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int, *, sync: bool = False) -> None:
        """Store `buffers` at `offset`; there is nothing to sync."""
        self._access(os.pwritev, buffers, offset)

    def _access(self, function: Callable[..., int], buffers: Sequence[memoryview], offset: int) -> None:
        try:
            move(lambda part, at: function(self._mem, part, at), buffers, self._slot.hva + offset)
        except OSError as error:
            raise OSError(error.errno, "the file was cut short: it ends before the disk does") from None

    def flush(self) -> None:
        """Memory has no other place to go to."""

    def discard(self, offset: int, length: int) -> None:
        """The content of discarded sectors is undefined: let it be."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeroes."""
        self.write([memoryview(bytes(length))], offset)
