"""Time as the guest could use it. Layer: core, loaded by the first wait with a timeout.

A timeout for a guest on a loaded host should not count the time in which the host ran something else. The scheduler
keeps, for each thread, how long it was ready and had no CPU: that is taken off the wall time.

Source: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: nanoseconds on a CPU, nanoseconds
on a run queue.
"""

from __future__ import annotations

from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.machine import Machine

MAX_STRETCH = 20  # a timeout of 1 s ends after 20 s of wall time at the latest, however starved the guest is


class GuestClock:
    """Counts from its creation. For several vCPUs the one that waited longest for a CPU is what counts."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._start = monotonic()
        self._waited = self._queue_waits()

    def elapsed(self) -> float:
        """Seconds of guest-run time since the creation, a twentieth of the wall time at least."""
        wall = monotonic() - self._start
        now = self._queue_waits()
        starved = max((waited - self._waited.get(thread, 0.0) for thread, waited in now.items()), default=0.0)
        return max(wall - starved, wall / MAX_STRETCH)

    def _queue_waits(self) -> dict[int, float]:
        threads = [vcpu.thread_id for vcpu in self._machine.vcpus]
        return {thread: _queue_wait(thread) for thread in threads if thread is not None}


def _queue_wait(thread: int) -> float:
    """Seconds that a thread of this process has spent ready without a CPU; 0 where the kernel does not count it."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
