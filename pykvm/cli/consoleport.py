"""Where the ports of a virtio console end on the host: stdio, a file, a pseudo-terminal, a Unix socket. Layer: cli.

Loaded only when --console is given. Ports are served on the I/O thread, so nothing here blocks: output that a reader
does not take stays in the guest's queue. A pty and a socket with nobody at the other end swallow it, as a cable does.
"""

from __future__ import annotations

import os
import select
import stat

from pykvm.cli.serialport import SerialPort, escape_keys, make_pty
from pykvm.cli.terminal import CHUNK, POLL_MS, Input
from pykvm.errors import UsageError
from pykvm.virtio.console import Console, ConsolePort

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from pykvm.board import Pc
    from pykvm.core.iothread import IoThread
    from pykvm.core.machine import Machine

PLACES = "stdio, file:PATH, pty, unix:PATH, none"


def parse_console(text: str) -> tuple[str, str]:
    """`WHERE[,port=NAME]` as (WHERE, NAME or ""). Raises UsageError."""
    from pykvm.cli.devices import split_spec

    where, words = split_spec("--console", text, (), ("port",))
    _check_place(where)
    if "port" in words and not words["port"]:
        raise UsageError("--console: port= needs a name")
    return where, words.get("port", "")


def _check_place(where: str) -> None:
    kind, colon, path = where.partition(":")
    if (kind, bool(path)) not in (("stdio", False), ("pty", False), ("none", False), ("file", True), ("unix", True)):
        raise UsageError(f"--console: {where!r} is none of {PLACES}")
    if colon and not path:
        raise UsageError(f"--console: {where!r} names no path")


def make_console(texts: Sequence[str]) -> Console:
    """The device with all the ports that --console asks for. Raises UsageError."""
    ports = []
    for where, name in map(parse_console, texts):
        ports.append(ConsolePort(name, console=not name))
        ports[-1].where = where
    _check_stdio(ports)
    return Console(ports)


def _check_stdio(ports: Sequence[ConsolePort]) -> None:
    if sum(port.where == "stdio" for port in ports) > 1:
        raise UsageError("--console: only one port can be stdio")


def console_ports(pc: Pc) -> list[ConsolePort]:
    """All ports of the machine's consoles."""
    return [port for console in pc.find(Console) for port in console.ports]


def replace_ends(pc: Pc, texts: Sequence[str]) -> list[str]:
    """What is at the ends of a restored machine's ports: as the file says, or what each --console in `texts` says.

    One without a name is for the next terminal; with any --console, what none names goes nowhere. Raises UsageError.
    """
    ports = console_ports(pc)
    if texts:
        terminals = [port for port in ports if not port.name]
        named = {port.name: port for port in ports if port.name}
        for port in ports:
            port.where = "none"
        for where, name in map(parse_console, texts):
            port_of = named.pop(name, None) if name else (terminals.pop(0) if terminals else None)
            if port_of is None:
                what = f"port {name!r}" if name else "such terminal"
                raise UsageError(f"--console {where}: the machine was saved with no {what}")
            port_of.where = where
    for port in ports:
        _check_place(port.where or "none")
    _check_stdio(ports)
    return [port.where for port in ports if port.where]


def open_consoles(pc: Pc, ends: list[SerialPort], *, capture: bool) -> None:
    """Connect the ports of the machine's console and add their ends to `ends`; with `capture` stdio is input only.

    Raises UsageError; then what was opened before is in `ends`.
    """
    for port in console_ports(pc):
        if port.where:
            ends.append(SerialPort(port.where))
            _open(pc, port, ends[-1], capture=capture)
        if port.sink is _take_nothing:
            port.sink = None
        if port.resumed:
            port.more()


def hold_output(machine: Machine) -> None:
    """Keep what a restored machine had not got rid of until `open_consoles` says where it goes."""
    from pykvm.board import Pc

    for port in console_ports(machine) if isinstance(machine, Pc) else ():
        port.sink = _take_nothing


def _take_nothing(data: bytes) -> int:
    return 0


class Outlet:
    """The sink of a port: a file descriptor that is written as long as it takes bytes at once."""

    def __init__(self, io: IoThread, fd: int, port: ConsolePort, *, lossy: bool = False) -> None:
        self.fd = fd
        self.error: OSError | None = None
        self.closing = False
        self.on_broken: Callable[[], None] | None = None
        self._io = io
        self._port = port
        self._lossy = lossy
        self._waiting = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> int:
        """How many bytes the reader took; if not all, the port is told when there is room again."""
        done = 0
        while done < len(data) and self.error is None:
            try:
                if not self._poll.poll(POLL_MS if self.closing else 0):
                    return self._wait(done, len(data))
                done += os.write(self.fd, data[done : done + CHUNK])
            except BlockingIOError:
                return self._wait(done, len(data))
            except OSError as error:
                self.error = error
                if self.on_broken is not None:
                    self.on_broken()
        return len(data)

    def _wait(self, done: int, size: int) -> int:
        if self._lossy or self.closing:
            return size
        if not self._waiting:
            self._waiting = True
            self._io.add_writer(self.fd, self._room)
        return done

    def _room(self) -> None:
        self._stop_waiting()
        self._port.more()

    def close(self) -> None:
        """Call and be called no more."""
        self._port.detach()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._io.remove_writer(self.fd)


