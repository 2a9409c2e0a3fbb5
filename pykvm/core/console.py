"""Where a guest's console output goes: remembered, and passed on. Layer: core."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

KEEP = 1 << 20  # bytes remembered: a guest that prints for ever must not grow the host


class Console:
    """The output of one machine's consoles, in order. `write` is a device's sink, called on any thread."""

    def __init__(self, sink: Callable[[bytes], object] | None = None) -> None:
        self.sink = sink
        self.total = 0
        self._tail = bytearray()
        self._lock = threading.Lock()  # innermost: nothing is called under it
        self.flushers: list[Callable[[], object]] = []
        self._writers: set[int] = set()  # threads inside `sink`, which hold their device's lock

    def write(self, data: bytes) -> None:
        """Take output of the guest."""
        with self._lock:
            self.total += len(data)
            self._tail += data
            if len(self._tail) > 2 * KEEP:
                del self._tail[:-KEEP]
        if self.sink is not None:
            self._writers.add(threading.get_ident())
            try:
                self.sink(data)
            finally:
                self._writers.discard(threading.get_ident())

    def flush(self) -> None:
        """Fetch what devices still hold back (rings filled by C); nothing when a sink calls it: it is told anyway."""
        if threading.get_ident() in self._writers:
            return
        for flusher in self.flushers:
            flusher()

    @property
    def data(self) -> bytes:
        """The last bytes (at least the last MiB) that the guest wrote."""
        self.flush()
        with self._lock:
            return bytes(self._tail)

    @property
    def text(self) -> str:
        """`data` as text; bytes that are no UTF-8 become U+FFFD."""
        return self.data.decode("utf-8", "replace")
