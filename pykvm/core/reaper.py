"""Closes KVM file descriptors off the caller's path. Layer: core.

Closing a VM that has an irqchip, irqfds or dirty logging waits for RCU grace periods inside the kernel, 7 to 23 ms.
Threads that exist only while there is something to close take that wait. It knows fds, not machines; its queue is
bounded, so thousands of machines cannot pile up: then close() waits its turn.
"""

from __future__ import annotations

import os
import sys
import threading

MAX_PENDING = 64
MAX_THREADS = 8  # they sleep in the kernel, side by side


class _Reaper:
    """The queue and the threads that empty it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.waiting: list[list[int]] = []
        self.threads = 0

    def close_later(self, fds: list[int]) -> None:
        with self.changed:
            while len(self.waiting) >= MAX_PENDING:
                self.changed.wait()
            self.waiting.append(fds)
            if self.threads < MAX_THREADS:
                self.threads += 1
                threading.Thread(target=self._main, name="pykvm-reaper", daemon=True).start()

    def drain(self) -> None:
        with self.changed:
            while self.threads:
                self.changed.wait()

    def _main(self) -> None:
        while True:
            with self.changed:
                if not self.waiting:
                    self.threads -= 1
                    self.changed.notify_all()
                    return
                fds = self.waiting.pop(0)
                self.changed.notify_all()
            for fd in fds:
                os.close(fd)


_reapers: list[_Reaper] = [_Reaper()]


def _current() -> _Reaper:
    if _reapers[0].pid != os.getpid():
        _reapers[0] = _Reaper()  # forked: the parent's thread and queue are not ours
    return _reapers[0]


def close_later(fds: list[int]) -> None:
    """Close these file descriptors, in order, soon."""
    if not sys.is_finalizing():  # the threads are gone then, one of them perhaps with the lock; the kernel closes all
        _current().close_later(fds)


def drain() -> None:
    """Wait until everything is closed (tests that count fds)."""
    _current().drain()
