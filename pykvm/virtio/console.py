"""virtio-console: hvc0 and further ports, each a pair of byte streams. Layer: virtio.

Source: virtio 1.2, 5.3 (Console Device). VIRTIO_CONSOLE_F_MULTIPORT, with control messages for names, sizes, opening
and closing, is offered for one console, too: without it Linux does not say when it has made hvc0, and throws away input
that comes between its first receive buffer and that.

    console = Console([ConsolePort(console=True), ConsolePort("org.example.agent")])
    console.ports[1].sink = print
    with Pc(kernel, devices=[console]) as vm: ...
"""

from __future__ import annotations

from collections import deque

from pykvm._native import ffi, lib
from pykvm.core.state import BOOL, U16, U32, Bytes, Int, ListOf, Row, Shape
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.chain import slices
from pykvm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pykvm._native import CData
    from pykvm.core.console import Console as Log
    from pykvm.core.state import State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

MAX_PORTS = 16
MAX_NAME = 255  # bytes of a port's name
QUEUE_SIZE = 128
CHUNK = 64 << 10  # bytes that a sink gets at a time
TURN = 1 << 20  # bytes that one port may print before the I/O thread turns to other work
CHAIN_COST = 1024  # bytes that a short chain counts as
MAX_CONTROL = 256  # control messages that wait for a driver; more means that it asks and never listens

CONTROL_RX, CONTROL_TX = 2, 3  # 5.3.2: the queues of port 0 are 0 and 1, those of port n 2n + 2 and 2n + 3
SIZE, MULTIPORT = 1 << lib.VIRTIO_CONSOLE_F_SIZE, 1 << lib.VIRTIO_CONSOLE_F_MULTIPORT
EMERG_WRITE = 1 << lib.VIRTIO_CONSOLE_F_EMERG_WRITE
EMERG_AT = ffi.offsetof("struct virtio_console_config", "emerg_wr")
CONTROL_SIZE = ffi.sizeof("struct virtio_console_control")

# What the guest knows of whether somebody is at a port's other end
UNTOLD, TOLD_CLOSED, TOLD_OPEN = range(3)
# name, console, open, connected, what the guest knows of that, columns, rows, bytes of the first chain that are out
PORT = Row(Bytes(0, MAX_NAME), BOOL, BOOL, BOOL, Int(UNTOLD, TOLD_OPEN), U16, U16, U32)


