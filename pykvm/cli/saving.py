"""Saving a running machine on request: the key after Ctrl-A, or SIGUSR1. Layer: cli."""

from __future__ import annotations

from _signal import SIGUSR1, signal  # type: ignore[import-not-found]

from pykvm.cli import terminal
from pykvm.cli.terminal import say
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.board import Pc

KEY = "w"


class Saver:
    """Remembers that somebody wants a snapshot in `path`; the thread that waits for the machine makes it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.wanted = False
        terminal.EXTRA_KEYS[KEY] = (f"save the machine to {path}", self.ask)
        signal(SIGUSR1, lambda number, frame: self.ask())

    def ask(self) -> None:
        """Save soon; from any thread or a signal handler."""
        self.wanted = True

    def work(self, pc: Pc) -> None:
        """Save if somebody asked. What goes wrong is said; the machine goes on."""
        if not self.wanted:
            return
        self.wanted = False
        try:
            snapshot = pc.save(self.path)
        except SnapshotError as error:
            say(str(error))
        else:
            say(f"saved {snapshot.size >> 20} MiB of guest to {self.path}")
