"""The vhost-user front end, with a back end in a thread that keeps to the protocol or does not."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from driver import RAM, Driver
from vhostpeer import Peer, Peers

from pykvm import log
from pykvm._native import lib
from pykvm.core.filememory import map_file
from pykvm.core.memimage import capture, file_data, install
from pykvm.core.memory import GuestMemory
from pykvm.core.state import STATELESS
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio import vhostmsg as msg
from pykvm.virtio.vhost_user import LOGGED_WORDS, VhostUser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pykvm.virtio.vhostmsg import Connection

pytestmark = pytest.mark.usefixtures("quick")


class Remote(VhostUser):
    """A device of two queues."""

    name = "remote"
    device_id = 0x30
    queue_sizes = (64, 64)


class Configured(Remote):
    """One whose configuration is the back end's."""

    has_config = True

    def greet(self, connection: Connection) -> None:
        """Fetch it."""
        self.bytes = self.fetch_config(connection, 16)

    def config(self) -> bytes:
        """As fetched."""
        return self.bytes

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass it on."""
        self.send_config(offset, data)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not wait long for a back end that hangs; log to this test's stderr."""
    log.configure()
    monkeypatch.setattr(msg.Connection.__init__, "__defaults__", (0.2,))
    yield
    log.configure()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """peer(...) makes a back end; closed after the test."""
    peers: list[Peer] = []

    def make(*args: object, **options: object) -> Peer:
        peers.append(Peer(*args, **options))  # type: ignore[arg-type]
        return peers[-1]

    yield make
    for each in peers:
        each.close()


@pytest.fixture
def shared() -> Iterator[Callable[[VhostUser], Driver]]:
    """shared(device) puts it on a transport whose memory can be handed over."""
    drivers: list[Driver] = []

    def make(device: VhostUser) -> Driver:
        memory = GuestMemory(memfd=True)
        memory.add(0, RAM)
        drivers.append(Driver(device, memory))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()
    assert not [error for driver in drivers for error in driver.errors]


