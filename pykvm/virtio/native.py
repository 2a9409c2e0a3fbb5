"""What a device needs to let C serve its queues: a queue whose state both sides share, and a lock. Layer: virtio.

A device with `native = True` gets these from its transport. C (native/virtqueue.c) walks the rings with the checks of
queue.py, and leaves to Python whatever it does not understand.
"""

from __future__ import annotations

from pykvm._native import ffi, lib
from pykvm.virtio.queue import Virtqueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.core.memory import GuestMemory
    from pykvm.virtio.mmio import VirtioMmio


class NativeLock:
    """A recursive lock that C can take; waiting for it does not hold the GIL."""

    def __init__(self) -> None:
        handle = lib.pk_mutex_new()
        if handle == ffi.NULL:
            raise MemoryError("lock")
        self.handle: CData = ffi.gc(handle, lib.pk_mutex_free)

    def __enter__(self) -> None:
        lib.pk_mutex_lock(self.handle)

    def __exit__(self, *exc: object) -> None:
        lib.pk_mutex_unlock(self.handle)


class NativeQueue(Virtqueue):
    """A Virtqueue with its state in a struct pk_virtqueue, `state`: Python and C take turns under the device's lock."""

    def __init__(self, index: int, max_size: int, memory: GuestMemory) -> None:
        self.state: CData = ffi.new("struct pk_virtqueue *")
        self.state.memory = memory.native
        super().__init__(index, max_size, memory)

    def enable(self, features: int) -> None:
        """Map the rings for both. Raises DriverFault."""
        super().enable(features)
        state = self.state
        state.desc = ffi.cast("uint8_t *", ffi.from_buffer(self._desc))
        state.avail = ffi.cast("uint16_t *", ffi.from_buffer(self._avail))
        state.used = ffi.cast("uint16_t *", ffi.from_buffer(self._used))
        state.size, state.event_idx, state.indirect = self.size, self._event_idx, self._indirect
        state.enabled = 1

    def release(self) -> None:
        """Drop the views of guest memory."""
        self._forget_rings()
        super().release()

    def reset(self) -> None:
        """Back to the state before the driver set it up."""
        self._forget_rings()
        super().reset()

    def _forget_rings(self) -> None:
        state = self.state
        state.enabled = 0
        state.desc = state.avail = state.used = ffi.NULL

    @property
    def next_avail(self) -> int:
        """The next entry of the available ring to look at."""
        return int(self.state.next_avail)

    @next_avail.setter
    def next_avail(self, value: int) -> None:
        self.state.next_avail = value

    @property
    def next_used(self) -> int:
        """The next entry of the used ring to fill."""
        return int(self.state.next_used)

    @next_used.setter
    def next_used(self, value: int) -> None:
        self.state.next_used = value

    @property
    def signalled(self) -> int:
        """`next_used` when the driver was last interrupted."""
        return int(self.state.signalled)

    @signalled.setter
    def signalled(self, value: int) -> None:
        self.state.signalled = value


def interrupt_of(transport: VirtioMmio, interrupt: CData) -> None:
    """Fill in a struct pk_interrupt."""
    interrupt.status, interrupt.call = transport.interrupt_status, transport.call
