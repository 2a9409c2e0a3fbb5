"""The user-mode network: the stream of frames, the options of passt, its process, --net."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest
from driver import Driver
from netpeer import HEADER, PLAIN, frame

from pykvm import log
from pykvm._native import lib
from pykvm.cli.devices import make_devices
from pykvm.errors import ConfigError, UsageError
from pykvm.virtio.net import Net
from pykvm.virtio.passt import Forward, Passt, StreamBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]


def packed(*frames: bytes) -> bytes:
    """As they are in the stream."""
    return b"".join(struct.pack("!I", len(each)) + each for each in frames)


class Wire:
    """A device on a stream whose other end the test holds."""

    def __init__(self, drive: Drive) -> None:
        ours, self.peer = socket.socketpair()
        self.net = Net(StreamBackend(ours), mac="52:54:00:12:34:56", mtu=65520)
        self.driver = drive(self.net)
        self.rx, self.tx, _ = self.driver.start()
        self.peer.setblocking(False)

    def arrive(self, data: bytes) -> None:
        """Bytes come in."""
        self.peer.sendall(data)
        self.driver.io.run()


@pytest.fixture
def wire(drive: Drive) -> Wire:
    """A connected device."""
    return Wire(drive)


def test_receives_frames_cut_anywhere(wire: Wire) -> None:
    """The stream may come in pieces of any size; each frame gets a header of the device's."""
    places = [wire.rx.add(writable=[2048])[0] for _ in range(3)]
    wire.rx.kick()
    stream = packed(frame(60, 1), frame(1514, 2), frame(61, 3))
    for at in range(0, len(stream), 7):
        wire.arrive(stream[at : at + 7])
    assert [written for _, written in wire.rx.used()] == [72, 1526, 73]
    assert wire.driver.memory.read(places[1], 1526) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(1514, 2)


def test_sends_frames_with_their_length(wire: Wire) -> None:
    """Without virtio's header, after the length, all bytes once."""
    for number in range(3):
        wire.tx.add([PLAIN, frame(60, number), b"tail"])
    wire.tx.kick()
    assert wire.peer.recv(65536) == packed(*(frame(60, number) + b"tail" for number in range(3)))


def test_a_full_socket_keeps_the_stream_whole(wire: Wire) -> None:
    """A frame that the socket takes in part goes on where it stopped, and later ones follow in order."""
    sent = [os.urandom(60_000 + number) for number in range(7)]  # twice what the socket takes
    for each in sent:
        wire.tx.add([PLAIN, each])
    wire.tx.kick()
    assert len(wire.tx.used()) < 7
    assert read_all(wire) == packed(*sent)
    assert len(wire.tx.used()) > 0
    assert wire.net._plane.watched == 0


def read_all(wire: Wire) -> bytes:
    """All that the device sends until nothing more comes."""
    got = bytearray()
    while True:
        try:
            got += wire.peer.recv(1 << 20)
        except BlockingIOError:
            return bytes(got)
        wire.driver.io.run()


@pytest.mark.parametrize("length", [0, 13, 65555, 0xFFFFFFFF])
def test_an_impossible_length_is_the_end(wire: Wire, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the next frame begins is unknown then: the link goes down, with one line."""
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: said.append(facts["reason"]))
    wire.rx.add(writable=[2048])
    wire.rx.kick()
    wire.arrive(struct.pack("!I", length) + bytes(100))
    assert said == [f"stream sent a frame of {length} bytes"]
    assert wire.driver.read(lib.VIRTIO_MMIO_CONFIG + 6, 2) == 0


def test_a_closed_connection_is_the_end(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link goes down, with one line; what the guest sends is dropped."""
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: said.append(facts["reason"]))
    wire.rx.add(writable=[2048])
    wire.rx.kick()
    wire.peer.close()
    wire.driver.io.run()
    wire.tx.add([PLAIN, frame(60)])
    wire.tx.kick()
    assert wire.tx.used() == [(0, 0)]
    assert said == ["stream closed the connection"]


# -- port forwarding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp::2222-:22", ["-t", "2222:22"]),
        ("tcp:2222:22", ["-t", "2222:22"]),
        ("udp:127.0.0.1:53-:5353", ["-u", "127.0.0.1/53:5353"]),
        ("tcp:[::1]:80-:80", ["-t", "::1/80:80"]),
    ],
)
def test_forwards(text: str, words: list[str]) -> None:
    """QEMU's words become passt's."""
    assert Forward(text).passt_words() == words


