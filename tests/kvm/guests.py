"""The guests of images/ on a `Pc`: running one to its end, and talking to one that runs."""

from __future__ import annotations

import threading
from pathlib import Path
from time import monotonic
from typing import Any

from pykvm import BootConfig, Outcome, Pc

IMAGES = Path(__file__).resolve().parents[2] / "images" / "build"
RUN_S = 60.0  # an end that takes longer on a loaded machine never comes


def pc(name: str, cmdline: str = "", *, boot: dict[str, Any] | None = None, **options: Any) -> Pc:
    """A Pc with 64 MiB that boots the guest `name`; `boot` are further options of BootConfig."""
    options.setdefault("memory", "64M")
    return Pc(BootConfig(str(IMAGES / name), cmdline=cmdline, **(boot or {})), **options)


def run(name: str, cmdline: str = "", *, timeout: float = RUN_S, **options: Any) -> tuple[Outcome, str]:
    """Run the guest to its end: (Outcome, what it printed, with LF line ends)."""
    with pc(name, cmdline, **options) as machine:
        outcome = machine.run(timeout)
        return outcome, text(machine)


def text(machine: Pc) -> str:
    """What the guest printed, with LF line ends."""
    return machine.console.text.replace("\r\n", "\n")


class Talk:
    """A conversation with a running guest by COM1."""

    def __init__(self, machine: Pc) -> None:
        self.machine = machine
        self._news = threading.Condition()
        machine.console.sink = self._wake
        machine.serial[0].on_rx_space = lambda: self._wake(b"")
        self._heard = 0

    def _wake(self, data: bytes) -> None:
        with self._news:
            self._heard += 1
            self._news.notify_all()

    def wait_for(self, expected: str) -> None:
        """Wait until the guest has printed `expected`."""
        end = monotonic() + RUN_S
        while expected not in text(self.machine):
            assert monotonic() < end, f"{expected!r} did not come: {text(self.machine)!r}"
            with self._news:
                self._news.wait(0.2)

    def send(self, data: bytes) -> None:
        """Send all of `data`, as fast as the guest takes it."""
        end = monotonic() + RUN_S
        while data:
            assert monotonic() < end, f"{len(data)} bytes were not taken"
            with self._news:
                heard = self._heard
            data = data[self.machine.serial[0].receive(data) :]
            with self._news:
                if data and heard == self._heard:
                    self._news.wait(0.2)
