"""The console device: streams both ways, sizes, ports by control messages, and drivers that misuse them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from driver import VERSION_1, WRITE, Driver, Queue

from pykvm._native import lib
from pykvm.core.console import Console as Log
from pykvm.errors import ConfigError
from pykvm.virtio.console import MAX_CONTROL, TURN, Console, ConsolePort

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

RX, TX, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
NO_MULTIPORT = 1 << lib.VIRTIO_CONSOLE_F_SIZE


class Outlet:
    """A sink with `room` bytes of room; None is no end of it."""

    def __init__(self, room: int | None = None) -> None:
        self.data = bytearray()
        self.room = room

    def __call__(self, data: bytes) -> int | None:
        if self.room is None:
            self.data += data
            return None
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)


def say(queue: Queue, number: int, event: int, value: int) -> None:
    """Send a control message as the driver."""
    queue.add([struct.pack("<IHH", number, event, value)])
    queue.kick()


class Ear:
    """The driver's control receive queue: buffers that it refills, and the messages that came."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.places: list[int] = []
        for _ in range(32):
            self.places += queue.add([], [64])
        queue.kick()

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        """(port, event, value, the rest) of each message since the last call."""
        found = []
        for head, written in self.queue.used():
            raw = self.queue.driver.memory.read(self.places[head % 32], written)
            found.append((*struct.unpack_from("<IHH", raw), raw[8:]))
        return found


def multiport(drive: Drive, console: Console) -> tuple[Driver, list[Queue], Ear]:
    """A device whose driver has said that it and all ports are ready; the messages of that are heard already."""
    driver = drive(console)
    queues = driver.start()
    ear = Ear(queues[CONTROL_RX])
    say(queues[CONTROL_TX], 0xFFFFFFFF, lib.VIRTIO_CONSOLE_DEVICE_READY, 1)
    return driver, queues, ear


def test_output_and_input_of_one_console(drive: Drive) -> None:
    """What the guest writes reaches the sink in order, what `receive` takes is in the guest's buffers (5.3.6)."""
    outlet = Outlet()
    port = ConsolePort(console=True, sink=outlet)
    driver = drive(Console([port]))
    queues = driver.start(NO_MULTIPORT)
    queues[TX].add([b"hello, ", b"world"])
    queues[TX].add([b"!"])
    queues[TX].kick()
    assert (bytes(outlet.data), len(queues[TX].used())) == (b"hello, world!", 2)
    places = queues[RX].add([], [4]) + queues[RX].add([], [4])
    queues[RX].kick()
    assert port.receive(b"abcdefghij") == 8
    assert queues[RX].used() == [(0, 4), (1, 4)]
    assert driver.memory.read(places[0], 4) + driver.memory.read(places[1], 4) == b"abcdefgh"
    assert driver.interrupts() > 0


def test_input_waits_for_buffers(drive: Drive) -> None:
    """Input is refused before the driver runs and while it has no buffers; then the sender is told once."""
    port = ConsolePort(console=True)
    told: list[int] = []
    port.on_rx_space = lambda: told.append(1)
    driver = drive(Console([port]))
    assert port.receive(b"early") == 0
    queues = driver.start(NO_MULTIPORT)
    assert told == [1]
    assert port.receive(b"no buffer") == 0
    queues[RX].add([], [16])
    queues[RX].kick()
    queues[RX].kick()
    assert told == [1, 1]
    assert port.receive(b"no buffer") == 9
    assert queues[RX].used() == [(0, 9)]


def test_output_waits_for_a_slow_reader(drive: Drive) -> None:
    """A sink that is full keeps the guest's buffers in the queue; nothing is lost, repeated or reordered."""
    outlet = Outlet(5)
    port = ConsolePort(console=True, sink=outlet)
    driver = drive(Console([port]))
    queues = driver.start()
    queues[TX].add([b"0123456"])
    queues[TX].add([b"789"])
    queues[TX].kick()
    queues[TX].kick()
    assert (bytes(outlet.data), queues[TX].used()) == (b"01234", [])
    outlet.room = 4
    port.more()
    driver.io.run()
    assert (bytes(outlet.data), queues[TX].used()) == (b"012345678", [(0, 0)])
    outlet.room = None
    port.more()
    driver.io.run()
    assert (bytes(outlet.data), queues[TX].used()) == (b"0123456789", [(1, 0)])


