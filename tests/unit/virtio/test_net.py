"""virtio-net: configuration, sending, receiving, commands, and drivers and backends that misbehave."""

from __future__ import annotations

import os
import struct
from select import EPOLLOUT
from typing import TYPE_CHECKING

import pytest
from driver import EVENT_IDX, VERSION_1, Driver
from netpeer import HEADER, OFFLOADS, PLAIN, FakeTap, Stuck, frame

from pykvm import log
from pykvm._native import lib
from pykvm.errors import ConfigError
from pykvm.virtio.net import RX, TX, Net, parse_mac
from pykvm.virtio.netbackend import net_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

MAC = "52:54:00:12:34:56"
MERGEABLE = net_bits("MRG_RXBUF")
TCP4 = lib.VIRTIO_NET_HDR_GSO_TCPV4
NEEDS_CSUM = lib.VIRTIO_NET_HDR_F_NEEDS_CSUM


class Bench:
    """A device with its backend and driver; by default everything offered is negotiated."""

    def __init__(self, drive: Drive, features: int | None = None, **options: object) -> None:
        self.tap = FakeTap(**options)  # type: ignore[arg-type]
        self.net = Net(self.tap, mac=MAC)
        self.driver = drive(self.net)
        self.rx, self.tx, self.control = self.driver.start(features)

    def arrive(self, *frames: bytes) -> None:
        """Frames come in from the host, and the device looks."""
        for each in frames:
            self.tap.peer.send(each)
        self.driver.io.run()

    def offer(self, *sizes: int) -> int:
        """The guest offers one chain of buffers to receive into; the place of the first."""
        place = self.rx.add(writable=sizes)[0]
        self.rx.kick()
        return place

    def send(self, *parts: bytes) -> list[bytes]:
        """The guest sends one chain; what arrived at the host."""
        self.tx.add(list(parts))
        self.tx.kick()
        return self.tap.sent()

    def command(self, *data: bytes) -> int:
        """A command; its answer, 0xff if there was none."""
        (ack,) = self.control.add(list(data), [1])
        self.driver.memory.write(ack, b"\xff")
        self.control.kick()
        return self.driver.memory.read_u8(ack)


@pytest.fixture(autouse=True, params=["C", "Python"])
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds whoever moves the frames."""
    monkeypatch.setattr(FakeTap, "by_c", request.param == "C")


@pytest.fixture
def bench(drive: Drive) -> Bench:
    """With all features."""
    return Bench(drive)


# -- configuration ----------------------------------------------------------------------------------------------


def test_config(bench: Bench) -> None:
    """The configuration space holds MAC, link, and MTU (5.1.4)."""
    config = bytes(bench.driver.read(lib.VIRTIO_MMIO_CONFIG + at, 1) for at in range(12))
    assert struct.unpack("<6sHHH", config) == (parse_mac(MAC), lib.VIRTIO_NET_S_LINK_UP, 1, 1500)


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "52:54:00:12:34:5x", "53:54:00:12:34:56", "0:0:0:0:0:0", "1:2"])
def test_refuses_a_bad_mac(text: str) -> None:
    """What is no unicast MAC address is refused."""
    with pytest.raises(ConfigError, match="mac"):
        parse_mac(text)


@pytest.mark.parametrize("mtu", [0, 67, 65536, -1])
def test_refuses_a_bad_mtu_and_closes_the_backend(mtu: int) -> None:
    """An MTU that no driver may be told is refused, and the tap does not leak."""
    tap = FakeTap()
    with pytest.raises(ConfigError, match="mtu"):
        Net(tap, mtu=mtu)
    assert tap.fd == -1


def test_offers_what_the_backend_can(drive: Drive) -> None:
    """Offload features are the backend's; without a header there are none."""
    assert drive(Net(FakeTap())).features() & OFFLOADS == OFFLOADS
    assert drive(Net(FakeTap(has_header=False))).features() & OFFLOADS == 0


def test_offloads_follow_the_negotiation(drive: Drive) -> None:
    """The backend learns what the driver takes."""
    bench = Bench(drive, net_bits("GUEST_CSUM"))
    assert ("offloads", VERSION_1 | net_bits("GUEST_CSUM")) in bench.tap.settings


