"""Consoles, balloons and sockets in snapshots: what goes on, what the guest is told, and states that are refused."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest
from driver import RAM, WRITE, Driver
from test_console import CONTROL_RX, CONTROL_TX, TX, Ear, Outlet, multiport, say
from test_saved import moved
from test_vsock import CID, RST, RW, Guest, connected

from pykvm._native import lib
from pykvm.core.memory import GuestMemory
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.console import Console, ConsolePort
from pykvm.virtio.vsock import Vsock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pykvm.core.state import State
    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

OPEN, RESIZE = lib.VIRTIO_CONSOLE_PORT_OPEN, lib.VIRTIO_CONSOLE_RESIZE
STATS, EVENT = 2, 2


def test_output_that_waits_goes_on_elsewhere(drive: Drive) -> None:
    """A sink took half of a buffer: after the restore the other half comes, and the driver gets its buffer once."""
    port = ConsolePort(console=True, sink=Outlet(3))
    driver = drive(Console([port]))
    queue = driver.start()[TX]
    queue.add([b"half", b"time"])
    queue.add([b", over"])
    queue.kick()
    driver.transport.hold()
    state = driver.transport.save()
    driver.transport.release()
    twin = driver.transport.device.twin()
    rest = Outlet()
    twin.ports[0].sink = rest  # type: ignore[attr-defined]
    other = moved(driver, twin, state)
    assert rest.data == b"ftime, over"
    assert [head for head, _ in other.queues[TX].used()] == [0, 2] and other.interrupts()
    other.close()
    port.sink = mine = Outlet()
    queue.driver = driver
    port.more()
    driver.io.run()
    assert mine.data == b"ftime, over"  # the machine that was saved has lost nothing either


def ported(drive: Drive) -> tuple[Driver, Console]:
    """A console whose two ports are introduced, the second one open in the guest."""
    console = Console([ConsolePort(console=True), ConsolePort("agent")])
    driver, queues, ear = multiport(drive, console)
    for number in (0, 1):
        say(queues[CONTROL_TX], number, lib.VIRTIO_CONSOLE_PORT_READY, 1)
    say(queues[CONTROL_TX], 1, OPEN, 1)
    ear.heard()
    return driver, console


def test_the_guest_hears_what_is_different_now(drive: Drive) -> None:
    """Nobody is at a port any more, and the terminal has another size: messages say so; else there are none."""
    driver, console = ported(drive)
    state = driver.transport.save()
    twin = console.twin()
    other = moved(driver, twin, state)
    opened = [port.open for port in twin.ports]
    assert (opened, other.queues[CONTROL_RX].used()) == ([False, True], [])
    twin.ports[0].size = (132, 43)
    twin.ports[1].resumed = twin.ports[1].connected = False
    other.transport.restore(state)
    other.io.run()
    ear = Ear.__new__(Ear)
    ear.queue, ear.places = other.queues[CONTROL_RX], [other.memory.read_u64(0x20000 + 16 * n) for n in range(32)]
    heard = ear.heard()
    assert (1, OPEN, 0, b"") in heard and (0, RESIZE, 0, struct.pack("<HH", 132, 43)) in heard
    other.close()


def test_messages_that_wait_are_kept(drive: Drive) -> None:
    """What the driver has no buffer for yet is said after the restore."""
    console = Console([ConsolePort(console=True), ConsolePort("agent")])
    driver = drive(console)
    queues = driver.start()
    say(queues[CONTROL_TX], 0xFFFFFFFF, lib.VIRTIO_CONSOLE_DEVICE_READY, 1)
    other = moved(driver, console.twin(), driver.transport.save())
    assert [event for _, event, _, _ in Ear(other.queues[CONTROL_RX]).heard()] == [lib.VIRTIO_CONSOLE_PORT_ADD] * 2
    other.close()


def test_a_port_that_is_closed_and_opened_by_the_restore(drive: Drive) -> None:
    """The same machine goes back to when a port was open: its owner hears so."""
    driver, console = ported(drive)
    state = driver.transport.save()
    say(driver.queues[CONTROL_TX], 1, OPEN, 0)
    heard: list[bool] = []
    console.ports[1].on_open = heard.append
    driver.transport.restore(state)
    assert heard == [True] and console.ports[1].open


def test_other_ports(drive: Drive) -> None:
    """Another number of ports, and one of another name, are no ports of this console."""
    driver, _ = ported(drive)
    state = driver.transport.save()
    rows = state["device_ports"]
    for ports in (rows[:1], [rows[0], [b"other", *rows[1][1:]]]):
        with pytest.raises(SnapshotError, match="other ports"):
            driver.transport.restore({**state, "device_ports": ports})
    driver.transport.restore(state)


def test_the_buffer_for_statistics_is_found_again(drive: Drive) -> None:
    """The driver's buffer is the device's until somebody asks; a restored device has it, too, and the target."""
    balloon = Balloon(64 << 10)
    driver = drive(balloon)
    queue = driver.start()[STATS]
    numbers = struct.pack("<HQ", lib.VIRTIO_BALLOON_S_MEMFREE, 4711)
    queue.add([numbers])
    queue.kick()
    driver.write(lib.VIRTIO_MMIO_CONFIG + 4, 7)
    balloon.set_target(128 << 10)
    twin = balloon.twin()
    other = moved(driver, twin, driver.transport.save())
    assert (twin.target, twin.actual) == (128 << 10, 7 * 4096)
    assert other.queues[STATS].used() == []
    twin.stats(timeout=0)
    assert other.queues[STATS].used() == [(0, 0)]
    assert twin.stats(timeout=0) == {"free_memory": 4711}
    other.close()
    assert balloon.stats(timeout=0) == {"free_memory": 4711}


def test_a_balloon_that_is_too_large(drive: Drive) -> None:
    """A target of more than the machine has is refused."""
    driver = drive(Balloon())
    driver.start()
    state = driver.transport.save()
    config = (RAM // 4096 + 1).to_bytes(4, "little") + state["device_config"][4:]
    with pytest.raises(SnapshotError, match="larger than the machine"):
        driver.transport.restore({**state, "device_config": config})


def test_a_balloon_in_a_frozen_memory(drive: Drive) -> None:
    """Pages of a snapshot's own copy are given back by inflation, but show what they held then; none is reported."""
    from pykvm.core.memimage import capture, revert

    memory = GuestMemory(memfd=True)
    memory.add(0, RAM)
    memory.fill(0xC0000, 0x2000, 0xAA)
    driver = Driver(Balloon(), memory)
    queues = driver.start()
    capture(memory.slots[0])
    memory.fill(0xC0000, 0x2000, 0xBB)
    queues[0].add([struct.pack("<I", 0xC0)])
    queues[0].kick()
    assert driver.transport.device.released == 4096  # type: ignore[attr-defined]
    assert memory.read_u8(0xC0000) == 0xAA and memory.read_u8(0xC1000) == 0xBB
    revert(memory.slots[0])
    assert memory.read(0xC0000, 0x2000) == b"\xaa" * 0x2000
    driver.close()