def test_reset_drops_what_a_slow_reader_left(drive: Drive) -> None:
    """A chain held for the sink is not finished after a reset."""
    outlet = Outlet(1)
    port = ConsolePort(console=True, sink=outlet)
    driver = drive(Console([port]))
    queues = driver.start()
    queues[TX].add([b"abc"])
    queues[TX].kick()
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    driver.memory.fill(0x10000, 0x40000)
    outlet.room = None
    queues = driver.start()
    port.more()
    driver.io.run()
    queues[TX].add([b"new"])
    queues[TX].kick()
    assert (bytes(outlet.data), queues[TX].used()) == (b"anew", [(0, 0)])


def test_endless_output_is_taken_in_turns(drive: Drive) -> None:
    """A gigabyte in one chain reaches the sink piece by piece, and the I/O thread is free between turns."""
    total = [0]

    def sink(data: bytes) -> None:
        total[0] += len(data)

    driver = drive(Console([ConsolePort(console=True, sink=sink)]))
    queues = driver.start(1 << lib.VIRTIO_RING_F_INDIRECT_DESC)
    queues[TX].add_indirect([(0, 1 << 20, 0)] * 1000)
    driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, TX)
    driver.io.run(3)
    assert TURN <= total[0] <= 3 * TURN
    assert queues[TX].used() == []


def test_short_lines_are_taken_in_turns(drive: Drive) -> None:
    """A driver that adds a line whenever one is printed does not keep the I/O thread either."""
    queues: list[Queue] = []
    lines = [0]

    def sink(data: bytes) -> None:
        lines[0] += 1
        queues[TX].offer(0)

    driver = drive(Console([ConsolePort(console=True, sink=sink)]))
    queues += driver.start()
    queues[TX].add([b"x"])
    driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, TX)
    driver.io.run(3)
    assert 100 < lines[0] < 10_000


def test_size_in_the_configuration_space(drive: Drive) -> None:
    """Without multiport columns and rows are in the configuration, whose change interrupts (5.3.5)."""
    port = ConsolePort(console=True)
    driver = drive(Console([port]))
    driver.start(NO_MULTIPORT)
    port.resize(132, 43)
    assert driver.interrupts() == 1
    assert [driver.read(lib.VIRTIO_MMIO_CONFIG + at, 2) for at in (0, 2)] == [132, 43]


def test_emergency_write(drive: Drive) -> None:
    """A guest without a driver writes a byte into the configuration space (5.3.5)."""
    outlet = Outlet()
    driver = drive(Console([ConsolePort(console=True, sink=outlet)]))
    driver.write(lib.VIRTIO_MMIO_CONFIG + 8, ord("!"))
    driver.write(lib.VIRTIO_MMIO_CONFIG, 0xFFFF, 2)
    assert bytes(outlet.data) == b"!"
    assert driver.read(lib.VIRTIO_MMIO_CONFIG, 2) == 0