def test_negotiation(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """The guest is offered what both sides know: no packed ring, not the protocol's bit, EVENT_IDX only if there."""
    back = peer()
    driver = shared(Remote(Peers(back)))
    assert driver.features() == 1 << 32 | 1 << 28 | 1 << 5
    driver.start()
    (sent,) = back.payloads("SET_FEATURES")
    assert msg.U64.unpack(sent)[0] == msg.F_PROTOCOL_FEATURES | 1 << 32 | 1 << 28 | 1 << 5
    (protocol,) = back.payloads("SET_PROTOCOL_FEATURES")
    assert msg.U64.unpack(protocol)[0] == msg.P_MQ | msg.P_REPLY_ACK


def test_rings_are_handed_over(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """Memory, addresses, kick and call reach the back end: it serves a request and interrupts without pykvm."""
    back = peer()
    driver = shared(Remote(Peers(back)))
    queue = driver.start()[0]
    regions = [region[:3] for region in back.regions]
    slot = driver.memory.slots[0]
    assert regions == [(0, RAM, slot.hva)]
    index, flags, desc, used, avail, dirty = msg.VRING_ADDR.unpack(back.payloads("SET_VRING_ADDR")[0])
    assert (index, flags, dirty) == (0, 0, 0)
    assert [at - slot.hva for at in (desc, used, avail)] == [queue.desc, queue.used_ring, queue.avail]
    assert [msg.VRING_STATE.unpack(each) for each in back.payloads("SET_VRING_NUM")] == [(0, 64), (1, 64)]
    assert [msg.VRING_STATE.unpack(each) for each in back.payloads("SET_VRING_ENABLE")] == [(0, 1), (1, 1)]
    order = [name for name in back.names if name.startswith("SET_VRING") or name == "SET_MEM_TABLE"]
    assert order[0] == "SET_MEM_TABLE" and order[-1] == "SET_VRING_ENABLE"
    os.eventfd_read(back.fds["SET_VRING_KICK"][0])
    queue.add([b"hello"], [8])
    queue.kick()
    assert os.eventfd_read(back.fds["SET_VRING_KICK"][0]) == 1
    (gpa, length) = struct.unpack("<QI", back.read(queue.desc, 12))
    assert back.read(gpa, length) == b"hello"
    driver.interrupts()
    back.finish(queue.used_ring, 0, 3)
    assert driver.interrupts() == 1 and queue.used() == [(0, 3)]
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) & lib.VIRTIO_MMIO_INT_VRING


def test_reset_takes_the_rings_back(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """A reset waits for GET_VRING_BASE of each queue; the driver may then start anew."""
    back = peer()
    driver = shared(Remote(Peers(back)))
    driver.start()
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert back.names[-2:] == ["GET_VRING_BASE", "GET_VRING_BASE"]
    driver.start()
    assert back.names.count("SET_MEM_TABLE") == 2 and not driver.needs_reset


def test_configuration(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """Configuration space is read from the back end and written to it."""
    back = peer()
    driver = shared(Configured(Peers(back)))
    assert driver.read(lib.VIRTIO_MMIO_CONFIG + 4) == 0x07060504
    driver.write(lib.VIRTIO_MMIO_CONFIG + 2, 0xAB, 1)
    (written,) = back.payloads("SET_CONFIG")
    assert written == msg.CONFIG.pack(2, 1, 0) + b"\xab"


def test_without_protocol_features(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """An old back end has neither acknowledgements nor SET_VRING_ENABLE."""
    back = peer(features=1 << 32)
    driver = shared(Remote(Peers(back)))
    driver.start()
    assert "SET_VRING_ENABLE" not in back.names and "GET_PROTOCOL_FEATURES" not in back.names
    assert back.names[-1] == "GET_FEATURES"  # the barrier instead of acknowledgements
    assert not driver.needs_reset


def wrong_number(back: Peer, payload: bytes) -> None:
    """Another message's answer."""
    back.reply("GET_QUEUE_NUM", msg.U64.pack(0))


def huge(back: Peer, payload: bytes) -> None:
    """A size of 4 GiB - 1."""
    back.socket.sendall(msg.HEADER.pack(msg.GET_FEATURES, msg.VERSION | msg.REPLY, 0xFFFFFFFF))


def short(back: Peer, payload: bytes) -> None:
    """Half an answer, then nothing."""
    back.socket.sendall(msg.HEADER.pack(msg.GET_FEATURES, msg.VERSION | msg.REPLY, 8) + b"half")


def silent(back: Peer, payload: bytes) -> None:
    """No answer."""


def hang_up(back: Peer, payload: bytes) -> None:
    """The end of the connection."""
    back.socket.shutdown(socket.SHUT_RDWR)


def no_reply_flag(back: Peer, payload: bytes) -> None:
    """A request instead of an answer."""
    back.reply("GET_FEATURES", msg.U64.pack(1 << 32), flags=msg.VERSION)


@pytest.mark.parametrize(
    ("twist", "words"),
    [
        (wrong_number, "answered GET_FEATURES with message 17"),
        (huge, "has 4294967295 bytes instead of 8"),
        (short, "did not answer GET_FEATURES within 0.8 s"),
        (silent, "did not answer GET_FEATURES within 0.8 s"),
        (hang_up, "closed the connection at GET_FEATURES"),
        (no_reply_flag, "answered GET_FEATURES with message 1, flags 0x1"),
    ],
)
def test_hostile_greeting(peer: Callable[..., Peer], twist: Callable[[Peer, bytes], None], words: str) -> None:
    """A back end that breaks the protocol at once is refused in one line, and ended."""
    source = Peers(peer({"GET_FEATURES": twist}))
    with pytest.raises(ConfigError, match=words):
        Remote(source)
    assert source.stops == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": msg.F_PROTOCOL_FEATURES}, "virtio 1"),
        ({"queues": 1}, "has 1 queues, the device 2"),
        ({"protocol": msg.P_MQ}, "does not tell its configuration"),
        ({"config": b"abc"}, "has 15 bytes instead of 28"),
    ],
)
def test_unsuitable_back_end(peer: Callable[..., Peer], options: dict[str, object], words: str) -> None:
    """A back end that lacks what the device needs is refused with the reason."""
    with pytest.raises(ConfigError, match=words):
        Configured(Peers(peer(**options)))


def refuse(back: Peer, payload: bytes) -> None:
    """A negative acknowledgement."""
    back.reply("SET_MEM_TABLE", msg.U64.pack(1))


@pytest.mark.parametrize("twist", [refuse, silent, hang_up])
def test_failure_at_the_start(
    peer: Callable[..., Peer],
    shared: Callable[[VhostUser], Driver],
    capfd: pytest.CaptureFixture[str],
    twist: Callable[[Peer, bytes], None],
) -> None:
    """A back end that fails when it gets the memory stops the device, with one line; the driver can go on living."""
    driver = shared(Remote(Peers(peer({"SET_MEM_TABLE": twist}))))
    driver.start()
    assert driver.needs_reset
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "test back end is gone" in said[0] and "Start it" in said[0]
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    driver.start()
    assert driver.needs_reset  # still nobody there


def test_silence_at_a_reset(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """A back end that keeps the rings at a reset is hung up on, and the reset ends."""
    source = Peers(peer({"GET_VRING_BASE": silent}))
    driver = shared(Remote(source))
    driver.start()
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert source.stops == 1 and driver.read(lib.VIRTIO_MMIO_STATUS) == 0


@pytest.mark.parametrize("unasked", [b"", b"\0" * 12])
def test_death_without_successor(
    peer: Callable[..., Peer],
    shared: Callable[[VhostUser], Driver],
    capfd: pytest.CaptureFixture[str],
    unasked: bytes,
) -> None:
    """The end of the connection, or a message out of turn, stops the device and says what to do."""
    back = peer()
    driver = shared(Remote(Peers(back)))
    driver.start()
    if unasked:
        fd = os.open("/dev/null", os.O_RDONLY)
        socket.send_fds(back.socket, [unasked], [fd])
        os.close(fd)
    else:
        back.socket.shutdown(socket.SHUT_RDWR)
    driver.io.run()
    assert driver.needs_reset
    said = capfd.readouterr().err
    assert ("nobody asked for" if unasked else "closed the connection") in said and said.count("\n") == 1


def test_error_eventfd(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """A back end that reports a broken ring by the error eventfd is given up."""
    back = peer()
    driver = shared(Remote(Peers(back)))
    driver.start()
    os.eventfd_write(back.fds["SET_VRING_ERR"][0], 1)
    driver.io.run()
    assert driver.needs_reset


def test_reconnection(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], capfd: pytest.CaptureFixture[str]
) -> None:
    """A new back end gets the rings where the dead one left them: the unfinished request, and a kick."""
    first, second = peer(), peer()
    driver = shared(Remote(Peers(first, second)))
    queue = driver.start()[0]
    for _ in range(3):
        queue.add([b"request"], [8])
    for head in (0, 2):
        first.finish(queue.used_ring, head, 0)
    first.socket.shutdown(socket.SHUT_RDWR)
    driver.io.run()
    assert not driver.needs_reset
    assert [msg.VRING_STATE.unpack(each) for each in second.payloads("SET_VRING_BASE")] == [(0, 2), (1, 0)]
    assert os.eventfd_read(second.fds["SET_VRING_KICK"][0]) >= 1
    assert second.read(queue.used_ring + 2, 2) == b"\2\0"
    said = capfd.readouterr().err
    assert "was started again" in said and "look again" in said and said.count("\n") == 1


def test_no_reconnection_into_doubt(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], capfd: pytest.CaptureFixture[str]
) -> None:
    """A back end that died after it had finished requests out of order has no successor: one would do some twice."""
    first = peer()
    driver = shared(Remote(Peers(first, peer())))
    queue = driver.start()[0]
    for _ in range(3):
        queue.add([b"request"], [8])
    first.finish(queue.used_ring, 4, 0)
    first.socket.shutdown(socket.SHUT_RDWR)
    driver.io.run()
    assert driver.needs_reset
    assert "nobody knows whether they are finished" in capfd.readouterr().err


def test_dying_again_and_again(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], capfd: pytest.CaptureFixture[str]
) -> None:
    """A back end that dies too often is not started any more."""
    peers = [peer() for _ in range(5)]
    driver = shared(Remote(Peers(*peers)))
    driver.start()
    for each in peers[:4]:
        assert not driver.needs_reset
        each.socket.shutdown(socket.SHUT_RDWR)
        driver.io.run()
    assert driver.needs_reset
    assert capfd.readouterr().err.count("\n") == 4


def test_private_memory_is_refused(peer: Callable[..., Peer]) -> None:
    """Without memfds there is nothing to hand over: the machine's option is named."""
    device = Remote(Peers(peer()))
    with pytest.raises(ConfigError, match="memfd=True"):
        Driver(device)
    device.close()


def test_persistent_memory_is_handed_over(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], tmp_path: Path
) -> None:
    """A buffer in a file that the guest has as memory is one for back ends, too, unless the guest cannot write it."""
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(bytes(2 << 20))
    backend = peer()
    driver = shared(Remote(Peers(backend)))
    files = [os.open(tmp_path / name, os.O_RDWR) for name in ("first", "second")]
    for at, fd in enumerate(files):
        map_file(driver.memory, (at + 1) << 30, 2 << 20, fd, readonly=bool(at), name="pmem")
    driver.start()
    assert [(gpa, size) for gpa, size, _, _ in backend.regions] == [(0, RAM), (1 << 30, 2 << 20)]
    for fd in files:
        os.close(fd)


