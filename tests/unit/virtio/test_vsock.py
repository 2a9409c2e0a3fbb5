"""The socket device: both directions, credit, endings, and guests and clients that misbehave."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from driver import Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm._native import ffi, lib
from pykvm.cli.devices import make_devices
from pykvm.cli.start import PARSER
from pykvm.core.iothread import Timer
from pykvm.errors import ConfigError, UsageError
from pykvm.virtio.vsock import MAX_CONNECTIONS, MAX_REPLIES, Vsock
from pykvm.virtio.vsockconn import BUFFER, HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CID, HOST = 7, 2
RX, TX = 0, 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW = (
    lib.VIRTIO_VSOCK_OP_REQUEST,
    lib.VIRTIO_VSOCK_OP_RESPONSE,
    lib.VIRTIO_VSOCK_OP_RST,
    lib.VIRTIO_VSOCK_OP_SHUTDOWN,
    lib.VIRTIO_VSOCK_OP_RW,
)
CREDIT_UPDATE, CREDIT_REQUEST = lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE, lib.VIRTIO_VSOCK_OP_CREDIT_REQUEST
SEND, RCV = lib.VIRTIO_VSOCK_SHUTDOWN_SEND, lib.VIRTIO_VSOCK_SHUTDOWN_RCV
GUEST_BUFFER = 64 << 10
ROOM = 1024  # bytes of a receive buffer


class Guest:
    """A guest's driver: receive buffers that it refills, packets in, packets out."""

    def __init__(self, path: Path, buffers: int = 32) -> None:
        self.path = path
        self.device = Vsock(CID, str(path))
        self.driver = Driver(self.device)
        self.timers: list[Timer] = []
        self.driver.io.call_later = self._call_later  # type: ignore[method-assign]
        self.rx, self.tx, _ = self.driver.start()
        self.places: dict[int, int] = {}
        self.offer(buffers)

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def expire(self) -> None:
        """Let all timers ring."""
        for timer in self.timers:
            if not timer.cancelled:
                timer.callback()
        self.driver.io.run()

    def offer(self, count: int) -> None:
        """Give the device receive buffers."""
        for _ in range(count):
            head = self.rx.free
            if head not in self.places:
                (self.places[head],) = self.rx.add([], [ROOM])
            else:
                self.rx.offer(head)
                self.rx.free = (head + 1) % self.rx.size
        self.rx.kick()

    def heard(self, *, refill: bool = True) -> list[tuple[int, int, int, bytes]]:
        """(operation, guest port, flags, payload) of the packets since the last call."""
        self.driver.io.run()
        found = []
        while used := self.rx.used():
            for head, written in used:
                raw = self.driver.memory.read(self.places[head], written)
                header = ffi.new("struct virtio_vsock_hdr *")
                ffi.memmove(header, raw, HEADER_SIZE)
                assert (header.src_cid, header.dst_cid, header.len) == (HOST, CID, written - HEADER_SIZE)
                self.host_port, self.forwarded = header.src_port, header.fwd_cnt
                found.append((header.op, header.dst_port, header.flags, raw[HEADER_SIZE:]))
            if refill:
                self.offer(len(used))
        return found

    def say(self, operation: int, host_port: int, guest_port: int = 1000, payload: bytes = b"", **fields: int) -> None:
        """Send a packet; `fields` overwrite those of its header."""
        header = ffi.new("struct virtio_vsock_hdr *")
        values = {
            "src_cid": CID,
            "dst_cid": HOST,
            "src_port": guest_port,
            "dst_port": host_port,
            "len": len(payload),
            "type": 1,
            "op": operation,
            "buf_alloc": GUEST_BUFFER,
        }
        for name, value in {**values, **fields}.items():
            setattr(header, name, value)
        self.raw(bytes(ffi.buffer(header)), payload)

    def raw(self, *parts: bytes) -> None:
        """Send these bytes."""
        self.driver._free = 0xC0000
        self.tx.add([part for part in parts if part])
        self.tx.kick()
        self.tx.used()

    def close(self) -> None:
        """Give everything back."""
        self.driver.close()
        assert self.driver.errors == []
        assert not self.path.exists()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A guest with receive buffers."""
    one = Guest(tmp_path / "vsock")
    yield one
    one.close()


@pytest.fixture
def server(guest: Guest) -> Iterator[socket.socket]:
    """A program of the host that listens for the guest's port 52."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{guest.path}_52")
        listener.listen()
        listener.settimeout(10)
        yield listener


