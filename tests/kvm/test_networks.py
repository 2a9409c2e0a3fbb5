"""Networks with a guest: frames over a real tap in a network namespace of the test's own, passt and its end."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.virtio.net import Net
from pykvm.virtio.tap import Tap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CLONE_NEWNET = 0x40000000  # <linux/sched.h>; os.unshare came with Python 3.12
TYPE_LOCAL = 0x88B5  # an EtherType for experiments (IEEE 802)
MAC = "52:54:00:12:34:56"


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread in a network of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if libc.unshare(CLONE_NEWNET) or not os.path.exists("/dev/net/tun"):
        os.close(before)
        pytest.skip("needs root for a network namespace, and /dev/net/tun")
    try:
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as stream:
            stream.write("1")  # no router solicitations between the test's frames
        yield
    finally:
        assert libc.setns(before, CLONE_NEWNET) == 0
        os.close(before)


def local_frame(number: int, size: int) -> bytes:
    """A frame to the guest that no other program understands."""
    to, from_ = bytes.fromhex(MAC.replace(":", "")), b"\x02\0\0\0\0\x09"
    return (to + from_ + TYPE_LOCAL.to_bytes(2, "big") + number.to_bytes(4, "big") + os.urandom(size))[:size]


def exchange(ifname: str, frames: Sequence[bytes]) -> list[bytes]:
    """Send each frame on the interface and wait for the guest's answer."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.bind((ifname, TYPE_LOCAL))
        wire.settimeout(20)
        got = []
        for frame in frames:
            wire.send(frame)
            got.append(wire.recv(65536))
        return got


def revive(ifname: str, frame: bytes) -> None:
    """The kernel takes up to a second to see that a link is up again, and drops what is sent meanwhile."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.bind((ifname, TYPE_LOCAL))
        wire.settimeout(0.1)
        for _ in range(200):
            wire.send(frame)
            with suppress(TimeoutError):
                assert wire.recv(65536)[14:] == frame[14:]
                return
        pytest.fail("no frame passes")


@pytest.mark.parametrize(("irq", "native"), [(0, True), (1, True), (1, False)])
def test_frames_there_and_back(namespace: None, images: Path, irq: int, native: bool) -> None:
    """Frames of any size reach the guest over a tap, in one buffer or several, and come back as they were."""
    tap = Tap(mtu=9000)
    net = Net(tap, mac=MAC, native=native)
    frames = [local_frame(n, size) for n, size in enumerate((60, 61, 1514, 2036, 2037, 4096, 9014, 64))]
    boot = BootConfig(str(images / "net.elf"), cmdline=f"mode=echo irq={irq} count={len(frames)}")
    with Pc(boot, memory="64M", devices=[net]) as pc:
        pc.start()
        got = exchange(tap.ifname, frames)
        assert pc.wait(20) == Outcome("DEBUG_EXIT", 0), pc.console.text
        assert f"net: {len(frames)} frames of {sum(map(len, frames))} bytes" in pc.console.text
        assert "mac 52:54:0:12:34:56 mtu 9000 link 1" in pc.console.text
    assert [each[12:] for each in got] == [each[12:] for each in frames]
    assert net.frames["tx"] == len(frames)
    assert not os.path.exists(f"/proc/sys/net/ipv4/conf/{tap.ifname}")  # it went with the machine


def test_thousands_of_frames_to_nobody(namespace: None, images: Path) -> None:
    """The guest sends as fast as it can, and every frame is taken once."""
    net = Net(Tap(), mac=MAC)
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=send count=20000 bytes=60")
    with Pc(boot, memory="64M", devices=[net]) as pc:
        assert pc.run(timeout=60) == Outcome("DEBUG_EXIT", 0)
        assert net.frames["tx"] == 20_000


def test_an_existing_tap_by_name_and_by_fd(namespace: None, images: Path) -> None:
    """A persistent tap is used and left as it was; an fd of one as well."""
    subprocess.run(["ip", "tuntap", "add", "mode", "tap", "name", "mine", "vnet_hdr"], check=True)
    subprocess.run(["ip", "link", "set", "mine", "up", "mtu", "1400"], check=True)
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=send count=10")
    with Pc(boot, memory="64M", devices=[Net(Tap("mine"))]) as pc:
        assert pc.run(timeout=20) == Outcome("DEBUG_EXIT", 0)
        assert "mtu 1400" in pc.console.text
    borrowed = Tap("mine")
    tap = Tap(fd=os.dup(borrowed.fd))
    assert (tap.ifname, tap.has_header, tap.offloads) == ("mine", True, borrowed.offloads)
    borrowed.close()
    with Pc(boot, memory="64M", devices=[Net(tap)]) as pc:
        assert pc.run(timeout=20) == Outcome("DEBUG_EXIT", 0)
    assert os.path.exists("/proc/sys/net/ipv4/conf/mine")


def test_a_deleted_interface_takes_the_link_down(namespace: None, images: Path) -> None:
    """The guest goes on when its tap is deleted: it sees a link that is down."""
    tap = Tap()
    net = Net(tap, mac=MAC)
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=echo count=2")
    with Pc(boot, memory="64M", devices=[net]) as pc:
        pc.start()
        exchange(tap.ifname, [local_frame(0, 60)])
        subprocess.run(["ip", "link", "del", tap.ifname], check=True)
        end = time.monotonic() + 10
        while net.alive and time.monotonic() < end:
            time.sleep(0.01)
        assert not net.alive
        assert pc.wait(0.2) is None


def test_the_link_can_be_pulled_while_running(namespace: None, images: Path) -> None:
    """Frames are lost while the cable is out, and pass again afterwards."""
    tap = Tap()
    net = Net(tap, mac=MAC)
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=echo count=2")
    with Pc(boot, memory="64M", devices=[net]) as pc:
        pc.start()
        exchange(tap.ifname, [local_frame(0, 60)])
        puller = threading.Thread(target=net.set_link, args=(False,))
        puller.start()
        puller.join()
        net.set_link(True)
        revive(tap.ifname, local_frame(1, 60))
        assert pc.wait(20) == Outcome("DEBUG_EXIT", 0)


@pytest.mark.host
def test_passt_ends_with_pykvm(images: Path) -> None:
    """passt is gone after the end of the guest, and after kill -9 of pykvm."""
    if not shutil.which("passt"):
        pytest.skip("passt is not installed")
    with open("/proc/net/route", encoding="ascii") as routes:
        if not any(line.split()[1] == "00000000" for line in routes):
            pytest.skip("passt needs a default route of this host")
    command = [sys.executable, "-m", "pykvm", "start", "--net", "user", "--append", "ending=spin-user"]
    with subprocess.Popen([*command, images / "endings.elf"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as vmm:
        assert vmm.stdout is not None
        while b"spin-user" not in (line := vmm.stdout.readline()):
            assert line, "pykvm ended"
        (child,) = children(vmm.pid)
        vmm.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(child)


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
        return [int(word) for word in stream.read().split()]


def is_running(pid: int) -> bool:
    """Whether the process is there, and more than a zombie that nobody has waited for yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
