"""Running a guest until something is true, within a time that counts only while the guest may run. Layer: live objects.

One loop for all: `run_until`, `Console.expect` and `Machine.call`. It waits for news (console output, the end of the
run) and asks a function whether that was it; nothing polls.
"""

from __future__ import annotations

import threading

from pykvm.core.guestclock import GuestClock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome


def run_while_waiting(machine: Machine, done: Callable[[], bool], timeout_s: float | None) -> Outcome | None:
    """Run the guest until `done()`, its end, a pause by somebody, or `timeout_s` seconds of guest-run time.

    The machine is paused afterwards. Returns how the run ended, None if it has not ended: then ask `done()` again,
    and otherwise the time is over. `done` is called on this thread, after every piece of news. Raises what
    Machine.wait does.
    """
    news = threading.Event()
    machine.console.watchers.append(news.set)
    machine.on_end.append(news.set)
    try:
        machine.start()
        _wait(machine, done, news, timeout_s)
        machine.pause()
    finally:
        machine.console.watchers.remove(news.set)
        machine.on_end.remove(news.set)
    machine.console.flush()
    return machine.wait() if machine.ended else None


def _wait(machine: Machine, done: Callable[[], bool], news: threading.Event, timeout_s: float | None) -> None:
    clock = None if timeout_s is None else GuestClock(machine)
    left = timeout_s
    machine.console.flush()
    while True:
        news.clear()
        if done() or not machine.running:
            return
        if news.wait(left) or clock is None or timeout_s is None:
            continue
        left = timeout_s - clock.elapsed()
        if left <= 0:
            return
