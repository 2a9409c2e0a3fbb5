"""Where a serial port of the guest ends on the host: stdio, a file, a pseudo-terminal, nowhere. Layer: cli."""

from __future__ import annotations

import os

from pykvm.cli.terminal import EXTRA_KEYS, EscapeKeys, Input, Output, say
from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.board import Pc
    from pykvm.cli.consoleport import Outlet


class SerialPort:
    """One connected port; `close` releases what the host side needs."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._closers: list[Callable[[], object]] = []
        self.output: Output | Outlet | None = None

    def hurry(self) -> None:
        """The machine is about to stop: do not wait for a reader that stalls."""
        if self.output is not None:
            self.output.closing = True

    def check(self) -> None:
        """Raise the OSError that kept output from being written, if one did."""
        error = self.output.error if self.output is not None else None
        if error is not None:
            raise OSError(error.errno, error.strerror, self.where)

    def add(self, closer: Callable[[], object]) -> None:
        """Run `closer` at the end."""
        self._closers.append(closer)

    def close(self) -> None:
        """Undo everything, last first."""
        while self._closers:
            self._closers.pop()()


def open_serial(pc: Pc, index: int, where: str) -> SerialPort:
    """Connect COM`index + 1` as `where` says: stdio, captured, file:PATH, pty, none. Raises UsageError."""
    port = SerialPort(where)
    if where == "stdio":
        _connect(pc, index, port, 0, 1, escape=os.isatty(0))
    elif where == "captured":
        _connect(pc, index, port, 0, None, escape=False)
    elif where == "pty":
        _open_pty(pc, index, port)
    elif where.startswith("file:"):
        _open_file(pc, index, port, where.removeprefix("file:"))
    return port


def _connect(pc: Pc, index: int, port: SerialPort, in_fd: int, out_fd: int | None, *, escape: bool) -> None:
    if out_fd is not None:
        output = Output(out_fd)
        output.on_broken = pc.stop_soon  # as any program whose reader has gone
        pc.connect_serial(index, output.write)
        port.output = output
    keys = escape_keys(pc, pc.serial[index].receive_break) if escape else None
    source = Input(pc.io, in_fd, pc.serial[index].receive, keys)
    pc.serial[index].on_rx_space = source.more
    port.add(source.stop)


def escape_keys(pc: Pc, send_break: Callable[[], object] | None = None) -> EscapeKeys:
    """The commands behind Ctrl-A, for a guest's console on the terminal."""

    def statistics() -> None:
        from pykvm.debug.stats import collect_stats

        _show("\r\n" + collect_stats(pc).text().replace("\n", "\r\n") + "\r\n")

    commands: dict[str, tuple[str, Callable[[], object]]] = {
        "x": ("end the machine", pc.stop_soon),
        "c": ("this menu", lambda: _show(keys.menu())),
        "p": ("press the power button", pc.press_power_button),
        "s": ("exit statistics", statistics),
    }
    if send_break is not None:
        commands["b"] = ("send a break (SysRq)", send_break)
    keys = EscapeKeys(commands | EXTRA_KEYS, _show)
    return keys


def _show(text: str) -> None:
    os.write(1, text.encode())


def make_pty(end: SerialPort, name: str) -> int:
    """A pseudo-terminal, open until `end` is closed: our side, non-blocking. The user is told where `name` is."""
    import tty

    ours, theirs = os.openpty()
    tty.setraw(theirs)  # until a terminal program sets it up: no echo of the guest's output back to it
    end.add(lambda: os.close(ours))
    end.add(lambda: os.close(theirs))  # kept open, so that closing the terminal program is no end of file
    say(f"{name} is {os.ttyname(theirs)}")
    os.set_blocking(ours, False)
    return ours


def _open_pty(pc: Pc, index: int, port: SerialPort) -> None:
    ours = make_pty(port, f"COM{index + 1}")
    _connect(pc, index, port, ours, None, escape=False)
    pc.connect_serial(index, _Lossy(ours).write)


class _Lossy:
    """Output to a pty that perhaps nobody reads: what does not fit is dropped, as on a cable."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        try:
            os.write(self._fd, data)
        except BlockingIOError:
            pass


def _open_file(pc: Pc, index: int, port: SerialPort, path: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(f"--serial file:{path}: {error.strerror}") from error
    output = Output(fd)
    port.add(lambda: os.close(fd))
    port.output = output
    pc.connect_serial(index, output.write)
