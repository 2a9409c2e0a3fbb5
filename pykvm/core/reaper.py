"""Closes KVM file descriptors off the caller's path. Layer: core.

Closing a VM that has an irqchip, irqfds or dirty logging waits for RCU grace periods inside the kernel, 7 to 23 ms.
A thread that exists only while there is something to close takes that wait. It knows fds, not machines; its queue is
bounded, so thousands of machines cannot pile up: then close() waits its turn.
"""

from __future__ import annotations

import os
import threading

MAX_PENDING = 64


class _Reaper:
    """The queue and the thread that empties it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.pending: list[list[int]] = []
        self.working = False

    def close_later(self, fds: list[int]) -> None:
        with self.changed:
            while len(self.pending) >= MAX_PENDING:
                self.changed.wait()
            self.pending.append(fds)
            if not self.working:
                self.working = True
                threading.Thread(target=self._main, name="pykvm-reaper", daemon=True).start()

    def drain(self) -> None:
        with self.changed:
            while self.working:
                self.changed.wait()

    def _main(self) -> None:
        while True:
            with self.changed:
                if not self.pending:
                    self.working = False
                    self.changed.notify_all()
                    return
                fds = self.pending[0]
            for fd in fds:
                os.close(fd)
            with self.changed:
                del self.pending[0]
                self.changed.notify_all()


_reapers: list[_Reaper] = [_Reaper()]


def _current() -> _Reaper:
    if _reapers[0].pid != os.getpid():
        _reapers[0] = _Reaper()  # forked: the parent's thread and queue are not ours
    return _reapers[0]


def close_later(fds: list[int]) -> None:
    """Close these file descriptors, in order, soon."""
    _current().close_later(fds)


def drain() -> None:
    """Wait until everything is closed (tests that count fds)."""
    _current().drain()