@pytest.mark.parametrize(
    "text",
    ["", "tcp", "tcp::-:", "tcp::22", "sctp::22-:22", "tcp::0-:22", "tcp::22-:65536", "tcp::22-10.0.0.1:22", "x:y:z"],
)
def test_refuses_bad_forwards(text: str) -> None:
    """With a line that shows how it is done."""
    with pytest.raises(ConfigError, match="hostfwd"):
        Forward(text)


def test_refuses_a_port_in_use() -> None:
    """passt would go on with half of it."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}: Address already in use"):
            Passt([f"tcp::{port}-:22"])


# -- the process ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake_passt(SCRIPT) puts a shell script in passt's place: $fd is its socket, $pid its PID file."""

    def install(script: str) -> None:
        head = "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --fd) fd=$2;; --pid) pid=$2;; esac; shift; done\n"
        program = tmp_path / "passt"
        program.write_text(head + script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def open_fds() -> list[str]:
    """This process's descriptors."""
    return sorted(os.listdir("/proc/self/fd"))


def test_says_when_passt_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line names the package, and no descriptor is left behind."""
    monkeypatch.setenv("PATH", str(tmp_path))
    before = open_fds()
    with pytest.raises(ConfigError, match="apt-get install passt"):
        Passt()
    assert open_fds() == before


def test_says_why_passt_did_not_start(fake_passt: Callable[[str], None]) -> None:
    """passt's own words, without its noise."""
    fake_passt("echo 'Failed to send 7 bytes to syslog' >&2; echo 'No external routable interface' >&2; exit 1")
    before = open_fds()
    with pytest.raises(ConfigError, match=r"passt did not start: No external routable interface$"):
        Passt()
    assert open_fds() == before


def test_ends_passt(fake_passt: Callable[[str], None]) -> None:
    """close() leaves no process, even of one that does not end by itself, and no descriptor."""
    fake_passt("echo 1 >$pid; exec sleep 1000")
    before = open_fds()
    backend = Passt()
    pid = backend.process.pid
    backend.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert open_fds() == before


def test_says_how_passt_ended(fake_passt: Callable[[str], None], drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has its status and last words."""
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: said.append(facts["reason"]))
    fake_passt("echo 1 >$pid; echo 'out of luck' >&2; exit 3")
    driver = drive(Net(Passt()))
    rx, _, _ = driver.start()
    end = time.monotonic() + 10
    rx.add(writable=[2048])
    while not said and time.monotonic() < end:
        rx.kick()
        time.sleep(0.01)
    assert said == ["passt ended with status 3: out of luck"]


# -- --net ------------------------------------------------------------------------------------------------------


def test_net_user_option(fake_passt: Callable[[str], None], tmp_path: Path) -> None:
    """--net user with everything: passt gets the forwards, the device its address, MTU and link."""
    fake_passt("echo 1 >$pid; exec head -c 1 <&$fd")
    (device,) = make_devices(
        {"net": ["user,hostfwd=tcp::2222-:22,hostfwd=udp:53:53,mac=52:54:00:00:00:01,mtu=9000,down"]}
    )
    try:
        assert isinstance(device, Net)
        assert (device.mac, device.mtu, device.link) == (bytes.fromhex("525400000001"), 9000, False)
        assert device.backend.process.args[-4:] == ["-t", "2222:22", "-u", "53:53"]  # type: ignore[attr-defined]
    finally:
        device.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "slirp",
        "user,ifname=tap0",
        "tap,hostfwd=tcp:1:1",
        "user,mac=1",
        "user,mtu=1",
        "tap,fd=x",
        "tap,fd=999999",
        "tap,ifname=",
        "tap,ifname=a/b",
        "tap,ifname=sixteen-letters-",
        "user,rate=0",
        "user,mac=0:0:0:0:0:1,mac=0:0:0:0:0:2",
    ],
)
def test_refuses_bad_options(text: str, fake_passt: Callable[[str], None]) -> None:
    """One line each, and no process or descriptor is left."""
    fake_passt("echo 1 >$pid; exec head -c 1 <&$fd")
    before = open_fds()
    with pytest.raises(UsageError):
        make_devices({"net": [text]})
    assert open_fds() == before