def test_a_frame_comes_in_after_many_that_had_no_answer(drive: Drive) -> None:
    """The device stops looking for an answer after each frame that it sent, but not listening."""
    bench = Bench(drive)
    place = bench.offer(2048)
    for number in range(40):
        assert bench.send(PLAIN + frame(60, number)) == [PLAIN + frame(60, number)]
    bench.arrive(PLAIN + frame(100))
    assert bench.rx.used() == [(0, 112)]
    assert bench.driver.memory.read(place + 12, 100) == frame(100)


def test_link(bench: Bench) -> None:
    """set_link shows in the status with an interrupt, and no frame passes while the cable is out."""
    bench.offer(2048)
    bench.driver.interrupts()
    bench.net.set_link(False)
    assert bench.driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) & lib.VIRTIO_MMIO_INT_CONFIG
    assert bench.driver.read(lib.VIRTIO_MMIO_CONFIG + 6, 2) == 0
    bench.arrive(PLAIN + frame(60))
    assert bench.rx.used() == []
    assert bench.send(PLAIN, frame(60)) == []
    bench.net.set_link(True)
    assert bench.driver.read(lib.VIRTIO_MMIO_CONFIG + 6, 2) == lib.VIRTIO_NET_S_LINK_UP
    bench.arrive(PLAIN + frame(61))
    assert bench.rx.used() == [(0, 12 + 61)]
    assert bench.net.dropped == {"rx": 1, "tx": 1}


# -- sending ----------------------------------------------------------------------------------------------------


def test_sends_a_frame_from_any_buffers(bench: Bench) -> None:
    """Header and frame may lie in one buffer or in many, cut anywhere (2.7.4.1)."""
    data = PLAIN + frame(100)
    assert bench.send(data) == [data]
    assert bench.send(data[:5], data[5:13], data[13:]) == [data]
    assert bench.net.frames["tx"] == 2
    assert bench.tx.used() == [(0, 0), (1, 0)]


def test_sends_without_header_to_a_backend_without(drive: Drive) -> None:
    """A backend that knows no header gets the bare frame."""
    assert Bench(drive, has_header=False).send(PLAIN, frame(60)) == [frame(60)]


def test_passes_offloads_through(bench: Bench) -> None:
    """An unfinished checksum and a segment to be cut go to the kernel as they are."""
    header = HEADER.pack(NEEDS_CSUM, TCP4, 54, 1448, 34, 16, 0)
    assert bench.send(header, frame(9000)) == [header + frame(9000)]


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(NEEDS_CSUM, 0, 0, 0, 60, 0, 0),  # the checksum lies past the end
        HEADER.pack(NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
        HEADER.pack(NEEDS_CSUM, lib.VIRTIO_NET_HDR_GSO_TCPV6, 54, 1448, 14, 16, 0),  # not negotiated
        HEADER.pack(0, TCP4, 54, 1448, 14, 16, 0),  # a segment without a checksum to complete
        HEADER.pack(NEEDS_CSUM, TCP4, 54, 0, 14, 16, 0),  # cut into nothing
        HEADER.pack(NEEDS_CSUM, 0x7F, 54, 1448, 14, 16, 0),  # a type that nobody knows
        HEADER.pack(NEEDS_CSUM, lib.VIRTIO_NET_HDR_GSO_ECN, 54, 1448, 14, 16, 0),
    ],
)
def test_drops_a_frame_with_an_impossible_header(bench: Bench, header: bytes) -> None:
    """What the negotiated features do not allow is dropped, and the next frame passes (5.1.6.2.1)."""
    assert bench.send(header, frame(60)) == []
    assert bench.send(PLAIN, frame(60)) == [PLAIN + frame(60)]
    assert bench.net.dropped["tx"] == 1
    assert not bench.driver.needs_reset


def test_drops_offloads_that_were_not_negotiated(drive: Drive) -> None:
    """Offering is not enough: the driver must have accepted the feature."""
    bench = Bench(drive, MERGEABLE)
    assert bench.send(HEADER.pack(NEEDS_CSUM, 0, 0, 0, 14, 16, 0), frame(60)) == []


@pytest.mark.parametrize("size", [0, 1, 13, 65555, 200_000])
def test_drops_frames_that_are_none(bench: Bench, size: int) -> None:
    """Too short and too long."""
    assert bench.send(PLAIN, *([frame(size)] if size else [])) == []
    assert bench.net.dropped["tx"] == 1
    assert not bench.driver.needs_reset


