"""A conversation with a guest on its console: expect and send. Layer: live objects.

In the manner of pexpect, but for a guest: waiting runs a paused machine, timeouts count while it may run, and what is
kept of the output is bounded.
"""

from __future__ import annotations

import re
import threading
from codecs import getincrementaldecoder

from pykvm.core.console import KEEP
from pykvm.errors import ExpectError, MachineStateError
from pykvm.testing.waiting import run_while_waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome

    class Keyboard(Protocol):
        """Where input goes: a serial port."""

        on_rx_space: Callable[[], None] | None

        def receive(self, data: bytes, /) -> int: ...

    Pattern = str | re.Pattern[str]

TAIL_LINES = 5  # of the console, in an error's text
MAY_GO_ON = ("TIMEOUT", "STOPPED")


class Talk:
    """One machine's conversation. Lines end in a plain line feed here, whatever the guest prints; `^` and `$` match
    at each line's ends.

    before   the text that the last `expect` skipped
    match    its re.Match
    """

    def __init__(self, machine: Machine) -> None:
        self.before = ""
        self.match: re.Match[str] | None = None
        self._machine = machine
        self._position = 0  # bytes of the console's output that were taken into `unread`
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self.unread = ""
        self._outbox = b""
        self._lock = threading.Lock()  # guards _outbox; outside of the device's lock
        self._keyboard: Keyboard | None = None

    # -- hearing ------------------------------------------------------------------------------------------------

    def expect(self, pattern: Pattern | Sequence[Pattern], timeout: float | None = 10.0) -> re.Match[str]:
        """Run the guest until it has printed `pattern` (or one of several), and take everything up to there.

        What it printed before counts, unless an earlier `expect` took it. A paused machine is paused again when the
        text has come, a running one runs on. Raises ExpectError when the guest ends or `timeout` seconds of guest-run
        time pass without it, DeviceError when a device raised.
        """
        patterns = compile_patterns(pattern)
        if self.seek(patterns) is None:
            outcome = self._machine.outcome
            if not self._machine.running and outcome is not None and outcome.kind not in MAY_GO_ON:
                raise self.failure(patterns, outcome, timeout)
            self._run(patterns, timeout)
        assert self.match is not None
        return self.match

    def _run(self, patterns: list[re.Pattern[str]], timeout: float | None) -> None:
        machine, found = self._machine, False
        was_running = machine.running

        def heard() -> bool:
            nonlocal found
            found = found or self.seek(patterns) is not None
            return found

        outcome = run_while_waiting(machine, heard, timeout)
        if not heard():  # the last words may have come with the end
            raise self.failure(patterns, outcome, timeout)
        if was_running and outcome is None:
            machine.start()

    def seek(self, patterns: Sequence[re.Pattern[str]]) -> re.Match[str] | None:
        """Look for the first of `patterns` in what is unread; found, it is taken out with all before it."""
        self._take_in()
        matches = [each for each in (pattern.search(self.unread) for pattern in patterns) if each is not None]
        if not matches:
            return None
        self.match = min(matches, key=lambda match: match.start())
        self.before = self.unread[: self.match.start()]
        self.unread = self.unread[self.match.end() :]
        return self.match

    def _take_in(self) -> None:
        self._position, data = self._machine.console.since(self._position)
        text = self._decoder.decode(data)
        # a CR at the end may be the first half of a line's end: `replace` sees it with the next piece
        self.unread = (self.unread + text).replace("\r\n", "\n")[-KEEP:]

    def failure(
        self, patterns: Sequence[re.Pattern[str]], outcome: Outcome | None, timeout: float | None
    ) -> ExpectError:
        """The error that says what was expected, what happened instead, and what the guest said last."""
        wanted = " or ".join(repr(pattern.pattern) for pattern in patterns)
        what = f"ended with {outcome}" if outcome is not None else f"ran for {timeout:g} s"
        if outcome is None and timeout is None:
            what = "was paused"
        return ExpectError(f"the guest {what} and did not print {wanted}", outcome, self.tail())

    def tail(self) -> list[str]:
        """The last lines of the console, made printable."""
        from pykvm.debug.report import printable_tail

        return printable_tail(self._machine.console.data, TAIL_LINES)

    # -- speaking -----------------------------------------------------------------------------------------------

    def send(self, text: str | bytes) -> None:
        """Type `text` (UTF-8). It arrives as fast as the guest reads, while the guest runs; returns at once."""
        keyboard = self._machine.console.keyboard
        if keyboard is None:
            raise MachineStateError("this machine has no serial port to send to")
        if self._keyboard is not keyboard:
            self._keyboard = keyboard
            keyboard.on_rx_space = self._deliver
        with self._lock:
            self._outbox += text.encode() if isinstance(text, str) else text
        self._deliver()

    def _deliver(self) -> None:
        with self._lock:
            while self._outbox and self._keyboard is not None:
                taken = self._keyboard.receive(self._outbox)
                if not taken:
                    break
                self._outbox = self._outbox[taken:]


def compile_patterns(pattern: Pattern | Sequence[Pattern]) -> list[re.Pattern[str]]:
    """The regular expressions of `pattern`, which is one or several; text is compiled with re.MULTILINE."""
    several = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    return [re.compile(each, re.MULTILINE) if isinstance(each, str) else each for each in several]