class Talker(Peers):
    """A back end that says things while it works."""

    def __init__(self, *peers: Peer) -> None:
        super().__init__(*peers)
        self.voice, self.mouth = os.pipe()

    def listen(self) -> list[str] | None:
        """Its lines."""
        return os.read(self.voice, 65536).decode().splitlines() or None


def test_what_a_back_end_says_is_passed_on(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], capfd: pytest.CaptureFixture[str]
) -> None:
    """A line in the log for each, up to a limit, and none is waited for once it has closed its output."""
    source = Talker(peer())
    driver = shared(Remote(source))
    os.write(source.mouth, b"the image is damaged\n" + b"x" * 1000)
    driver.io.run()
    said = capfd.readouterr().err
    assert "the image is damaged" in said and said.count("remote") == 2 and "x" * 301 not in said
    os.write(source.mouth, b"again\n" * 100)
    driver.io.run()
    assert capfd.readouterr().err.count("again") == LOGGED_WORDS - 2
    os.close(source.mouth)
    driver.io.run()
    assert source.voice not in driver.io._readers
    os.close(source.voice)
    source.voice = -1


# -- snapshots ---------------------------------------------------------------------------------------------------------


class Saved(Remote):
    """One that takes part in snapshots."""

    shape = STATELESS
    settle_s = 0.01