def test_no_input_before_linux_has_its_terminal(drive: Drive) -> None:
    """Receive buffers alone are no terminal: Linux throws away what comes before it says that the port is open."""
    port = ConsolePort(console=True)
    _, queues, _ = multiport(drive, Console([port]))
    queues[RX].add([], [16])
    queues[RX].kick()
    assert port.receive(b"early") == 0
    say(queues[CONTROL_TX], 0, lib.VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert port.receive(b"typed") == 5


def test_ports_introduce_themselves(drive: Drive) -> None:
    """Ready driver: every port is added; ready port: what it is, its name, whether it is connected, its size."""
    ports = [ConsolePort(console=True), ConsolePort("org.example.agent")]
    ports[0].size = (80, 25)
    driver, queues, ear = multiport(drive, Console(ports))
    add = lib.VIRTIO_CONSOLE_PORT_ADD
    assert driver.read(lib.VIRTIO_MMIO_CONFIG + 4) == 2
    assert ear.heard() == [(0, add, 0, b""), (1, add, 0, b"")]
    say(queues[CONTROL_TX], 0, lib.VIRTIO_CONSOLE_PORT_READY, 1)
    assert ear.heard() == [
        (0, lib.VIRTIO_CONSOLE_CONSOLE_PORT, 1, b""),
        (0, lib.VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
        (0, lib.VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 80, 25)),
    ]
    ports[1].connect(False)
    assert ear.heard() == [(1, lib.VIRTIO_CONSOLE_PORT_OPEN, 0, b"")]
    say(queues[CONTROL_TX], 1, lib.VIRTIO_CONSOLE_PORT_READY, 1)
    assert ear.heard() == [(1, lib.VIRTIO_CONSOLE_PORT_NAME, 1, b"org.example.agent")]
    ports[0].resize(100, 30)
    assert ear.heard() == [(0, lib.VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 100, 30))]


def test_a_named_port_takes_input_while_it_is_open(drive: Drive) -> None:
    """A driver throws away input of a port that nobody has opened, so it gets none until then."""
    opened: list[bool] = []
    told: list[int] = []
    port = ConsolePort("agent")
    port.on_open = opened.append
    port.on_rx_space = lambda: told.append(1)
    _, queues, _ = multiport(drive, Console([ConsolePort(console=True), port]))
    queues[RX1].add([], [16])
    queues[RX1].kick()
    assert port.receive(b"x") == 0
    told.clear()
    say(queues[CONTROL_TX], 1, lib.VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert (opened, told, port.receive(b"x")) == ([True], [1], 1)
    say(queues[CONTROL_TX], 1, lib.VIRTIO_CONSOLE_PORT_OPEN, 0)
    assert (opened, port.receive(b"x")) == ([True, False], 0)


def test_a_console_port_takes_input_from_its_opening_on(drive: Drive) -> None:
    """Among several ports a console's input waits for PORT_OPEN as well: Linux throws away what comes before."""
    told: list[int] = []
    port = ConsolePort(console=True)
    port.on_rx_space = lambda: told.append(1)
    _, queues, _ = multiport(drive, Console([port, ConsolePort("agent")]))
    queues[RX].add([], [8])
    assert port.receive(b"x") == 0
    say(queues[CONTROL_TX], 0, lib.VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert (told, port.receive(b"x")) == ([1], 1)


def test_named_ports_have_their_own_queues(drive: Drive) -> None:
    """Output of port 1 goes to its own sink."""
    outlets = [Outlet(), Outlet()]
    ports = [ConsolePort(console=True, sink=outlets[0]), ConsolePort("agent", sink=outlets[1])]
    _, queues, _ = multiport(drive, Console(ports))
    queues[TX1].add([b"to the agent"])
    queues[TX1].kick()
    assert [bytes(outlet.data) for outlet in outlets] == [b"", b"to the agent"]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"short",
        struct.pack("<IHH", 2, lib.VIRTIO_CONSOLE_PORT_READY, 1),
        struct.pack("<IHH", 0xFFFFFFFF, lib.VIRTIO_CONSOLE_PORT_OPEN, 1),
        struct.pack("<IHH", 0, 0xFFFF, 0xFFFF),
        struct.pack("<IHH", 0, lib.VIRTIO_CONSOLE_PORT_READY, 0),
        struct.pack("<IHH", 0, lib.VIRTIO_CONSOLE_DEVICE_READY, 0) + b"and more" * 1000,
    ],
)
def test_control_messages_that_mean_nothing(drive: Drive, message: bytes) -> None:
    """They are taken and ignored."""
    driver, queues, ear = multiport(drive, Console([ConsolePort(console=True), ConsolePort("agent")]))
    ear.heard()
    queues[CONTROL_TX].used()
    if message:
        queues[CONTROL_TX].add([message])
    else:
        queues[CONTROL_TX].add([], [8])
    queues[CONTROL_TX].kick()
    assert len(queues[CONTROL_TX].used()) == 1
    assert ear.heard() == [] and not driver.needs_reset


