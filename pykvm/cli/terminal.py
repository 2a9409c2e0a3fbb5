"""The terminal as a guest's console. Layer: cli.

On a terminal stdin is in raw mode while the guest runs, and Ctrl-A starts a command. The terminal is restored by
`close`, which runs on every way out: end, error, SIGTERM, SIGHUP. Pipes and files work without any of this.
"""

from __future__ import annotations

import os
import select
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.core.iothread import IoThread

ESCAPE = 0x01  # Ctrl-A, as in screen, QEMU and picocom
CHUNK = 4096  # PIPE_BUF: a pipe that poll() calls writable takes this much without blocking
POLL_MS = 100

# Keys after Ctrl-A beside those of every machine, of options that were given: key -> (what it does, function)
EXTRA_KEYS: dict[str, tuple[str, Callable[[], object]]] = {}


class Output:
    """Writes to a file descriptor without ever holding up the machine's end: a reader that stalls is waited for only
    while the machine runs. A reader that is gone or a full disk is noticed once, and left in `error`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closing = False
        self.error: OSError | None = None
        self.on_broken: Callable[[], None] | None = None
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        while data and self.error is None:
            try:
                if not self._poll.poll(POLL_MS):
                    if self.closing:
                        return
                    continue
                data = data[os.write(self.fd, data[:CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                self.error = error
                if self.on_broken is not None:
                    self.on_broken()


class Input:
    """Feeds a file descriptor's bytes to a serial port as fast as the guest takes them.

    `filter` sees the bytes first (the escape key); `offer` returns how many the port took; call `more` when it has
    room again. Runs on the I/O thread.
    """

    def __init__(
        self, io: IoThread, fd: int, offer: Callable[[bytes], int], filter_: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._io = io
        self._fd = fd
        self._offer = offer
        self._filter = filter_
        self._pending = b""
        self._polled = True
        self._reading = False
        self._ended = False
        self.on_end: Callable[[], None] | None = None  # after the end of file
        io.call_soon(self._resume)

    def more(self) -> None:
        """The port has room again (callable from any thread)."""
        self._io.call_soon(self._feed)

    def stop(self) -> None:
        """Read no more."""
        self._ended = True
        self._suspend()

    def _resume(self) -> None:
        if self._ended or self._reading:
            return
        if self._polled:
            try:
                self._io.add_reader(self._fd, self._on_readable)
                self._reading = True
                return
            except PermissionError:
                self._polled = False  # epoll refuses regular files and /dev/null, which are always readable
        self._on_readable()

    def _suspend(self) -> None:
        if self._reading:
            self._reading = False
            self._io.remove_reader(self._fd)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.stop()
            if self.on_end is not None:
                self.on_end()
            return
        self._pending += self._filter(data) if self._filter is not None else data
        self._feed()

    def _feed(self) -> None:
        if self._pending:
            self._pending = self._pending[self._offer(self._pending) :]
        if self._pending:
            self._suspend()
        else:
            self._resume()


class RawMode:
    """Raw mode of the terminal on `fd`, from `enter` to `leave`; does nothing where `fd` is no terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    def enter(self) -> None:
        """Deliver every key at once and unchanged; output keeps its newline translation for kernels that send LF."""
        if not os.isatty(self._fd):
            return
        import termios

        self._saved = termios.tcgetattr(self._fd)
        mode = termios.tcgetattr(self._fd)
        mode[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)

    def leave(self) -> None:
        """Restore what was before."""
        saved, self._saved = self._saved, None
        if saved is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)


class EscapeKeys:
    """Takes Ctrl-A and the key after it out of the input; any other byte passes."""

    def __init__(self, commands: dict[str, tuple[str, Callable[[], object]]], show: Callable[[str], None]) -> None:
        self._commands = commands
        self._show = show
        self._armed = False

    def __call__(self, data: bytes) -> bytes:
        passed = bytearray()
        for byte in data:
            if self._armed:
                self._armed = False
                if byte == ESCAPE:
                    passed.append(byte)
                else:
                    self._command(chr(byte).lower())
            elif byte == ESCAPE:
                self._armed = True
            else:
                passed.append(byte)
        return bytes(passed)

    def _command(self, key: str) -> None:
        entry = self._commands.get(key)
        if entry is not None:
            entry[1]()
        else:
            self._show(self.menu())

    def menu(self) -> str:
        """The list of keys, with line ends for a raw terminal."""
        keys = "".join(f"\r\n  Ctrl-A {key}  {text}" for key, (text, _) in self._commands.items())
        return f"\r\npykvm:{keys}\r\n  Ctrl-A Ctrl-A  send Ctrl-A\r\n"


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(f"pykvm: {text}", file=sys.stderr, flush=True)