def test_half_a_header_stops_the_device(bench: Bench) -> None:
    """A chain without a whole header is a driver's fault."""
    assert bench.send(PLAIN[:11]) == []
    assert bench.driver.needs_reset


def test_writable_buffers_to_send_stop_the_device(bench: Bench) -> None:
    """So is one that the device is to write to."""
    bench.tx.add([PLAIN + frame(60)], [10])
    bench.tx.kick()
    assert bench.driver.needs_reset


def test_a_full_backend_holds_frames_in_order(drive: Drive) -> None:
    """Frames wait while the backend takes none, without spinning, and go in order when it does."""
    backend = Stuck()
    net = Net(backend, mac=MAC)
    driver = drive(net)
    _, tx, _ = driver.start()
    for index in range(3):
        tx.add([PLAIN, frame(60, index)])
    tx.kick()
    assert tx.used() == []
    assert net._plane.watched == EPOLLOUT  # there are no buffers to receive into
    backend.full = False
    driver.io.run()
    assert backend.frames == [frame(60, index) for index in range(3)]
    assert tx.used() == [(0, 0), (2, 0), (4, 0)]
    assert net._plane.watched == 0


def test_reset_forgets_held_frames(drive: Drive) -> None:
    """After a reset of the device nothing of the old life is sent, nor polled."""
    backend = Stuck()
    net = Net(backend, mac=MAC)
    driver = drive(net)
    _, tx, _ = driver.start()
    tx.add([PLAIN, frame(60)])
    tx.kick()
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    backend.full = False
    driver.io.run()
    assert backend.frames == []
    assert net._plane.watched == 0


# -- receiving --------------------------------------------------------------------------------------------------


def test_receives_into_one_buffer(bench: Bench) -> None:
    """A frame lands behind its header, which says that it is in one buffer."""
    place = bench.offer(2048)
    bench.arrive(HEADER.pack(1, 0, 0, 0, 34, 16, 99) + frame(100))
    assert bench.rx.used() == [(0, 112)]
    assert bench.driver.memory.read(place, 112) == HEADER.pack(1, 0, 0, 0, 34, 16, 1) + frame(100)
    assert bench.driver.interrupts()


def test_merges_buffers(bench: Bench) -> None:
    """A large frame fills as many buffers as it needs, and the header counts them; the others stay in the ring."""
    places = [bench.offer(1000, 500) for _ in range(10)]
    data = os.urandom(6000)
    bench.arrive(PLAIN + frame(14) + data)
    assert [written for _, written in bench.rx.used()] == [1500, 1500, 1500, 1500, 26]
    assert HEADER.unpack(bench.driver.memory.read(places[0], 12))[-1] == 5
    bench.arrive(PLAIN + frame(60))
    assert bench.rx.used() == [(10, 72)]
    assert bench.driver.memory.read(places[5] + 12, 60) == frame(60)


def test_without_mergeable_buffers_a_frame_too_long_is_dropped(drive: Drive) -> None:
    """One buffer a frame: what does not fit is dropped, and the buffer takes the next one."""
    bench = Bench(drive, net_bits("GUEST_CSUM"))
    bench.offer(12 + 100)
    bench.offer(2048)
    bench.arrive(PLAIN + frame(101), PLAIN + frame(100))
    assert bench.rx.used() == [(0, 112)]
    assert bench.net.dropped["rx"] == 1


def test_a_backend_without_header_gets_one(drive: Drive) -> None:
    """The device writes a header of zeros, and the count."""
    bench = Bench(drive, has_header=False)
    place = bench.offer(2048)
    bench.driver.memory.fill(place, 2048, 0xEE)
    bench.arrive(frame(60))
    assert bench.driver.memory.read(place, 72) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(60)


def test_flags_are_zero_without_guest_csum(drive: Drive) -> None:
    """A driver that does not know checksum offload sees no flag (5.1.6.4.1)."""
    bench = Bench(drive, MERGEABLE)
    place = bench.offer(2048)
    bench.arrive(HEADER.pack(2, 0, 0, 0, 0, 0, 0) + frame(60))
    assert bench.driver.memory.read_u8(place) == 0


