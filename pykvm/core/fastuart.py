"""The C side's short cut for a UART: THR writes into a ring, LSR reads from a constant. Layer: core."""

from __future__ import annotations

import os
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.machine import Machine

BATCH_S = 0.02  # a guest that prints all the time wakes the I/O thread no more often than this


class FastUart:
    """Two action-table entries and their ring, as `devices.serial` uses them."""

    def __init__(self, machine: Machine, thr_port: int, lsr_port: int, lsr_idle: int) -> None:
        self._tx, self._ring = machine.actions.append(thr_port)
        self._lsr = machine.actions.constant(range(lsr_port, lsr_port + 1), lsr_idle)
        self._tx.enabled = self._lsr.enabled = False
        self._machine = machine

    def on_bytes(self, flush: Callable[[], object]) -> None:
        """Call `flush` on the I/O thread when the ring stops being empty: at once, or BATCH_S after the last time.

        It is at once as long as somebody waits for what the guest prints. Vcpu.run_once needs no thread for it.
        """
        io, eventfd, console = self._machine.io, self._ring.eventfd, self._machine.console
        next_flush = 0.0

        def take() -> None:
            nonlocal next_flush
            flush()
            next_flush = monotonic() + BATCH_S

        def wake() -> None:
            os.eventfd_read(eventfd)
            wait = next_flush - monotonic()
            if wait > 0 and not console.watchers:
                io.call_later(wait, take)
            else:
                take()

        io.add_reader(eventfd, wake, idle=True)
        self._machine.on_close.append(lambda: io.remove_reader(eventfd))

    def enable_tx(self, on: bool) -> None:
        """Whether C takes byte writes to THR."""
        self._tx.enabled = on

    def enable_lsr(self, on: bool) -> None:
        """Whether C answers reads of LSR."""
        self._lsr.enabled = on

    def drain(self) -> bytes:
        """Take all bytes out of the ring, oldest first."""
        return self._ring.drain()
