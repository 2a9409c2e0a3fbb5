"""`Machine.trace`: every exit, and every access to chosen memory, shown to Python as it happens. Layer: debug.

Slow on purpose: nothing is answered in C meanwhile. What is traced all the time belongs into `pykvm start --trace`.
"""

from __future__ import annotations

import errno
from collections import deque

from pykvm._native import lib
from pykvm.core.vcpu import Exit
from pykvm.debug.pagetap import PageTaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu

    OnEvent = Callable[[Vcpu, Exit], object]

KEPT = 100_000  # events of a trace without a callback


class Trace:
    """A trace that goes on until `stop`, or the end of its `with` block.

    events   (vCPU index, Exit) of each event, the last KEPT ones; empty when there is a callback
    """

    def __init__(
        self, machine: Machine, on_event: OnEvent | None, exits: bool | Iterable[str], memory: Iterable[range]
    ) -> None:
        self.events: deque[tuple[int, Exit]] = deque(maxlen=KEPT)
        self._machine = machine
        self._on_event = on_event or (lambda vcpu, event: self.events.append((vcpu.index, event)))
        self._reasons = None if isinstance(exits, bool) else frozenset(exits)
        self._exits = bool(exits)
        self._taps = PageTaps(machine, memory, self._on_event)
        if self._exits:
            machine.actions.suspended = True
            self._set(self._run)

    def stop(self) -> None:
        """Trace no more; again without effect."""
        self._taps.close()
        if self._exits:
            self._exits = False
            self._machine.actions.suspended = False
            self._set(None)

    def _set(self, loop: Callable[[Vcpu], Outcome | None] | None) -> None:
        for vcpu in self._machine.vcpus:
            vcpu.traced = loop
            if vcpu.running:
                vcpu.post(lambda: None)  # makes it look
        self._machine.publish_actions()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self, vcpu: Vcpu) -> Outcome | None:
        """The run loop while exits are traced."""
        while True:
            key = lib.pk_run(vcpu.state)
            if key == -errno.EINTR:
                return None
            event = vcpu.describe(key)
            outcome = vcpu.dispatch(key)
            event.outcome = outcome
            if event.write is False:
                event.value = vcpu.state.value
            if self._reasons is None or event.reason in self._reasons:
                self._on_event(vcpu, event)
            if outcome is not None:
                return outcome