@pytest.mark.parametrize("event_idx", [False, True])
def test_waits_for_buffers_without_spinning(drive: Drive, event_idx: bool) -> None:
    """Without buffers the backend is not polled; a notification of buffers brings the frames, in order."""
    bench = Bench(drive, MERGEABLE | (EVENT_IDX if event_idx else 0))
    bench.arrive(PLAIN + frame(60, 1), PLAIN + frame(60, 2))
    assert bench.net._plane.watched == 0
    first, second = (bench.rx.add(writable=[2048])[0] for _ in range(2))
    bench.rx.kick()
    assert len(bench.rx.used()) == 2
    assert bench.driver.memory.read(first + 12, 60) == frame(60, 1)
    assert bench.driver.memory.read(second + 12, 60) == frame(60, 2)


def test_a_frame_waits_for_more_buffers(bench: Bench) -> None:
    """A frame that needs more buffers than there are is kept whole until there are enough."""
    places = [bench.offer(1500) for _ in range(2)]
    data = PLAIN + frame(14) + os.urandom(4000)
    bench.arrive(data)
    assert bench.rx.used() == []
    places.append(bench.offer(1500))
    assert [written for _, written in bench.rx.used()] == [1500, 1500, 1026]
    got = b"".join(bench.driver.memory.read(place, 1500) for place in places)[: len(data)]
    assert got[12:] == data[12:]


def test_a_ring_that_is_too_small_drops_the_frame(drive: Drive) -> None:
    """A frame that the whole ring cannot hold would wait for ever: it is dropped."""
    net = Net(FakeTap(), mac=MAC)
    driver = drive(net)
    rx, _, _ = driver.start(size=2)
    rx.add(writable=[100])
    rx.add(writable=[100])
    rx.kick()
    net.backend.peer.send(PLAIN + frame(1000))  # type: ignore[attr-defined]
    net.backend.peer.send(PLAIN + frame(60))  # type: ignore[attr-defined]
    driver.io.run()
    assert rx.used() == [(0, 72)]
    assert net.dropped["rx"] == 1


@pytest.mark.parametrize(("readable", "writable"), [([b"x"], [2048]), ([], [11])])
def test_bad_receive_buffers_stop_the_device(bench: Bench, readable: list[bytes], writable: list[int]) -> None:
    """A readable buffer, or one without room for a header; then the backend is no longer polled."""
    bench.rx.add(readable, writable)
    bench.rx.kick()
    bench.arrive(PLAIN + frame(60))
    assert bench.driver.needs_reset
    assert bench.net._plane.watched == 0


def test_a_stopped_device_does_not_receive(bench: Bench) -> None:
    """NEEDS_RESET, whatever the reason, ends receiving as well."""
    bench.offer(2048)
    bench.send(b"x")
    bench.arrive(PLAIN + frame(60))
    assert bench.rx.used() == []
    assert bench.net._plane.watched == 0


def test_thousands_of_frames_both_ways(drive: Drive) -> None:
    """Every frame arrives once and in order, around the rings."""
    bench = Bench(drive)
    for number in range(3000):
        place = bench.driver._free
        bench.offer(2048)
        bench.tx.add([PLAIN, frame(60, number % 256)])
        bench.driver._free = place
        bench.tx.kick()
        assert bench.tap.sent() == [PLAIN + frame(60, number % 256)]
        bench.arrive(PLAIN + frame(64, number % 256))
        assert [written for _, written in bench.rx.used()] == [76]
        assert bench.driver.memory.read(place + 12, 64) == frame(64, number % 256)
    assert bench.net.frames == {"rx": 3000, "tx": 3000}


# -- commands ---------------------------------------------------------------------------------------------------


def command(*numbers: int) -> bytes:
    """Class and command."""
    return bytes(numbers)