def stops_at(base: int) -> Callable[[Peer, bytes], None]:
    """An answer to GET_VRING_BASE: the back end would go on there."""
    return lambda this, payload: this.reply("GET_VRING_BASE", payload[:4] + struct.pack("<I", base))


def test_stopped_and_started_for_a_snapshot(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """What the back end took is finished first; it goes on where it stopped, and so does a copy; an interrupt comes."""
    back, other = peer({"GET_VRING_BASE": stops_at(1)}), peer()
    driver = shared(Saved(Peers(back)))
    first, _ = driver.start()
    for queue in driver.queues:
        driver.memory.write_uint(queue.avail + 2, 2, 3)
        driver.memory.write_uint(queue.used_ring + 2, 2, 1)
    driver.interrupts()
    driver.transport.hold()
    state = driver.transport.save()
    driver.transport.release()
    assert [row[5:] for row in state["queues"]] == [[1, 1, 1]] * 2
    assert driver.interrupts()
    bases = [struct.unpack("<II", each) for each in back.payloads("SET_VRING_BASE")]
    assert bases == [(0, 0), (1, 0), (0, 1), (1, 1)]
    memory = GuestMemory(memfd=True)
    memory.add(0, RAM)
    memory.write(0, driver.memory.read(0, RAM))
    copy = Driver(Saved(Peers(other)), memory)
    copy.transport.restore(state)
    assert [struct.unpack("<II", each) for each in other.payloads("SET_VRING_BASE")] == [(0, 1), (1, 1)]
    assert copy.interrupts() and not copy.needs_reset
    copy.close()
    assert first.size == 64


def test_a_back_end_that_does_not_finish(
    peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no snapshot of requests in flight: one line says so, and a new back end goes on with them."""
    monkeypatch.setattr("pykvm.virtio.vhost_user.DRAIN_S", 0.05)
    back, again = peer({"GET_VRING_BASE": stops_at(1)}), peer()
    driver = shared(Saved(Peers(back, again)))
    first, _ = driver.start()
    driver.memory.write_uint(first.avail + 2, 2, 1)
    with pytest.raises(SnapshotError, match="requests of queue 0 have not ended"):
        driver.transport.hold()
    assert "SET_VRING_KICK" in again.names and not driver.needs_reset
    with driver.transport.lock:
        pass  # it was given back


def test_a_frozen_device_that_is_put_back(peer: Callable[..., Peer], shared: Callable[[VhostUser], Driver]) -> None:
    """A restore starts the rings once, where the snapshot has them."""
    back = peer({"GET_VRING_BASE": stops_at(0)})
    driver = shared(Saved(Peers(back)))
    driver.start()
    state = driver.transport.save()
    driver.transport.hold()
    driver.transport.restore(state)
    driver.transport.release()
    assert back.names.count("SET_VRING_KICK") == 4 and back.names.count("GET_VRING_BASE") == 2
    driver.transport.hold()
    driver.transport.restore({**state, "status": 0})
    driver.transport.release()
    assert back.names.count("SET_VRING_KICK") == 4


def test_memory_of_others_is_copied() -> None:
    """A snapshot of memory that back ends have mapped leaves their memfd in place, holes included, and so a restore."""
    memory = GuestMemory(memfd=True, shared=True)
    slot = memory.add(0, RAM)
    memory.write(0x5000, b"first")
    memory.write(0xF0000, b"last")
    image = capture(slot)
    with mmap.mmap(slot.fd, RAM) as theirs:
        memory.write(0x5000, b"other")
        memory.write(0x80000, b"new")
        assert theirs[0x5000:0x5005] == b"other" and image.read(0x5000, 5) == b"first"
        install(slot, image)
        assert theirs[0x5000:0x5005] == b"first" and theirs[0xF0000:0xF0004] == b"last"
        assert not any(os.pread(slot.fd, 3, 0x80000))
    assert [start for start, _ in file_data(slot.fd, 0, RAM)] == [0x5000, 0xF0000]
    other = GuestMemory(memfd=True, shared=True)
    assert other.add_image(image).fd >= 0 and other.read(0x5000, 5) == b"first"
    other.close()
    memory.close()
