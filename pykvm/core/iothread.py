"""The machine's one I/O thread: epoll, timers, and calls from other threads. Layer: core.

Started when first needed. Callbacks run on the thread, one at a time; one that raises stops the machine through
`on_error`, never the thread. A callback may come once more after its fd was readable for another: expect EAGAIN.
"""

from __future__ import annotations

import os
import select
import threading
from bisect import insort
from time import monotonic

from pykvm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData

    Callback = Callable[[], object]


MANY_TIMERS = 64
MANY_EVENTS = 32  # taken from epoll at once


class Timer:
    """A pending call; `cancel()` may come from any thread, and then it does not run (again)."""

    __slots__ = ("callback", "cancelled", "due")

    def __init__(self, due: float, callback: Callback) -> None:
        self.due = due
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Forget the call."""
        self.cancelled = True

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


class IoThread:
    """epoll over file descriptors, a sorted list of timers (they are few), a list of calls to make soon."""

    def __init__(self, name: str, on_error: Callable[[BaseException], None]) -> None:
        self._name = name
        self._on_error = on_error
        self._lock = threading.Lock()  # guards _thread, _soon, _timers, _stopping; never held during a callback
        self._thread: threading.Thread | None = None
        self._soon: list[Callback] = []
        self._timers: list[Timer] = []
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._stopping = False
        self._epoll: select.epoll | None = None
        self._native: CData = ffi.NULL  # struct pk_io *, once the thread was started
        self._wake_fd = -1

    def sibling(self, name: str) -> IoThread:
        """Another thread, for work that may block; its errors stop the same machine. The caller closes it."""
        return IoThread(name, self._on_error)

    # -- from any thread ----------------------------------------------------------------------------------------

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` on the I/O thread."""
        with self._lock:
            self._soon.append(callback)
            self._start()
        self._wake()

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Run `callback` on the I/O thread after `delay_s` seconds."""
        timer = Timer(monotonic() + delay_s, callback)
        with self._lock:
            if len(self._timers) > MANY_TIMERS:  # a guest that moves an alarm all the time leaves cancelled ones behind
                self._timers = [each for each in self._timers if not each.cancelled]
            insort(self._timers, timer)
            first = self._timers[0] is timer
            self._start()
        if first:
            self._wake()
        return timer

    def add_reader(self, fd: int, callback: Callback, *, idle: bool = False) -> None:
        """Run `callback` whenever `fd` is readable (level-triggered), at its end of file, and when it is broken.

        `idle`: not before the thread is started for something else, or by `start`.
        """
        if idle and self._thread is None:
            self._readers[fd] = callback
        else:
            self._watch(fd, self._readers, callback)

    @property
    def started(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread for readers that wait for it, if there are any."""
        if self._readers and self._thread is None:
            with self._lock:
                self._start()

    def remove_reader(self, fd: int) -> None:
        """Forget `fd` as a reader, and its handler; call this before closing it, without its device's lock."""
        self._unwatch(fd, self._readers)

    def add_handler(self, fd: int, handler: CData) -> None:
        """Let C serve `fd` by a struct pk_handler * (native/ioloop.h); its reader is called when that asks for it."""
        with self._lock:
            self._start()
        if self._native != ffi.NULL and lib.pk_io_handle(self._native, fd, handler) < 0:
            raise MemoryError("handler")

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Run `callback` whenever `fd` takes output (level-triggered), and when it is broken."""
        self._watch(fd, self._writers, callback)

    def remove_writer(self, fd: int) -> None:
        """Forget `fd` as a writer; call this before closing it."""
        self._unwatch(fd, self._writers)

    def _watch(self, fd: int, callbacks: dict[int, Callback], callback: Callback) -> None:
        with self._lock:
            self._start()
            before = self._events(fd)
            callbacks[fd] = callback
            assert self._epoll is not None
            try:
                if before:
                    self._epoll.modify(fd, self._events(fd))
                else:
                    self._epoll.register(fd, self._events(fd))
            except OSError:
                del callbacks[fd]
                raise

    def _unwatch(self, fd: int, callbacks: dict[int, Callback]) -> None:
        with self._lock:
            if callbacks.pop(fd, None) is None or self._epoll is None:
                return
            if events := self._events(fd):
                self._epoll.modify(fd, events)
            else:
                self._epoll.unregister(fd)
        # outside the lock, for which a device may wait while its handler in C waits for the device
        lib.pk_io_handle(self._native, fd, ffi.NULL)

    def _events(self, fd: int) -> int:
        return (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)

    def close(self) -> None:
        """End the thread (not called from it: then it ends by itself soon) and forget everything."""
        with self._lock:
            self._stopping = True
            thread, self._thread = self._thread, None
        if thread is None:
            return
        self._wake()
        if thread is not threading.current_thread():
            thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread, or raise OSError, MemoryError or RuntimeError with nothing begun."""
        if self._thread is not None or self._stopping:
            return
        native = lib.pk_io_new()
        if native == ffi.NULL:
            raise MemoryError("I/O thread")
        self._native = ffi.gc(native, lib.pk_io_free)
        try:
            self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            for fd in (self._wake_fd, *self._readers):
                self._epoll.register(fd, select.EPOLLIN)
            thread = threading.Thread(target=self._main, name=self._name, daemon=True)
            thread.start()
        except BaseException:
            self._close_fds()
            raise
        self._thread = thread

    def _close_fds(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _wake(self) -> None:
        with self._lock:  # not past the closing of the eventfd, whose number may be somebody else's by then
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _main(self) -> None:
        lib.pk_thread_init()
        assert self._epoll is not None
        native, epoll = self._native, self._epoll.fileno()
        ready = ffi.new("struct pk_ready[]", MANY_EVENTS)
        while not self._stopping:
            count = lib.pk_io_wait(native, epoll, self._timeout_ns(), ready, MANY_EVENTS)
            if count < 0:
                self._on_error(OSError(-count, "the I/O thread cannot wait"))
                break
            for fd, events in [(each.fd, each.events) for each in ready[0:count]]:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                if events != select.EPOLLOUT and (callback := self._readers.get(fd)) is not None:
                    self._call(callback)
                if events != select.EPOLLIN and (callback := self._writers.get(fd)) is not None:
                    self._call(callback)
            for callback in self._due():
                self._call(callback)
        with self._lock:
            self._close_fds()

    def _timeout_ns(self) -> int:
        with self._lock:
            if self._soon:
                return 0
            return max(0, int((self._timers[0].due - monotonic()) * 1e9)) if self._timers else -1

    def _due(self) -> list[Callback]:
        now = monotonic()
        with self._lock:
            ready, self._soon = self._soon, []
            while self._timers and self._timers[0].due <= now:
                timer = self._timers.pop(0)
                if not timer.cancelled:
                    ready.append(timer.callback)
        return ready

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except BaseException as error:
            self._on_error(error)