class ConsolePort:
    """One port: `sink` gets what the guest writes, `receive` gives it input.

    name         in the guest: /dev/virtio-ports/NAME
    console      a terminal in the guest (hvc0, hvc1, ...), which needs no name
    sink         called on the I/O thread with bytes, and never blocks; returns None when it took them all, else how
                 many it took: the guest then waits until `more` is called
    on_rx_space  called as soon as the guest has made room after `receive` had to turn bytes away
    on_open      called with True or False when a program in the guest opens or closes the port
    where        what is at the other end, in a front end's words (pykvm.cli.consoleport): a snapshot file keeps it
    resumed      made for a machine that goes on, by `twin` or from a file: nobody is at the other end yet
    """

    where = ""
    resumed = False

    def __init__(
        self, name: str = "", *, console: bool = False, sink: Callable[[bytes], int | None] | None = None
    ) -> None:
        if not name and not console:
            raise ConfigError("console", "a port that is no console needs a name")
        self._raw_name = name.encode(errors="surrogateescape")
        if len(self._raw_name) > MAX_NAME:
            raise ConfigError("console", f"a port's name of more than {MAX_NAME} bytes")
        self.name = name
        self.console = console
        self.sink = sink
        self.echo: Callable[[bytes], object] | None = None  # a second sink, which takes everything
        self.on_rx_space: Callable[[], object] | None = None
        self.on_open: Callable[[bool], object] | None = None
        self.size = (0, 0)  # columns, rows
        self.open = False  # by the guest
        self.connected = True
        self._starved = False
        self._draining = False
        self._offset = 0  # how much of the next chain of output is out
        self._told = UNTOLD

    def bind(self, device: Console, index: int) -> None:
        """The port was put into a device."""
        self._device = device
        self._index = index
        first = 2 * index + (2 if index else 0)
        self.rx, self.tx = device.queues[first], device.queues[first + 1]

    # -- the host's side ----------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """Offer input to the guest; returns how many bytes were taken (from the front), possibly none."""
        transport = self._device.transport
        with transport.lock:
            taken = 0
            if transport.live and self.open:  # Linux throws away what comes before, even for hvc0
                taken = transport.guarded(self._fill, data) or 0
            self._starved = taken < len(data)
            return taken

    def more(self) -> None:
        """The sink takes bytes again; from any thread."""
        self._device.transport.notify(self.tx.index)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal at the other end; from any thread."""
        with self._device.transport.lock:
            self.size = (columns & 0xFFFF, rows & 0xFFFF)
            self._device.resized(self._index)

    def connect(self, connected: bool) -> None:
        """Tell the guest whether somebody is at the other end (of a port that is no console)."""
        with self._device.transport.lock:
            self.connected = connected
            if self._told != UNTOLD:
                self._told = TOLD_OPEN if connected else TOLD_CLOSED
            self._device.say(self._index, lib.VIRTIO_CONSOLE_PORT_OPEN, int(connected))

    def detach(self) -> None:
        """Call neither sink nor `on_rx_space` any more: when this returns, none of them runs."""
        with self._device.transport.lock:
            self.sink = self.on_rx_space = None

    @property
    def drained(self) -> bool:
        """Whether the sink has all that the guest wrote until now; what it has not is offered to it (again)."""
        transport = self._device.transport
        with transport.lock:
            if transport.live:
                transport.guarded(self.drain)
            waiting = transport.guarded(self.tx.pending) if transport.live and self.tx.enabled else 0
            return not waiting

    # -- the device's side --------------------------------------------------------------------------------------

    def _fill(self, data: bytes) -> int:
        taken = 0
        for _ in range(self.rx.size):
            if taken == len(data):
                break
            chain = self.rx.pop()
            if chain is not None:
                written = chain.write(data[taken : taken + CHUNK])
                self.rx.push(chain, written)
                taken += written
            elif not self.rx.want_notification():
                break
        self._device.transport.interrupt(self.rx)
        return taken

    def room(self) -> None:
        """The guest offers buffers for input."""
        if self._starved and self.on_rx_space is not None:
            self._starved = False
            self.on_rx_space()

    def drain(self) -> None:
        """Pass the guest's output on, until it has no more, the sink has no room, or a turn is over."""
        if self._draining:
            return  # the sink itself wants to see all output
        self._draining = True
        try:
            self._drain()
        finally:
            self._draining = False
        self._device.transport.interrupt(self.tx)

    def _drain(self) -> None:
        left = TURN
        while left > 0:
            chain = self.tx.pop()
            if chain is None:
                if not self.tx.want_notification():
                    break
                left -= CHAIN_COST
                continue
            data = b"".join(slices(chain.readable, self._offset, min(CHUNK, left)))
            taken = self._put(data)
            left -= max(taken, CHAIN_COST)
            if chain.generation != self.tx.generation:
                break  # the sink had the device reset
            self._offset += taken
            if self._offset >= chain.readable_size:  # less than before, if the driver changes what it offered
                self._offset = 0
                self.tx.push(chain)
            else:
                self.tx.unpop()
                if taken < len(data):
                    break
        else:
            self.more()

    def _put(self, data: bytes) -> int:
        if not data:
            return 0
        taken = None if self.sink is None else self.sink(data)
        if taken is None:
            taken = len(data)
        if self.echo is not None and taken:
            self.echo(data[:taken])
        return taken

    def emergency(self, byte: int) -> None:
        """A byte that the guest wrote without queues (5.3.4)."""
        self._put(bytes([byte]))

    def set_open(self, opened: bool) -> None:
        """A program of the guest opened or closed the port."""
        if opened is not self.open:
            self.open = opened
            if self.on_open is not None:
                self.on_open(opened)
            if opened:
                self.room()

    def reset(self) -> None:
        """The device was reset."""
        self._offset = 0
        self._told = UNTOLD
        self.set_open(False)

    # -- introductions and snapshots ----------------------------------------------------------------------------

    def introduce(self) -> None:
        """The driver has made the port: say what there is to know of it."""
        say, index = self._device.say, self._index
        if self.console:
            say(index, lib.VIRTIO_CONSOLE_CONSOLE_PORT, 1)
        if self.name:
            say(index, lib.VIRTIO_CONSOLE_PORT_NAME, 1, self._raw_name)
        self._told = TOLD_OPEN if self.connected else TOLD_CLOSED
        if self.connected:
            say(index, lib.VIRTIO_CONSOLE_PORT_OPEN, 1)
        if self.console and any(self.size):
            self._device.resized(index)

    def twin(self) -> ConsolePort:
        """The same port for a copy of the machine, with nothing at its other end."""
        port = ConsolePort(self.name, console=self.console)
        port.resumed = True
        return port

    def save(self) -> list[bytes | bool | int]:
        """A PORT."""
        return [self._raw_name, self.console, self.open, self.connected, self._told, *self.size, self._offset]

    def is_like(self, row: list[bytes | bool | int]) -> bool:
        """Whether the PORT is one of the same name and kind."""
        return row[:2] == [self._raw_name, self.console]

    def restore(self, row: list[int]) -> None:
        """Go on from a PORT. What is at the other end now may be something else: then the guest is told."""
        _, _, opened, connected, self._told, columns, rows, self._offset = row
        if self.resumed:
            self.connected = bool(connected)
        if not any(self.size):
            self.size = (columns, rows)
        elif self.size != (columns, rows):
            self._device.resized(self._index)
        if self._told != UNTOLD and self.connected is not (self._told == TOLD_OPEN):
            self.connect(self.connected)
        self.set_open(bool(opened))