def connect(guest: Guest, text: bytes = b"CONNECT 22\n") -> socket.socket:
    """A client of the host's side that has said CONNECT."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(guest.path))
    client.sendall(text)
    guest.driver.io.run()
    return client


def connected(guest: Guest) -> tuple[socket.socket, int]:
    """A client whose connection the guest has accepted, and its host port."""
    client = connect(guest)
    assert guest.heard() == [(REQUEST, 22, 0, b"")]
    guest.say(RESPONSE, guest.host_port, 22)
    assert client.recv(100) == b"OK %d\n" % guest.host_port
    return client, guest.host_port


def accepted(guest: Guest, server: socket.socket) -> socket.socket:
    """A connection that the guest began, from its port 1000."""
    guest.say(REQUEST, 52)
    assert guest.heard() == [(RESPONSE, 1000, 0, b"")]
    peer, _ = server.accept()
    peer.settimeout(10)
    return peer


# -- connections ------------------------------------------------------------------------------------------------


def test_host_connects(guest: Guest) -> None:
    """CONNECT, REQUEST, RESPONSE, OK; then bytes both ways (5.10.6.5)."""
    client, port = connected(guest)
    with client:
        assert port >= 1 << 30
        client.sendall(b"hello")
        assert guest.heard() == [(RW, 22, 0, b"hello")]
        guest.say(RW, port, 22, b"hi")
        assert client.recv(100) == b"hi"


def test_bytes_after_connect_are_data(guest: Guest) -> None:
    """What a client sends along with its CONNECT line is not lost, and a line may come in pieces."""
    with connect(guest, b"CONN") as client:
        client.sendall(b"ECT 22\nearly bird")
        assert guest.heard() == [(REQUEST, 22, 0, b"")]
        guest.say(RESPONSE, guest.host_port, 22)
        assert guest.heard() == [(RW, 22, 0, b"early bird")]


def test_guest_connects(guest: Guest, server: socket.socket) -> None:
    """The guest reaches who listens at PATH_PORT; bytes flow both ways."""
    with accepted(guest, server) as peer:
        guest.say(RW, 52, payload=b"from the guest")
        assert peer.recv(100) == b"from the guest"
        peer.sendall(b"from the host")
        assert guest.heard() == [(RW, 1000, 0, b"from the host")]


def test_nobody_listens(guest: Guest) -> None:
    """The guest's connection is refused when there is no socket at PATH_PORT."""
    guest.say(REQUEST, 53)
    assert guest.heard() == [(RST, 1000, 0, b"")]
    assert not guest.device.connections


def test_guest_refuses(guest: Guest) -> None:
    """RST instead of RESPONSE closes the client's socket, without an OK."""
    with connect(guest) as client:
        guest.heard()
        guest.say(RST, guest.host_port, 22)
        assert client.recv(100) == b""


def test_guest_never_answers(guest: Guest) -> None:
    """A client is let go when its time is over, and the guest is told."""
    with connect(guest) as client:
        guest.heard()
        guest.expire()
        assert client.recv(100) == b""
        assert guest.heard() == [(RST, 22, 0, b"")]


