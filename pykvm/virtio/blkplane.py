"""The part of a disk that C serves (native/blk.c, blkio.c): its state, and what C leaves to Python. Layer: virtio."""

from __future__ import annotations

import errno
import os

from pykvm._native import ffi, lib
from pykvm.virtio.native import NativeLock, NativeQueue, interrupt_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm._native import CData
    from pykvm.virtio.diskfile import DiskFile
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.queue import Virtqueue

SLOW_NS = 200_000  # how long a request may take before others are not left to wait for it
POLL_NS = 50_000  # the longest time for which an empty queue is watched, where there is a CPU to spare
NOT_DONE = (errno.EAGAIN, errno.ECANCELED, errno.EINTR)  # of a flush: as if it had not been asked for


class BlkPlane:
    """A struct pk_blk, `state`, and one struct pk_blk_queue for each queue once C serves them (`serving`)."""

    def __init__(self) -> None:
        self.state: CData = ffi.new("struct pk_blk *")
        self._queues: list[CData] = []

    @property
    def serving(self) -> bool:
        """Whether C serves the queues."""
        return bool(self._queues)

    def bind(self, transport: VirtioMmio, file: DiskFile, sectors: int, on_ended: Callable[[], object]) -> None:
        """Let C serve the queues; `on_ended` is called on the I/O thread when there may be some for `failed`."""
        state, io = self.state, transport.io
        assert isinstance(transport.lock, NativeLock)
        state.lock, state.fd, state.sectors = transport.lock.handle, file.fd, sectors
        state.readonly = file.readonly
        state.parallel = lib.PK_BLK_ALL if file.direct else lib.PK_BLK_MISSES
        state.unit = file.block_size if file.direct else 1
        state.slow_ns = SLOW_NS
        interrupt_of(transport, state.interrupt)
        state.ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        lib.pk_blk_init(state)
        io.add_reader(state.ended, on_ended)
        io.add_handler(state.ended, ffi.addressof(state, "handler"))
        for queue, kick in zip(transport.queues, transport.kicks, strict=True):
            assert isinstance(queue, NativeQueue)
            entry = ffi.new("struct pk_blk_queue *", {"disk": state, "queue": queue.state, "kick": kick})
            lib.pk_blk_queue_init(entry)
            entry.poll.max_ns = POLL_NS if len(os.sched_getaffinity(0)) > 1 else 0
            self._queues.append(entry)
            io.add_handler(kick, ffi.addressof(entry, "handler"))

    def serve(self, index: int) -> int:
        """Serve a queue for one turn: a PK_BLK_* verdict (native/blk.h)."""
        return int(lib.pk_blk_serve(self._queues[index]))

    def complete(self) -> None:
        """Finish the requests that ended."""
        try:
            os.eventfd_read(self.state.ended)
        except BlockingIOError:  # C was here
            pass
        lib.pk_blk_complete(self.state)

    def failed(self, queues: list[Virtqueue]) -> Iterator[tuple[Virtqueue, int]]:
        """Queue and head of each request that failed, to be served again; a flush's error is in `flush_error`."""
        failed = ffi.new("struct pk_blk_failed *")
        while lib.pk_blk_take_failed(self.state, failed):
            if failed.type == lib.VIRTIO_BLK_T_FLUSH and failed.error not in NOT_DONE:
                self.state.flush_error = failed.error
            for queue in queues:
                if isinstance(queue, NativeQueue) and queue.state == failed.queue:
                    yield queue, failed.head

    def take_flush_error(self) -> int:
        """The errno of a flush that C heard of: the kernel tells it only once."""
        error, self.state.flush_error = int(self.state.flush_error), 0
        return error

    def close(self, transport: VirtioMmio) -> None:
        """Wait until nothing is in flight; give everything back. Only while it is `serving`."""
        with transport.lock:
            lib.pk_blk_deinit(self.state)
        self._queues.clear()
        transport.io.remove_reader(self.state.ended)
        os.close(self.state.ended)