def _open(pc: Pc, port: ConsolePort, end: SerialPort, *, capture: bool) -> None:
    kind, _, path = port.where.partition(":")
    if kind == "stdio":
        _open_stdio(pc, port, end, capture=capture)
    elif kind == "pty":
        _open_pty(pc, port, end)
    elif kind == "unix":
        end.add(_Server(pc.io, port, path).close)
    elif kind == "file":
        mode = os.O_APPEND if port.resumed else os.O_TRUNC  # what the guest said before it was saved is kept
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | mode | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise UsageError(f"--console file:{path}: {error.strerror}") from error
        end.add(lambda: os.close(fd))
        _connect_output(pc, port, end, fd)


def _connect_output(pc: Pc, port: ConsolePort, end: SerialPort, fd: int, *, lossy: bool = False) -> Outlet:
    outlet = Outlet(pc.io, fd, port, lossy=lossy)
    end.output = outlet
    end.add(outlet.close)
    port.sink = outlet.write
    return outlet


def _connect_input(pc: Pc, port: ConsolePort, end: SerialPort, fd: int, keys: Callable[[bytes], bytes] | None) -> Input:
    source = Input(pc.io, fd, port.receive, keys)
    port.on_rx_space = source.more
    end.add(source.stop)
    return source


def _open_stdio(pc: Pc, port: ConsolePort, end: SerialPort, *, capture: bool) -> None:
    if not capture:
        out = open_output(1)
        end.add(lambda: os.close(out))
        _connect_output(pc, port, end, out).on_broken = pc.stop_soon
    _connect_input(pc, port, end, 0, escape_keys(pc) if os.isatty(0) else None)
    if os.isatty(0):
        _follow_size(pc, port, end)


def open_output(fd: int) -> int:
    """Another descriptor; a terminal or pipe is opened anew, for O_NONBLOCK is shared by all who hold the old one."""
    if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass  # another user's terminal (su): poll and short writes have to do
    return os.dup(fd)


def _follow_size(pc: Pc, port: ConsolePort, end: SerialPort) -> None:
    """Tell the guest the terminal's size, now and at each SIGWINCH."""
    from _signal import signal  # type: ignore[import-not-found]
    from signal import SIGWINCH

    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def measure() -> None:
        try:
            os.eventfd_read(wake)
        except BlockingIOError:
            pass
        try:
            port.resize(*os.get_terminal_size(0))
        except OSError:
            pass  # the terminal has gone

    measure()
    before = signal(SIGWINCH, lambda number, frame: os.eventfd_write(wake, 1))  # takes no lock, unlike call_soon
    pc.io.add_reader(wake, measure)

    def undo() -> None:
        signal(SIGWINCH, before)
        pc.io.remove_reader(wake)
        os.close(wake)

    end.add(undo)


def _open_pty(pc: Pc, port: ConsolePort, end: SerialPort) -> None:
    ours = make_pty(end, port.name or "virtio console")
    _connect_output(pc, port, end, ours, lossy=True)
    _connect_input(pc, port, end, ours, None)


class _Server:
    """A port at a Unix socket: one client at a time, the next one waits until it has gone."""

    def __init__(self, io: IoThread, port: ConsolePort, path: str) -> None:
        from pykvm.virtio.unixsocket import Listener

        self._io = io
        self._port = port
        self._client: socket.socket | None = None
        self._waiting: list[socket.socket] = []
        self._listener = Listener(path, "console")
        self._listener.start(io, self._accept)
        if not port.console:
            port.connect(False)

    def _accept(self, client: socket.socket) -> None:
        if self._client is not None:
            if len(self._waiting) < 8:
                self._waiting.append(client)
            else:
                client.close()
            return
        self._client = client
        self._outlet = Outlet(self._io, client.fileno(), self._port)
        self._outlet.on_broken = self._hang_up_soon
        self._port.sink = self._outlet.write
        self._source = Input(self._io, client.fileno(), self._port.receive)
        self._source.on_end = self._hang_up
        self._port.on_rx_space = self._source.more
        if not self._port.console:
            self._port.connect(True)

    def _hang_up_soon(self) -> None:
        self._io.call_soon(self._hang_up)

    def _hang_up(self) -> None:
        if self._client is None:
            return
        self._release()
        if not self._port.console:
            self._port.connect(False)
        self._port.more()  # what it did not take is lost
        if self._waiting:
            self._accept(self._waiting.pop(0))

    def _release(self) -> None:
        client, self._client = self._client, None
        self._source.stop()
        self._outlet.close()
        if client is not None:
            client.close()

    def close(self) -> None:
        """Hang up, and stop listening."""
        self._listener.close()
        if self._client is not None:
            self._release()
        for client in self._waiting:
            client.close()