@pytest.mark.parametrize(
    "text",
    [b"GET / HTTP/1.0\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"A" * 100, b"\n"],
)
def test_clients_that_speak_another_language(guest: Guest, text: bytes) -> None:
    """They are hung up on, and the guest does not hear of them."""
    with connect(guest, text) as client:
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass  # it had sent more than was read
        assert guest.heard() == [] and not guest.device.greetings


def test_clients_that_say_nothing(guest: Guest) -> None:
    """They are hung up on after some time; one that hangs up itself is forgotten at once."""
    connect(guest, b"").close()
    guest.driver.io.run()
    assert not guest.device.greetings
    with connect(guest, b"CONN") as client:
        guest.expire()
        assert client.recv(100) == b""
    assert not guest.device.greetings


def test_number_of_connections_is_bounded(guest: Guest, server: socket.socket) -> None:
    """One more than MAX_CONNECTIONS is refused, whoever asks."""
    clients = [connect(guest, b"") for _ in range(MAX_CONNECTIONS)]
    with connect(guest, b"") as last:
        assert last.recv(1) == b""
    guest.say(REQUEST, 52)
    assert guest.heard() == [(RST, 1000, 0, b"")]
    for client in clients:
        client.close()
    guest.driver.io.run()
    accepted(guest, server).close()


def test_no_file_descriptors_left(guest: Guest, server: socket.socket) -> None:
    """The guest's connection is refused; nothing else happens."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), limits[1]))
    try:
        held = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
        guest.say(REQUEST, 52)
        for fd in held:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert guest.heard() == [(RST, 1000, 0, b"")]


# -- credit (5.10.6.3) --------------------------------------------------------------------------------------------


def test_the_guest_gets_no_more_than_it_has_room_for(guest: Guest) -> None:
    """Bytes for the guest stop at its buf_alloc, it is asked for credit once, and they go on when it gives some."""
    client, port = connected(guest)
    with client:
        client.sendall(b"x" * (GUEST_BUFFER + 100))
        heard = guest.heard()
        assert sum(len(data) for _, _, _, data in heard) == GUEST_BUFFER
        assert [operation for operation, *_ in heard if operation != RW] == [CREDIT_REQUEST]
        assert guest.heard() == []
        guest.say(CREDIT_UPDATE, port, 22, fwd_cnt=40)
        heard = guest.heard()
        assert b"".join(data for _, _, _, data in heard) == b"x" * 40
        guest.say(CREDIT_UPDATE, port, 22, fwd_cnt=GUEST_BUFFER)
        assert b"".join(data for _, _, _, data in guest.heard()) == b"x" * 60


def test_the_guest_gets_nothing_without_receive_buffers(tmp_path: Path) -> None:
    """Without buffers the bytes stay in the socket; all arrive in order when there are some."""
    guest = Guest(tmp_path / "vsock", buffers=1)
    client = connect(guest)
    assert guest.heard() == [(REQUEST, 22, 0, b"")]
    guest.say(RESPONSE, guest.host_port, 22)
    with client:
        client.sendall(bytes(range(250)) * 20)
        data = b""
        while heard := guest.heard(refill=False):
            assert len(heard) == 1
            data += heard[0][3]
            guest.offer(1)
        assert data == bytes(range(250)) * 20
    guest.close()


def test_a_slow_program_of_the_host(guest: Guest, server: socket.socket) -> None:
    """What it does not read waits, within our buf_alloc; fwd_cnt tells the guest what was passed on."""
    with accepted(guest, server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        total = received = 0
        connection = guest.device.connections[52, 1000]
        for _ in range(200):
            room = BUFFER - (total - connection._forwarded)
            piece = min(room, 8000)
            guest.say(RW, 52, payload=b"y" * piece)
            total += piece
        assert len(connection._pending) == BUFFER
        guest.heard()
        while received < total:
            received += len(peer.recv(1 << 16))
            guest.heard()
        guest.say(CREDIT_REQUEST, 52)
        assert [operation for operation, *_ in guest.heard()] == [CREDIT_UPDATE]
        assert guest.forwarded == received == total


def test_more_than_the_credit_allows(guest: Guest, server: socket.socket) -> None:
    """A guest that ignores our buf_alloc loses the connection, and the host no memory."""
    with accepted(guest, server) as peer:
        for _ in range(200):
            guest.say(RW, 52, payload=b"z" * 8000)
            if not guest.device.connections:
                break
        assert not guest.device.connections
        assert guest.heard()[-1][:2] == (RST, 1000)
        peer.recv(10)


@pytest.mark.parametrize("fwd_cnt", [1, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("buf_alloc", [0, 1, 0xFFFFFFFF])
def test_credit_that_makes_no_sense(guest: Guest, fwd_cnt: int, buf_alloc: int) -> None:
    """A guest that has received more than was sent, or has four gigabytes of room, gets what its buffers take."""
    client, port = connected(guest)
    with client:
        client.settimeout(0)
        guest.say(CREDIT_UPDATE, port, 22, fwd_cnt=fwd_cnt, buf_alloc=buf_alloc)
        try:
            while True:
                client.send(b"x" * 4096)
        except BlockingIOError:
            pass
        guest.heard(refill=False)
        assert not guest.driver.needs_reset
        assert guest.device.connections


# -- endings (5.10.6.5) -------------------------------------------------------------------------------------------


def test_the_host_closes(guest: Guest) -> None:
    """End of file is SHUTDOWN(SEND) for the guest; its own SHUTDOWN is then answered by RST."""
    client, port = connected(guest)
    client.sendall(b"bye")
    client.close()
    assert guest.heard() == [(RW, 22, 0, b"bye"), (SHUTDOWN, 22, SEND, b"")]
    guest.say(SHUTDOWN, port, 22, flags=SEND | RCV)
    assert guest.heard() == [(RST, 22, 0, b"")]
    assert not guest.device.connections


def test_half_closed_by_the_host(guest: Guest) -> None:
    """A client that only stops to send still gets the guest's answer."""
    client, port = connected(guest)
    with client:
        client.shutdown(socket.SHUT_WR)
        assert guest.heard() == [(SHUTDOWN, 22, SEND, b"")]
        guest.say(RW, port, 22, b"answer")
        assert client.recv(100) == b"answer"


def test_half_closed_by_the_guest(guest: Guest, server: socket.socket) -> None:
    """After SHUTDOWN(SEND) the host reads the rest and end of file, and may still send."""
    with accepted(guest, server) as peer:
        guest.say(RW, 52, payload=b"the end")
        guest.say(SHUTDOWN, 52, flags=SEND)
        assert (peer.recv(100), peer.recv(100)) == (b"the end", b"")
        peer.sendall(b"answer")
        assert guest.heard() == [(RW, 1000, 0, b"answer")]
        guest.say(RW, 52, payload=b"but it said that it would send no more")
        assert guest.heard() == [(RST, 1000, 0, b"")]


def test_the_guest_closes_before_all_is_read(guest: Guest, server: socket.socket) -> None:
    """What waits for a slow program is still delivered; only then comes the RST."""
    with accepted(guest, server) as peer:
        total = 0
        connection = guest.device.connections[52, 1000]
        while not connection._pending:
            guest.say(RW, 52, payload=b"y" * 8000)
            total += 8000
        guest.say(SHUTDOWN, 52, flags=SEND | RCV)
        assert RST not in [operation for operation, *_ in guest.heard()]
        received = 0
        while piece := peer.recv(1 << 16):
            received += len(piece)
            guest.driver.io.run()
        assert received == total
        assert RST in [operation for operation, *_ in guest.heard()]


def test_the_guest_receives_no_more(guest: Guest) -> None:
    """After SHUTDOWN(RCV) a client's bytes have nowhere to go, and it learns that."""
    client, port = connected(guest)
    with client:
        guest.say(SHUTDOWN, port, 22, flags=RCV)
        with pytest.raises(BrokenPipeError):
            client.sendall(b"x" * 10)


def test_the_program_of_the_host_is_gone(guest: Guest, server: socket.socket) -> None:
    """Writing to it is a reset, not a signal and not an exception."""
    accepted(guest, server).close()
    assert guest.heard() == [(SHUTDOWN, 1000, SEND, b"")]
    guest.say(RW, 52, payload=b"anybody there?")
    assert guest.heard() == [(RST, 1000, 0, b"")]


def test_device_reset_hangs_up(guest: Guest, server: socket.socket) -> None:
    """A driver that resets the device has forgotten its connections; both programs learn it, and new ones work."""
    client, _ = connected(guest)
    with client, accepted(guest, server) as peer:
        guest.driver.write(lib.VIRTIO_MMIO_STATUS, 0)
        assert (client.recv(1), peer.recv(1)) == (b"", b"")
    with connect(guest) as client:
        assert client.recv(1) == b""  # nobody is there to answer
    assert not guest.device.connections


# -- hostile guests -----------------------------------------------------------------------------------------------


def test_length_beyond_the_buffer(guest: Guest, server: socket.socket) -> None:
    """A header that claims more payload than the chain has is refused (CVE-2019-18960)."""
    for length in (3, 0x10000, 0xFFFFFFFF):
        with accepted(guest, server) as peer:
            guest.say(RW, 52, payload=b"ab", len=length)
            assert guest.heard() == [(RST, 1000, 0, b"")]
            assert peer.recv(10) == b""


@pytest.mark.parametrize("raw", [b"x", b"\0" * (HEADER_SIZE - 1), b"\xff" * HEADER_SIZE, b"\0" * 1000])
def test_what_is_no_packet(guest: Guest, raw: bytes) -> None:
    """Short and senseless packets are dropped."""
    guest.raw(raw)
    assert guest.heard() == [] and not guest.driver.needs_reset


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"src_cid": 3}, []),
        ({"dst_cid": 1}, []),
        ({"dst_cid": 0xFFFFFFFFFFFFFFFF}, []),
        ({"type": 2}, [RST]),
        ({"type": 0xFFFF}, [RST]),
        ({"op": 0}, [RST]),
        ({"op": 0xFFFF}, [RST]),
        ({"op": RW, "len": 0}, [RST]),
        ({"op": SHUTDOWN, "flags": 0xFFFFFFFF}, [RST]),
        ({"op": RESPONSE}, [RST]),
        ({"op": RST}, []),
        ({"dst_port": 0xFFFFFFFF}, [RST]),
        ({"dst_port": 0, "src_port": 0}, [RST]),
    ],
)
def test_senseless_headers(guest: Guest, fields: dict[str, int], answer: list[int]) -> None:
    """Foreign addresses are dropped; wrong types, operations and ports are answered by RST (5.10.6.4)."""
    guest.say(REQUEST, 99, **fields)
    assert [operation for operation, *_ in guest.heard()] == answer
    assert not guest.device.connections and not guest.driver.needs_reset