class Console(VirtioDevice):
    """The device that ports are in; the first port should be the console of the guest."""

    name = "virtio-console"
    device_id = lib.VIRTIO_ID_CONSOLE
    features = SIZE | EMERG_WRITE | MULTIPORT

    def __init__(self, ports: Sequence[ConsolePort] | None = None) -> None:
        self.ports = list(ports or [ConsolePort(console=True)])
        if len(self.ports) > MAX_PORTS:
            raise ConfigError("console", f"{len(self.ports)} ports are more than {MAX_PORTS}")
        names = [port.name for port in self.ports if port.name]
        if len(names) != len(set(names)):
            raise ConfigError("console", "two ports have the same name")
        self.queue_sizes = (QUEUE_SIZE,) * (2 + 2 * len(self.ports))
        self._multiport = False  # negotiated
        self._control: deque[bytes] = deque()

    def bind(self, transport: object) -> None:
        """Give each port its queues."""
        super().bind(transport)  # type: ignore[arg-type]
        for index, port in enumerate(self.ports):
            port.bind(self, index)

    def config(self) -> bytes:
        """struct virtio_console_config (5.3.4)."""
        columns, rows = self.ports[0].size
        config: CData = ffi.new("struct virtio_console_config *")
        config.cols, config.rows, config.max_nr_ports = columns, rows, len(self.ports)
        return bytes(ffi.buffer(config))

    def write_config(self, offset: int, data: bytes) -> None:
        """Only emerg_wr may be written: the low byte is output, even before the driver is set up."""
        if offset == EMERG_AT:
            self.ports[0].emergency(data[0])

    def activate(self, features: int) -> None:
        """Without multiport the one port is there and open."""
        self._multiport = bool(features & MULTIPORT)
        if not self._multiport:
            self.ports[0].set_open(True)

    def reset(self) -> None:
        """Forget what was to be said."""
        self._multiport = False
        self._control.clear()
        for port in self.ports:
            port.reset()

    def join(self, console: Log) -> None:
        """Terminals of the guest are the machine's console as well."""
        for port in self.ports:
            if port.console:
                port.echo = console.write
        console.flushers.append(self.flush)

    def flush(self) -> None:
        """Fetch output that the I/O thread has not come to yet; from any thread."""
        with self.transport.lock:
            if self.transport.live:
                for port in self.ports:
                    self.transport.guarded(port.drain)

    # -- snapshots ----------------------------------------------------------------------------------------------

    shape = Shape(
        1,
        multiport=BOOL,
        control=ListOf(Bytes(CONTROL_SIZE, CONTROL_SIZE + MAX_NAME), 0, MAX_CONTROL),
        ports=ListOf(PORT, 1, MAX_PORTS),
    )

    def save(self) -> State:
        """Each port, and what was not said yet. Output that its sink has not taken stays in the rings."""
        return {
            "multiport": self._multiport,
            "control": list(self._control),
            "ports": [port.save() for port in self.ports],
        }

    def restore(self, state: State) -> None:
        """Go on, with what is at the ports' other ends now."""
        rows = state["ports"]
        if len(rows) != len(self.ports) or not all(map(ConsolePort.is_like, self.ports, rows)):
            raise SnapshotError(f"{self.name}: the snapshot's console has other ports")
        self._multiport = state["multiport"]
        self._control = deque(state["control"])
        for port, row in zip(self.ports, rows, strict=True):
            port.restore(row)

    def twin(self) -> Console:
        """The same ports, with nothing at their other ends."""
        return Console([port.twin() for port in self.ports])

    def recipe(self) -> tuple[str, dict[str, object]]:
        """The ports, each with what is at its other end."""
        return "console", {"ports": [[port.name, port.console, port.where] for port in self.ports]}

    def on_notify(self, queue: Virtqueue) -> None:
        """Data of a port, or control messages."""
        if queue.index == CONTROL_TX:
            super().on_notify(queue)
        elif queue.index == CONTROL_RX:
            self._flush_control()
        else:
            port = self.ports[(queue.index - 2) // 2 if queue.index > CONTROL_TX else 0]
            if queue is port.tx:
                port.drain()
            else:
                port.room()

    # -- control messages (5.3.6.2) -----------------------------------------------------------------------------

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """A control message of the driver; one that means nothing here is ignored."""
        raw = chain.read(CONTROL_SIZE)
        if len(raw) < CONTROL_SIZE:
            return 0
        message: CData = ffi.new("struct virtio_console_control *")
        ffi.memmove(message, raw, CONTROL_SIZE)
        number, event, value = message.id, message.event, message.value
        if event == lib.VIRTIO_CONSOLE_DEVICE_READY and value == 1:
            for index in range(len(self.ports)):
                self.say(index, lib.VIRTIO_CONSOLE_PORT_ADD)
        elif number < len(self.ports):
            if event == lib.VIRTIO_CONSOLE_PORT_READY and value == 1:
                self.ports[number].introduce()
            elif event == lib.VIRTIO_CONSOLE_PORT_OPEN:
                self.ports[number].set_open(bool(value))
        return 0

    def resized(self, index: int) -> None:
        """The size of a port changed: by configuration or by message (struct virtio_console_resize: cols, rows)."""
        port = self.ports[index]
        if self._multiport:
            if port.console:
                columns, rows = (value.to_bytes(2, "little") for value in port.size)
                self.say(index, lib.VIRTIO_CONSOLE_RESIZE, 0, columns + rows)
        elif index == 0:
            self.config_changed()

    def say(self, index: int, event: int, value: int = 0, extra: bytes = b"") -> None:
        """Send a control message about port `index`; dropped while the driver knows of no control queue."""
        if not self._multiport:
            return
        if len(self._control) >= MAX_CONTROL:
            self.transport.needs_reset("the driver takes no control messages")
            return
        message: CData = ffi.new("struct virtio_console_control *", {"id": index, "event": event, "value": value})
        self._control.append(bytes(ffi.buffer(message)) + extra)
        if self.transport.live:
            self.transport.guarded(self._flush_control)

    def _flush_control(self) -> None:
        queue = self.queues[CONTROL_RX]
        for _ in range(2 * MAX_CONTROL):
            if not self._control:
                break
            chain = queue.pop()
            if chain is not None:
                queue.push(chain, chain.write(self._control.popleft()))
            elif not queue.want_notification():
                break
        self.transport.interrupt(queue)