TABLE_SET = command(lib.VIRTIO_NET_CTRL_MAC, lib.VIRTIO_NET_CTRL_MAC_TABLE_SET)
ADDR_SET = command(lib.VIRTIO_NET_CTRL_MAC, lib.VIRTIO_NET_CTRL_MAC_ADDR_SET)
PROMISC = command(lib.VIRTIO_NET_CTRL_RX, lib.VIRTIO_NET_CTRL_RX_PROMISC)
ALLMULTI = command(lib.VIRTIO_NET_CTRL_RX, lib.VIRTIO_NET_CTRL_RX_ALLMULTI)
OFFLOADS_SET = command(lib.VIRTIO_NET_CTRL_GUEST_OFFLOADS, lib.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
ONE, TWO, GROUP = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02", b"\x33\x33\0\0\0\x01"


def test_filter(bench: Bench) -> None:
    """What the driver wants to receive is told to the backend: its address, broadcasts, and the tables."""
    table = struct.pack("<I", 2) + ONE + TWO + struct.pack("<I", 1) + GROUP
    assert bench.command(TABLE_SET, table) == lib.VIRTIO_NET_OK
    assert bench.tap.settings[-1] == ("filter", None, False)  # still promiscuous, as after reset
    assert bench.command(PROMISC, b"\0") == lib.VIRTIO_NET_OK
    wanted = [parse_mac(MAC), b"\xff" * 6, ONE, TWO, GROUP]
    assert bench.tap.settings[-1] == ("filter", wanted, False)
    assert bench.command(ALLMULTI, b"\1") == lib.VIRTIO_NET_OK
    assert bench.tap.settings[-1] == ("filter", wanted, True)
    bench.driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert bench.tap.settings[-1] == ("filter", None, False)


def test_the_driver_sets_the_mac(bench: Bench) -> None:
    """The new address is in the configuration and in the filter."""
    assert bench.command(ADDR_SET + ONE) == lib.VIRTIO_NET_OK
    assert bench.net.config()[:6] == ONE


def test_announce(bench: Bench) -> None:
    """announce() sets the status bit with an interrupt until the driver has acknowledged it."""
    bench.net.announce()
    assert bench.net.config()[6] & lib.VIRTIO_NET_S_ANNOUNCE
    assert bench.command(command(lib.VIRTIO_NET_CTRL_ANNOUNCE, lib.VIRTIO_NET_CTRL_ANNOUNCE_ACK)) == lib.VIRTIO_NET_OK
    assert not bench.net.config()[6] & lib.VIRTIO_NET_S_ANNOUNCE


def test_offloads_at_run_time(bench: Bench) -> None:
    """The driver switches off what it negotiated, and cannot switch on more."""
    wanted = net_bits("GUEST_CSUM")
    assert bench.command(OFFLOADS_SET, struct.pack("<Q", wanted)) == lib.VIRTIO_NET_OK
    assert bench.tap.settings[-1] == ("offloads", wanted)
    assert bench.command(OFFLOADS_SET, struct.pack("<Q", net_bits("GUEST_TSO6"))) == lib.VIRTIO_NET_ERR


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        command(99, 0),
        PROMISC,
        PROMISC + b"\2",
        PROMISC + b"\0\0",
        TABLE_SET,
        TABLE_SET + struct.pack("<I", 0xFFFFFFFF),
        TABLE_SET + struct.pack("<II", 1, 0),
        TABLE_SET + struct.pack("<I", 2000) + bytes(16_000),
        ADDR_SET + b"\1" * 6,
        ADDR_SET + b"\2" * 5,
        OFFLOADS_SET + b"\0" * 7,
    ],
)
def test_refuses_bad_commands(bench: Bench, data: bytes) -> None:
    """Commands that nobody knows, or with data of another size, are answered with an error."""
    assert bench.command(data) == lib.VIRTIO_NET_ERR
    assert not bench.driver.needs_reset


def test_a_command_without_room_for_its_answer_stops_the_device(bench: Bench) -> None:
    """There is no way to answer."""
    bench.control.add([PROMISC, b"\0"])
    bench.control.kick()
    assert bench.driver.needs_reset


# -- the backend dies -------------------------------------------------------------------------------------------


def test_a_dead_backend_takes_the_link_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, the guest sees the link go, and it can go on sending into the void, and reset the device."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: lines.append(event))
    bench.offer(2048)
    bench.tap.peer.close()
    bench.driver.io.run()
    assert bench.driver.read(lib.VIRTIO_MMIO_CONFIG + 6, 2) == 0
    assert bench.driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) & lib.VIRTIO_MMIO_INT_CONFIG
    bench.tx.add([PLAIN, frame(60)])
    bench.tx.kick()
    assert bench.tx.used() == [(0, 0)]
    bench.rx.kick()
    bench.net.set_link(False)
    bench.driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    bench.driver.start()
    assert not bench.driver.needs_reset
    assert lines == ["network backend lost, link down"]


def test_queue_numbers() -> None:
    """receiveq1 is 0, transmitq1 1 (5.1.2)."""
    assert (RX, TX) == (0, 1)