@pytest.mark.parametrize("operation", [REQUEST, RESPONSE, 0, 99])
def test_what_an_open_connection_does_not_expect(guest: Guest, server: socket.socket, operation: int) -> None:
    """A second REQUEST, or an answer to nothing, resets the connection."""
    with accepted(guest, server) as peer:
        guest.say(operation, 52)
        assert guest.heard() == [(RST, 1000, 0, b"")]
        assert peer.recv(1) == b""


def test_data_before_the_answer(guest: Guest) -> None:
    """Data on a connection that the guest has not accepted resets it; the client sees no byte of it."""
    with connect(guest) as client:
        guest.heard()
        guest.say(RW, guest.host_port, 22, b"OK 1\n")
        assert guest.heard() == [(RST, 22, 0, b"")]
        assert client.recv(10) == b""


def test_a_guest_that_never_fetches_answers(tmp_path: Path) -> None:
    """Its packets wait when MAX_REPLIES answers do; when it fetches them, all are served."""
    guest = Guest(tmp_path / "vsock", buffers=0)
    for _ in range(MAX_REPLIES + 40):
        guest.say(REQUEST, 99)
    assert len(guest.device._out) == MAX_REPLIES
    assert guest.tx.seen == MAX_REPLIES
    answers = 0
    for _ in range(MAX_REPLIES + 40):
        guest.offer(1)
        answers += len(guest.heard(refill=False))
    assert answers == MAX_REPLIES + 40
    guest.close()