def test_connections_end_with_a_reset_event(tmp_path: Path) -> None:
    """A restored guest is told that its connections are gone, as soon as it has a buffer for that (5.10.6.7)."""
    guest = Guest(tmp_path / "vsock")
    client, port = connected(guest)
    state = guest.driver.transport.save()
    twin = guest.device.twin()
    assert twin.path is None
    other = moved(guest.driver, twin, state)
    (place,) = other.queues[EVENT].add([], [4])
    other.queues[EVENT].kick()
    assert other.queues[EVENT].used() == [(0, 4)] and other.interrupts()
    assert other.memory.read_u32(place) == lib.VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    (place,) = other.queues[EVENT].add([], [4])
    other.queues[EVENT].kick()
    assert other.queues[EVENT].used() == []  # once
    other.close()
    for queue in guest.driver.queues:
        queue.driver = guest.driver
    guest.say(RW, port, 22, b"on")  # the machine that was saved goes on
    assert client.recv(10) == b"on"
    guest.driver.transport.restore(state)
    assert client.recv(10) == b"" and not guest.device.connections
    client.close()
    guest.close()


def test_a_ring_that_breaks_the_rules_at_the_reset_event(tmp_path: Path) -> None:
    """A descriptor that leads nowhere stops the device, as ever; the restore itself goes on."""
    guest = Guest(tmp_path / "vsock")
    queue = guest.driver.queues[EVENT]
    queue.descriptor(0, RAM + 4096, 4, WRITE)
    queue.offer(0)
    other = moved(guest.driver, guest.device.twin(), guest.driver.transport.save())
    assert other.needs_reset
    other.close()
    guest.close()


def test_a_copy_that_listens_later(tmp_path: Path) -> None:
    """A copy meets nobody until it is given a path; the guest's own calls are refused until then."""
    guest = Guest(tmp_path / "vsock")
    twin = guest.device.twin()
    other = Guest.__new__(Guest)
    other.path, other.device, other.places = tmp_path / "copy", twin, dict(guest.places)
    other.driver = moved(guest.driver, twin, guest.driver.transport.save())
    other.driver.io.call_later = guest._call_later  # type: ignore[method-assign]
    other.rx, other.tx = other.driver.queues[:2]
    other.say(lib.VIRTIO_VSOCK_OP_REQUEST, 52)
    assert other.heard() == [(RST, 1000, 0, b"")]
    with pytest.raises(ConfigError, match="another process"):
        twin.listen(str(guest.path))
    twin.listen(str(other.path))
    with pytest.raises(ConfigError, match="already"):
        twin.listen(str(tmp_path / "third"))
    client, _ = connected(other)
    client.close()
    other.close()
    guest.close()


def absurd(chance: random.Random, value: object) -> object:
    """Something else in the place of a saved value."""
    if isinstance(value, list) and value and chance.random() < 0.7:
        copy = list(value)
        at = chance.randrange(len(copy))
        copy[at] = absurd(chance, copy[at])
        return copy
    wrong = (-1, 1 << 70, 0xFFFF, True, "x" * 5000, b"\xff" * 3, b"", [], [[]], {}, None, 1.5)
    return chance.choice(wrong)


@pytest.mark.parametrize("kind", ["console", "balloon", "vsock"])
def test_states_that_somebody_made_up(drive: Drive, kind: str, tmp_path: Path) -> None:
    """Any field of any wrong kind or size is refused in one line or makes the device ask for a reset, no more."""
    if kind == "console":
        driver, _ = ported(drive)
    else:
        driver = drive(Balloon() if kind == "balloon" else Vsock(CID, str(tmp_path / "vsock")))
        driver.start()
    shape, state = driver.transport.shape, driver.transport.save()
    chance = random.Random(4)
    for _ in range(400):
        name = chance.choice(list(state))
        bad: State = {**state, name: absurd(chance, state[name])}
        try:
            shape.check(kind, shape.version, bad)
            driver.transport.restore(bad)
        except SnapshotError as error:
            assert "\n" not in str(error)
        driver.io.run()
    shape.check(kind, shape.version, state)
    driver.transport.restore(state)
    assert not driver.needs_reset