def test_a_driver_that_asks_and_never_listens(drive: Drive) -> None:
    """Control messages are kept for a driver without buffers up to a bound; then the device wants a reset."""
    console = Console([ConsolePort(console=True), ConsolePort("agent")])
    driver = drive(console)
    queues = driver.start()
    for _ in range(MAX_CONTROL):
        say(queues[CONTROL_TX], 0, lib.VIRTIO_CONSOLE_DEVICE_READY, 1)
        driver._free = 0x80000
    assert driver.needs_reset
    assert len(console._control) <= MAX_CONTROL
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert not console._control


def test_small_control_buffers_cut_messages_short(drive: Drive) -> None:
    """A buffer too small for a message gets its beginning, and one without room nothing."""
    driver = drive(Console([ConsolePort(console=True), ConsolePort("agent")]))
    queues = driver.start()
    queues[CONTROL_RX].add([], [4])
    queues[CONTROL_RX].add([b"readable"])
    say(queues[CONTROL_TX], 0, lib.VIRTIO_CONSOLE_DEVICE_READY, 1)
    assert [written for _, written in queues[CONTROL_RX].used()] == [4, 0]
    assert not driver.needs_reset


def test_a_broken_receive_queue_stops_the_device(drive: Drive) -> None:
    """`receive` meets a bad ring as the I/O thread would: NEEDS_RESET, and no exception for the sender."""
    port = ConsolePort(console=True)
    driver = drive(Console([port]))
    queues = driver.start(NO_MULTIPORT)
    queues[RX].descriptor(0, 1 << 40, 16, WRITE)
    queues[RX].offer(0)
    assert port.receive(b"x") == 0
    assert driver.needs_reset
    assert port.receive(b"x") == 0


def test_a_driver_without_multiport(drive: Drive) -> None:
    """A driver that knows nothing of ports has the first one."""
    outlet = Outlet()
    console = Console([ConsolePort(console=True, sink=outlet), ConsolePort("agent")])
    driver = drive(console)
    queues = driver.start(VERSION_1)
    queues[TX].add([b"plain"])
    queues[TX].kick()
    console.ports[1].connect(True)
    console.ports[0].resize(1, 2)
    assert bytes(outlet.data) == b"plain" and not console._control


def test_the_machines_console_has_it_all(drive: Drive) -> None:
    """A terminal's output is in the machine's console, even what the I/O thread has not come to."""
    log = Log()
    console = Console([ConsolePort(console=True), ConsolePort("agent")])
    console.join(log)
    _, queues, _ = multiport(drive, console)
    queues[TX].add([b"login: "])
    queues[TX1].add([b"not this"])
    assert log.text == "login: "


def test_impossible_consoles() -> None:
    """A port without name and terminal, two of one name, and too many of them are refused."""
    with pytest.raises(ConfigError, match="needs a name"):
        ConsolePort()
    with pytest.raises(ConfigError, match="same name"):
        Console([ConsolePort("a"), ConsolePort("a")])
    with pytest.raises(ConfigError, match="more than"):
        Console([ConsolePort(str(n)) for n in range(17)])


def test_ports_that_the_driver_leaves_alone(drive: Drive) -> None:
    """A driver may set up some of the queues only: what the host does with the rest finds nothing to do."""
    console = Console([ConsolePort(console=True), ConsolePort("agent")])
    driver = drive(console)
    driver.negotiate()
    driver.setup_queue(TX)
    driver.write(lib.VIRTIO_MMIO_STATUS, driver.transport.status | lib.VIRTIO_CONFIG_S_DRIVER_OK)
    console.flush()
    console.ports[0].resize(80, 25)
    console.ports[1].set_open(True)
    assert console.ports[1].receive(b"hello") == 0 and console.ports[1].drained
    assert not driver.needs_reset