def test_receive_buffers_without_room(tmp_path: Path) -> None:
    """Buffers too small for a header come back empty, and the packet waits for a better one."""
    guest = Guest(tmp_path / "vsock", buffers=0)
    guest.rx.add([], [HEADER_SIZE - 1])
    guest.rx.add([b"readable"])
    guest.rx.kick()
    guest.say(REQUEST, 99)
    assert guest.rx.used() == [(0, 0), (1, 0)]
    guest.offer(1)
    assert [operation for operation, *_ in guest.heard(refill=False)] == [RST]
    guest.close()


OPERATIONS = st.integers(0, 8) | st.integers(0, 0xFFFF)
PORTS = st.sampled_from([52, 52, 52, 22, 1 << 30, (1 << 30) + 1]) | st.integers(0, 2**32 - 1)
NUMBERS = st.sampled_from([0, 1, 4, GUEST_BUFFER]) | st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(OPERATIONS, PORTS, PORTS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=30), st.data())
def test_any_packets(tmp_path: Path, packets: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Any sequence of packets, with clients that come and go: no exception, bounded memory, nothing left open."""
    folder = Path(mkdtemp(dir=tmp_path))
    guest = Guest(folder / "vsock")
    clients: list[socket.socket] = []
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{guest.path}_52")
            listener.listen()
            for operation, host_port, guest_port, length, buf_alloc, fwd_cnt, flags in packets:
                kind = data.draw(st.sampled_from(["exact", "lie", "client", "leave"]))
                if kind == "client":
                    clients.append(connect(guest, b"CONNECT %d\nhello" % guest_port))
                elif kind == "leave" and clients:
                    clients.pop().close()
                fields = {"buf_alloc": buf_alloc, "fwd_cnt": fwd_cnt, "flags": flags}
                if kind == "lie":
                    fields["len"] = length
                guest.say(operation, host_port, guest_port, b"data", **fields)
                if kind != "leave":
                    guest.heard()
                assert len(guest.device._out) <= MAX_REPLIES + len(guest.device.connections)
    finally:
        for client in clients:
            client.close()
        guest.close()
    assert not guest.device.connections and not guest.device.greetings


# -- making one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFFFFFF, -1])
def test_reserved_addresses(tmp_path: Path, cid: int) -> None:
    """CIDs 0 to 2 and the last one are not for guests (5.10.4)."""
    with pytest.raises(ConfigError, match="CID"):
        Vsock(cid, str(tmp_path / "vsock"))


def test_paths_that_do_not_fit(tmp_path: Path) -> None:
    """PATH_PORT has to fit as well."""
    with pytest.raises(ConfigError, match="too long"):
        Vsock(3, "/tmp/" + "x" * 95)


@pytest.mark.parametrize("text", ["7:{}", "cid=7,path={}", "cid=0x7,path={}"])
def test_option(tmp_path: Path, text: str) -> None:
    """Both ways to write --vsock."""
    values, _ = PARSER.parse(["--vsock", text.format(tmp_path / "vsock")])
    (device,) = make_devices(values)
    assert isinstance(device, Vsock) and (device.cid, device.path) == (7, str(tmp_path / "vsock"))
    device.close()


@pytest.mark.parametrize("text", ["7", "7:", ":x", "cid=7", "path=x", "x:y", "cid=7,path=x,more=1", "2:x"])
def test_wrong_options(text: str) -> None:
    """One clear line, and no socket left behind."""
    values, _ = PARSER.parse(["--vsock", text])
    with pytest.raises(UsageError, match="vsock"):
        make_devices(values)
    assert not os.path.exists("x")
