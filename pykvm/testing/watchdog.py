"""A limit on the time that a test's guest may run in all. Layer: live objects.

A guest that hangs must not hang the tests: whatever waits for it (run, wait, expect) gets an Outcome TIMEOUT.
"""

from __future__ import annotations

from pykvm.core.guestclock import GuestClock
from pykvm.core.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.machine import Machine

TICKS = 8  # looks in the allowed time: that is how exact it is
LONGEST_TICK_S = 1.0


class Watchdog:
    """Looks from time to time, on the machine's I/O thread, and ends its run when `limit_s` is used up."""

    def __init__(self, machine: Machine, limit_s: float) -> None:
        self._machine = machine
        self._limit_s = limit_s
        self._tick_s = min(limit_s / TICKS, LONGEST_TICK_S)
        self._used_s = 0.0
        self._clock: GuestClock | None = None
        machine.io.call_later(self._tick_s, self._look)

    def _look(self) -> None:
        running = self._machine.running
        if running and self._clock is not None:
            self._used_s += self._clock.elapsed()
        self._clock = GuestClock(self._machine) if running else None
        if self._used_s >= self._limit_s:
            detail = f"its {self._limit_s:g} s of guest-run time are used up"
            self._machine.finish(Outcome("TIMEOUT", detail=detail))
        self._machine.io.call_later(self._tick_s, self._look)
