"""Debian's drivers and our small virtio devices: a shell on hvc0 from which the others are used."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.console import Console, ConsolePort
from pykvm.virtio.rng import Rng
from pykvm.virtio.vsock import Vsock

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 150  # for one command; the lab's CPU is emulated and may share its machine
MIB = 1 << 20
MODULES = ("virtio_mmio", "virtio_console", "virtio_rng", "virtio_balloon", "vmw_vsock_virtio_transport")
# ramfs takes all memory, tmpfs half of it
SHELL = "mkdir /ram; mount -t ramfs ram /ram; sh </dev/hvc0 2>&1 | cat >/dev/hvc0"
BLOB = os.urandom(2 * MIB)


class Shell:
    """A shell at the other end of a console port."""

    def __init__(self, port: ConsolePort) -> None:
        self.port = port
        self._data = bytearray()
        self._news = threading.Condition()
        port.sink = self._take

    def _take(self, data: bytes) -> None:
        with self._news:
            self._data += data
            self._news.notify_all()

    def type(self, text: str) -> None:
        """Give the guest all of this, as fast as it takes it."""
        data = text.encode()
        end = time.monotonic() + SECONDS
        while data and time.monotonic() < end:
            data = data[self.port.receive(data) :]
            if data:
                time.sleep(0.02)
        assert not data, f"the guest does not take {text!r}"

    def wait(self, pattern: bytes, seconds: float = SECONDS) -> re.Match[bytes]:
        """The match of `pattern` in the output, which is used up to there."""
        found: list[re.Match[bytes]] = []

        def look() -> bool:
            match = re.search(pattern, bytes(self._data), re.DOTALL)  # the buffer changes under a match
            if match is not None:
                found.append(match)
            return match is not None

        with self._news:
            assert self._news.wait_for(look, seconds), (pattern, bytes(self._data[-2000:]))
            del self._data[: found[0].end()]
        return found[0]

    def run(self, command: str) -> str:
        """The output of a command that succeeds."""
        self.type(f"{command}; echo E''ND $?\n")
        match = self.wait(rb"E''ND \$\?\r\n(.*?)END (\d+)\r\n")
        assert match[2] == b"0", (command, match[1])
        return match[1].decode().replace("\r\n", "\n")


def resident() -> int:
    """This process's RSS in bytes: the guest's memory is in it."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def wait_until(what: Callable[[], bool], why: str) -> None:
    """Poll until it is so."""
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.2)


@pytest.mark.timeout(400)
def test_all_small_devices_at_once(
    guest_kernel: Path, initrd_with: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """One guest uses rng, console, balloon and vsock, each with its Linux driver, and no rule is broken."""
    ports = [ConsolePort(console=True), ConsolePort("org.pykvm.agent")]
    balloon = Balloon()
    devices = [Rng(), Console(ports), balloon, Vsock(7, str(tmp_path / "vsock"))]
    initrd = initrd_with(*MODULES, files={"bin/vsockcat": (images / "vsockcat").read_bytes()})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline=f'console=ttyS0 quiet pykvm.run="{SHELL}"')
    with Pc(boot, memory="1G", devices=devices) as pc:
        shell = Shell(ports[0])
        ports[0].resize(132, 43)
        pc.start()
        assert shell.run("echo up") == "up\n"
        check_rng(shell)
        check_console(shell, ports)
        check_port(shell, ports[1])
        check_vsock(shell, tmp_path / "vsock")
        check_statistics(shell, balloon)
        check_reporting(shell, balloon)
        shell.type("poweroff -f\n")
        assert pc.wait(SECONDS) == Outcome.POWER_OFF, pc.console.text[-2000:]
        assert [transport.faults for transport in pc.virtio] == [0, 0, 0, 0]
    assert not (tmp_path / "vsock").exists()


def check_rng(shell: Shell) -> None:
    """The kernel feeds on the device, and two reads differ."""
    assert shell.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    sums = {shell.run("head -c 50000 /dev/hwrng | md5sum") for _ in range(2)}
    assert len(sums) == 2


def check_console(shell: Shell, ports: list[ConsolePort]) -> None:
    """The terminal has the size that the host says, also after a change; much output arrives whole."""
    assert shell.run("stty size").split() == ["43", "132"]
    ports[0].resize(100, 30)
    wait_until(lambda: shell.run("stty size").split() == ["30", "100"], "the new size does not arrive")
    assert shell.run("seq 1 5000").split() == [str(number) for number in range(1, 5001)]


