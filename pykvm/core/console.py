"""Where a guest's console output goes: remembered, and passed on. Layer: core."""

from __future__ import annotations

import threading

from pykvm.errors import MachineStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

    from pykvm.testing.talk import Keyboard, Pattern, Talk

KEEP = 1 << 20  # bytes remembered: a guest that prints for ever must not grow the host


class Console:
    """The output of one machine's consoles, in order. `write` is a device's sink, called on any thread."""

    def __init__(self, sink: Callable[[bytes], object] | None = None) -> None:
        self.sink = sink
        self.total = 0
        self._tail = bytearray()
        self._lock = threading.Lock()  # innermost: nothing is called under it
        self.flushers: list[Callable[[], object]] = []
        self.watchers: list[Callable[[], object]] = []  # called after each write; while there are any, soon after it
        self.keyboard: Keyboard | None = None  # where input for this console goes
        self.open_talk: Callable[[], Talk] | None = None
        self._talk: Talk | None = None
        self._writers: set[int] = set()  # threads inside `sink`, which hold their device's lock

    def write(self, data: bytes) -> None:
        """Take output of the guest."""
        with self._lock:
            self.total += len(data)
            self._tail += data
            if len(self._tail) > 2 * KEEP:
                del self._tail[:-KEEP]
        if self.sink is not None:
            self._writers.add(threading.get_ident())
            try:
                self.sink(data)
            finally:
                self._writers.discard(threading.get_ident())
        for watcher in self.watchers:
            watcher()

    def flush(self) -> None:
        """Fetch what devices still hold back (rings filled by C); nothing when a sink calls it: it is told anyway."""
        if threading.get_ident() in self._writers:
            return
        for flusher in self.flushers:
            flusher()

    @property
    def data(self) -> bytes:
        """The last bytes (at least the last MiB) that the guest wrote."""
        self.flush()
        with self._lock:
            return bytes(self._tail)

    def since(self, position: int) -> tuple[int, bytes]:
        """(`total`, what was written from byte `position` on); what is forgotten already is left out."""
        with self._lock:
            new = min(self.total - position, len(self._tail))
            return self.total, bytes(self._tail[-new:]) if new > 0 else b""

    @property
    def text(self) -> str:
        """`data` as text; bytes that are no UTF-8 become U+FFFD."""
        return self.data.decode("utf-8", "replace")

    # -- conversation: pykvm.testing.talk ------------------------------------------------------------------------

    @property
    def talk(self) -> Talk:
        """The conversation, a pexpect spawn. Raises MachineStateError for a console without a machine."""
        if self._talk is None:
            if self.open_talk is None:
                raise MachineStateError("nobody is at the other end of this console")
            self._talk = self.open_talk()
        return self._talk

    def expect(self, pattern: Pattern | Sequence[Pattern], timeout: float | None = 10.0) -> re.Match[str]:
        """Run the guest until it has printed `pattern` (or one of several): its match, see `talk`.

        `before` is then what came before it. Raises ExpectError when the guest ends or time passes without it.
        """
        talk = self.talk
        talk.expect(pattern, timeout)
        match: re.Match[str] = talk.match
        return match

    @property
    def before(self) -> str:
        """What the guest printed between the two last expected texts."""
        before: str = self.talk.before
        return before

    def send(self, text: str | bytes) -> None:
        """Type `text`; it arrives while the guest runs. Returns at once."""
        self.talk.send(text)

    def sendline(self, line: str = "", end: str = "\n") -> None:
        """Type a line."""
        self.talk.send(line + end)
