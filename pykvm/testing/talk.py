"""A conversation with a guest on its console, by pexpect: expect and send. Layer: live objects.

pexpect searches and remembers; what it reads comes from a guest, which is not a file: waiting runs a paused machine,
timeouts count while it may run, and what is kept of the output is bounded.
"""

from __future__ import annotations

import re
import threading

from pexpect import EOF, TIMEOUT
from pexpect.expect import Expecter, searcher_re, searcher_string
from pexpect.spawnbase import SpawnBase

from pykvm.core.console import KEEP
from pykvm.errors import ExpectError, MachineStateError
from pykvm.testing.waiting import run_while_waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome

    class Keyboard(Protocol):
        """Where input goes: a serial port."""

        on_rx_space: Callable[[], None] | None

        def receive(self, data: bytes, /) -> int: ...

    Pattern = str | re.Pattern[str]

TAIL_LINES = 5  # of the console, in an error's text
MAY_GO_ON = ("TIMEOUT", "STOPPED")


class _Unheard(ExpectError):
    def __init__(self, message: str, outcome: Outcome | None, console: Sequence[str]) -> None:
        super().__init__(message, outcome, console)
        self.value = self.args[0]  # what pexpect's exceptions show


class GuestEnded(_Unheard, EOF):  # type: ignore[misc]
    """The guest ended and had not printed what was expected; pexpect's EOF, too."""


class GuestSilent(_Unheard, TIMEOUT):  # type: ignore[misc]
    """Time was over, or somebody paused the guest, and it had not printed what was expected; pexpect's TIMEOUT, too."""


class Talk(SpawnBase):  # type: ignore[misc]  # pexpect has no types
    """One machine's conversation: a pexpect spawn, with `expect`, `expect_exact`, `readline`, `before`, `match`,
    `logfile_read` and so on as pexpect documents them, EOF and TIMEOUT among the patterns too.

    Lines end in a plain line feed here, whatever the guest prints, and patterns given as text are compiled with
    re.MULTILINE instead of DOTALL: `^` and `$` match at each line's ends. `timeout` is in seconds of guest-run time.
    A paused machine is paused again when the text has come, a running one runs on.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(timeout=10, encoding="utf-8", codec_errors="replace")
        self.before = ""
        self.crlf = "\n"
        self._machine = machine
        self._position = 0  # bytes of the console's output that were taken into `unread`
        self._outbox = b""
        self._lock = threading.Lock()  # guards _outbox; outside of the device's lock
        self._keyboard: Keyboard | None = None

    # -- hearing ------------------------------------------------------------------------------------------------

    @property
    def unread(self) -> str:
        """What the guest printed and no `expect` took."""
        text: str = self._before.getvalue()
        return text

    def compile_pattern_list(self, patterns: Any) -> list[Any]:
        """The regular expressions of `patterns`, which is one or several."""
        several = [patterns] if isinstance(patterns, str | re.Pattern | type) else patterns or []
        flags = re.MULTILINE | (re.IGNORECASE if self.ignorecase else 0)
        texts = [re.compile(each, flags) if isinstance(each, str) else each for each in several]
        return super().compile_pattern_list(texts) if texts else []

    def expect_list(self, pattern_list: list[Any], timeout: Any = -1, searchwindowsize: Any = -1, *rest: Any) -> int:
        """Run the guest until it has printed one of the compiled patterns; which one.

        What it printed before counts, unless an earlier `expect` took it. Raises GuestEnded or GuestSilent (both
        ExpectError) when it ends or time passes without it, DeviceError when a device raised.
        """
        _refuse_async(*rest)
        wanted = [each.pattern for each in pattern_list if isinstance(each, re.Pattern)]
        return self._listen(Expecter(self, searcher_re(pattern_list), searchwindowsize), timeout, wanted)

    def expect_exact(self, pattern_list: Any, timeout: Any = -1, searchwindowsize: Any = -1, *rest: Any) -> int:
        """The same with texts instead of regular expressions."""
        texts = [pattern_list] if isinstance(pattern_list, str | type) else list(pattern_list)
        _refuse_async(*rest)
        wanted = [each for each in texts if isinstance(each, str)]
        return self._listen(Expecter(self, searcher_string(texts), searchwindowsize), timeout, wanted)

    def expect_loop(self, searcher: Any, timeout: Any = -1, searchwindowsize: Any = -1) -> int:
        """The same with a searcher of pexpect's."""
        return self._listen(Expecter(self, searcher, searchwindowsize), timeout, [str(searcher)])

    def _listen(self, expecter: Any, timeout: float | None, wanted: list[str]) -> int:
        limit = self.timeout if timeout == -1 else timeout
        found: int | None = None

        def heard() -> bool:
            nonlocal found
            if found is None:
                self._take_in()
                found = expecter.existing_data()
            return found is not None

        machine, outcome = self._machine, None
        if not heard():
            was_running, outcome = machine.running, machine.outcome
            if was_running or outcome is None or outcome.kind in MAY_GO_ON:
                outcome = run_while_waiting(machine, heard, limit)
                if heard() and was_running and outcome is None:  # the last words may have come with the end
                    machine.start()
        return found if found is not None else self._not_found(expecter, outcome, limit, wanted)

    def _take_in(self) -> None:
        self._position, data = self._machine.console.since(self._position)
        if not data:
            return
        text = self._decoder.decode(data)
        self._log(text, "read")
        # a CR at the end may be the first half of a line's end: `replace` sees it with the next piece
        self._keep((self.unread + text).replace("\r\n", "\n")[-KEEP:])

    def _keep(self, text: str) -> None:
        self.buffer = text
        self._before = self.buffer_type()
        self._before.write(text)

    def seek(self, patterns: list[re.Pattern[str]]) -> re.Match[str] | None:
        """Look for the first of `patterns` in what is unread; found, it is taken out with all before it."""
        self._take_in()
        found = Expecter(self, searcher_re(patterns)).existing_data()
        return self.match if found is not None else None

    def _not_found(self, expecter: Any, outcome: Outcome | None, timeout: float | None, wanted: list[str]) -> int:
        """The pattern EOF or TIMEOUT, if it was asked for; else raises the error that says what happened instead."""
        ended = outcome is not None
        if (expecter.searcher.eof_index if ended else expecter.searcher.timeout_index) >= 0:
            index: int = expecter.eof() if ended else expecter.timeout()
            return index
        expecter.errored()
        what = f"ended with {outcome}" if ended else "was paused" if timeout is None else f"ran for {timeout:g} s"
        message = f"the guest {what} and did not print {' or '.join(map(repr, wanted))}"
        raise (GuestEnded if ended else GuestSilent)(message, outcome, self.tail())

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


def _refuse_async(async_: bool = False) -> None:
    if async_:
        raise TypeError("a guest is not awaited: expect runs it")