def check_port(shell: Shell, port: ConsolePort) -> None:
    """A named port carries bytes both ways."""
    heard = bytearray()
    port.sink = heard.extend
    name = shell.run("grep -l org.pykvm.agent /sys/class/virtio-ports/*/name").split("/")[-2]
    shell.run(f"echo to the host > /dev/{name}")
    wait_until(lambda: bytes(heard) == b"to the host\n", "the port's output does not arrive")
    shell.type(f"head -c 6 /dev/{name}; echo E''ND 0\n")
    wait_until(lambda: port.receive(b"guest!") == 6, "the port takes no input")
    shell.wait(rb"guest!END 0\r\n")


def check_vsock(shell: Shell, path: Path) -> None:
    """Two megabytes go to a server in the guest and back, and to one on the host and back."""
    shell.type("vsockcat echo 5000 &\n")
    shell.wait(rb"listening\r\n")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        client.sendall(b"CONNECT 5000\n")
        assert re.fullmatch(rb"OK \d+\n", client.recv(100))
        sender = threading.Thread(target=lambda: (client.sendall(BLOB), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert receive_all(client) == BLOB
        sender.join()
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(SECONDS)
        server.bind(f"{path}_6000")
        server.listen()
        thread = threading.Thread(target=answer_one, args=(server,))
        thread.start()
        shell.run("head -c 2000000 /dev/urandom > /tmp/blob; vsockcat connect 6000 </tmp/blob >/tmp/back")
        shell.run("cmp /tmp/blob /tmp/back")
        thread.join()
    os.unlink(f"{path}_6000")
    assert "onnection reset" in shell.run("vsockcat connect 6001 </dev/null 2>&1 || true")


def receive_all(sock: socket.socket) -> bytes:
    """Everything up to end of file."""
    data = bytearray()
    while piece := sock.recv(1 << 16):
        data += piece
    return bytes(data)


def answer_one(server: socket.socket) -> None:
    """Take one connection, read it to its end, and send all of it back."""
    peer, _ = server.accept()
    with peer:
        peer.settimeout(SECONDS)
        peer.sendall(receive_all(peer))


def check_statistics(shell: Shell, balloon: Balloon) -> None:
    """The guest's own numbers arrive."""
    stats = balloon.stats(SECONDS)
    total = int(shell.run("grep MemTotal /proc/meminfo").split()[1]) << 10
    assert stats["total_memory"] == total
    assert 0 < stats["free_memory"] < total


def fill(shell: Shell) -> int:
    """Have the guest touch 800 MiB and free them again; the RSS in between."""
    shell.run("dd if=/dev/zero of=/ram/fill bs=1M count=800 2>/dev/null")
    full = resident()
    shell.run("rm /ram/fill")
    return full


def check_reporting(shell: Shell, balloon: Balloon) -> None:
    """Free pages go back to the host by themselves: 600 of 800 MiB leave the RSS."""
    full = fill(shell)
    assert full > 800 * MIB
    wait_until(lambda: full - resident() >= 600 * MIB, f"the RSS stays at {resident() >> 20} MiB")
    print(f"reporting: RSS {full >> 20} -> {resident() >> 20} MiB")


@pytest.mark.timeout(400)
def test_balloon_takes_memory_back(guest_kernel: Path, initrd_with: Callable[..., Path]) -> None:
    """A guest of 1 GiB that touched 800 MiB gives back 600 MiB, seen in the RSS, and gets them again."""
    port = ConsolePort(console=True)
    balloon = Balloon(reporting=False)
    initrd = initrd_with("virtio_mmio", "virtio_console", "virtio_balloon")
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline=f'console=ttyS0 quiet pykvm.run="{SHELL}"')
    with Pc(boot, memory="1G", irqchip="split", devices=[Console([port]), balloon]) as pc:
        shell = Shell(port)
        pc.start()
        assert shell.run("echo up") == "up\n"
        full = fill(shell)
        assert full > 800 * MIB and resident() > full - 50 * MIB
        pc.balloon.set_target(760 * MIB)  # some of them pages that were never touched
        wait_until(lambda: balloon.actual == 760 * MIB, "the balloon does not fill")
        inflated = resident()
        print(f"balloon: RSS {full >> 20} -> {inflated >> 20} MiB")
        assert full - inflated >= 600 * MIB
        pc.balloon.set_target(0)
        wait_until(lambda: balloon.actual == 0, "the balloon does not deflate")
        shell.run("dd if=/dev/zero of=/ram/fill bs=1M count=700 2>/dev/null")
        assert resident() - inflated >= 500 * MIB
        shell.type("poweroff -f\n")
        assert pc.wait(SECONDS) == Outcome.POWER_OFF, pc.console.text[-2000:]
