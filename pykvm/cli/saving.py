"""Saving a running machine on request: the keys after Ctrl-A, or SIGUSR1 and SIGUSR2. Layer: cli."""

from __future__ import annotations

from _signal import SIGUSR1, SIGUSR2, signal  # type: ignore[import-not-found]

from pykvm.cli import terminal
from pykvm.cli.terminal import say
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.board import Pc

KEY, LAST_KEY = "w", "q"


class Saver:
    """Remembers that somebody wants a snapshot in `path`; the thread that waits for the machine makes it.

    One that shall be the machine's last act leaves its disks as they were then, as restoring it wants them.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.wanted = self.last = False
        terminal.EXTRA_KEYS[KEY] = (f"save the machine to {path}", self.ask)
        terminal.EXTRA_KEYS[LAST_KEY] = (f"save the machine to {path} and end", self.ask_last)
        signal(SIGUSR1, lambda number, frame: self.ask())
        signal(SIGUSR2, lambda number, frame: self.ask_last())

    def ask(self) -> None:
        """Save soon; from any thread or a signal handler."""
        self.wanted = True

    def ask_last(self) -> None:
        """Save soon, and end the run then."""
        self.last = self.wanted = True

    def work(self, pc: Pc) -> bool:
        """Save if somebody asked; whether the run is over. What goes wrong is said; then the machine goes on."""
        if not self.wanted:
            return False
        last, self.wanted, self.last = self.last, False, False
        if last:
            pc.pause()
            if pc.ended:
                return False
        try:
            snapshot = pc.save(self.path)
        except SnapshotError as error:
            say(str(error))
            if last:
                pc.start()
            return False
        say(f"saved {snapshot.size >> 20} MiB of guest to {self.path}")
        return last
