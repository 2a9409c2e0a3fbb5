"""Machines with virtio devices in snapshots: forked and saved in the middle of their traffic, and what ends where."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command import COMMAND, SECONDS, environment, run, spawn
from guests import IMAGES
from test_consoles import DONE, SIZELESS, lines, talk, wait_for
from test_networks import MAC, TYPE_LOCAL, exchange, local_frame, namespace, revive
from test_snapshot_file import sealed_is_refused

from pykvm import BootConfig, ConfigError, Outcome, Pc, restore_file
from pykvm.snapshot.format import PAGE, encode_state, read_header, read_state
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.blk import Disk
from pykvm.virtio.console import Console, ConsolePort
from pykvm.virtio.net import Net
from pykvm.virtio.passt import Passt
from pykvm.virtio.rng import Rng
from pykvm.virtio.tap import Tap
from pykvm.virtio.vsock import Vsock

pytestmark = pytest.mark.usefixtures("images")
__all__ = ["namespace"]  # a fixture

GUEST = str(IMAGES / "console.elf")


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_flood_is_forked_and_saved(irqchip: str, tmp_path: Path) -> None:
    """A guest that prints is copied again and again: each copy prints exactly what was left, no byte twice."""
    whole = (lines(600) + SIZELESS).encode()
    said = Reader()
    boot = BootConfig(GUEST, cmdline="flood=600")
    port = ConsolePort(console=True, sink=said)
    console = Console([port])
    with Pc(boot, memory="16M", irqchip=irqchip, memfd=True, devices=[console, Balloon()]) as vm:
        for lap in range(4):
            said.limit = 64 * 60 * (lap + 1) + 13
            vm.start()
            port.more()
            wait_for(lambda: len(said.data) == said.limit)
            rest = bytearray()

            def connect(copy: Pc, rest: bytearray = rest) -> None:
                copy.find(Console)[0].ports[0].sink = rest.extend

            copy = vm.fork(attach=connect) if lap % 2 else None
            if copy is None:
                vm.save(str(tmp_path / "vm"))
                copy = restore_file(tmp_path / "vm", attach=connect)
            assert len(said.data) == said.limit
            finish(copy, bytes(said.data), rest, whole)
        said.limit = len(whole)
        port.more()
        wait_for(lambda: len(said.data) == len(whole))
    assert said.data == whole


class Reader:
    """A sink that takes so many bytes for now, whichever piece they end in."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.limit = 0

    def __call__(self, data: bytes) -> int:
        """What there is room for."""
        taken = data[: self.limit - len(self.data)]
        self.data += taken
        return len(taken)


def finish(copy: Pc, before: bytes, rest: bytearray, whole: bytes) -> None:
    """Run a copy to its end: it prints what was left, and answers."""
    with copy:
        port = copy.find(Console)[0].ports[0]
        copy.start()
        wait_for(lambda: len(before + rest) >= len(whole))
        wait_for(lambda: port.receive(b"q"))
        assert copy.wait(SECONDS) == Outcome("DEBUG_EXIT", 0)
        copy.console.flush()
    assert before + rest == whole + b"Q"


def saved_by_signal(path: Path, place: str) -> None:
    """Start the guest, wait until it is ready, and have it saved and ended by SIGUSR2."""
    process = spawn("--save", path, "--console", place, "--debug-exit", "--mem", "16M", GUEST)
    assert process.stdout is not None
    if place == "stdio":
        for _ in SIZELESS.splitlines():
            process.stdout.readline()
    else:
        log = Path(place.removeprefix("file:"))
        wait_for(lambda: log.exists() and log.read_text() == SIZELESS)
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and said.decode() == f"pykvm: saved 16 MiB of guest to {path}\n"


def test_the_same_ends_again(tmp_path: Path) -> None:
    """`pykvm restore` opens what the console was connected to: the terminal, a socket; a file is appended to."""
    saved_by_signal(tmp_path / "vm", "stdio")
    done = run("restore", tmp_path / "vm", input="hey q")
    assert (done.returncode, done.stdout) == (DONE, "HEY Q"), done.stderr
    log = tmp_path / "log"
    saved_by_signal(tmp_path / "filed", f"file:{log}")
    assert log.read_text() == SIZELESS
    done = run("restore", "--timeout", "0.3", tmp_path / "filed")
    assert done.returncode == 124 and log.read_text() == SIZELESS


def is_served(path: Path) -> bool:
    """Whether somebody listens at this socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return not client.connect_ex(str(path))


def test_other_ends(tmp_path: Path) -> None:
    """--console of `pykvm restore` connects something else; what the machine has not is one line."""
    saved_by_signal(tmp_path / "vm", "stdio")
    path = tmp_path / "socket"
    process = spawn_restore("--console", f"unix:{path}", tmp_path / "vm")
    wait_for(lambda: is_served(path))
    assert talk(path, b"hello") == b"HELLO"
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    process.communicate()
    for words, why in (
        (["--console", "none", "--console", "none"], "no such terminal"),
        (["--console", "none,port=agent"], "no port 'agent'"),
        (["--vsock", str(path)], "without a vsock"),
    ):
        done = run("restore", *words, tmp_path / "vm")
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_every_small_device(tmp_path: Path) -> None:
    """A machine with all of them is saved, and goes on with its sockets where they were."""
    vsock, hvc = tmp_path / "vsock", tmp_path / "hvc"
    words = ["--rng", "--balloon", "--vsock", f"3:{vsock}", "--console", f"unix:{hvc}", "--console", "none,port=agent"]
    place = "base=0xd0003000 gsi=19"
    process = spawn("--save", tmp_path / "vm", *words, "--mem", "16M", "--append", place, GUEST)
    wait_for(lambda: is_served(hvc))
    assert talk(hvc, b"hello") == b"HELLO"
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm"]
    process = spawn_restore(tmp_path / "vm")
    wait_for(lambda: is_served(hvc))
    assert talk(hvc, b"again") == b"AGAIN" and is_served(vsock)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm"]


def spawn_restore(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start `pykvm restore ARGUMENT...`."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, "restore", *arguments], env=environment(), stdin=pipe, stdout=pipe, stderr=pipe)


class Wire(threading.Thread):
    """Sends frames on an interface all the time, and takes what comes back; for a guest that echoes them."""

    def __init__(self, ifname: str, limit: int = 1 << 30) -> None:
        super().__init__()
        self.ended = False
        self.limit = limit  # of frames for now
        self.sent: list[bytes] = []
        self.heard: list[bytes] = []
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._wire.bind((ifname, TYPE_LOCAL))
        self._wire.settimeout(0.05)
        self.start()

    def run(self) -> None:
        """Until `stop`."""
        while not self.ended:
            if len(self.sent) >= self.limit:
                time.sleep(0.002)
                continue
            self.sent.append(local_frame(len(self.sent), 60 + len(self.sent) % 1400))
            self._wire.send(self.sent[-1])
            with suppress(TimeoutError):
                self.heard.append(self._wire.recv(65536))

    def stop(self, other: Wire | None = None) -> None:
        """End it; every frame that came back was sent here, or on `other` before the copy was made: whole, and once."""
        self.ended = True
        self.join()
        with suppress(TimeoutError):
            while True:
                self.heard.append(self._wire.recv(65536))
        self._wire.close()
        heard = [each[12:] for each in self.heard]
        known = {each[12:] for each in [*self.sent, *(other.sent if other is not None else ())]}
        assert not {*heard} - known and len(heard) == len({*heard})


@pytest.mark.parametrize("irq", [0, 1])
def test_frames_in_the_middle_of_a_snapshot(namespace: None, images: Path, irq: int, tmp_path: Path) -> None:
    """A guest that echoes frames is copied again and again: each goes on with a tap of its own, to the last frame."""
    count = 400
    boot = BootConfig(str(images / "net.elf"), cmdline=f"mode=echo irq={irq} count={count}")
    tap = Tap()
    with Pc(boot, memory="32M", memfd=True, devices=[Net(tap, mac=MAC)]) as vm:
        vm.start()
        wire = Wire(tap.ifname, 0)
        copies = []
        try:
            for lap in range(4):
                wire.limit = 90 * (lap + 1)
                wait_for(lambda lap=lap: len(wire.heard) > 90 * lap + 10)
                if lap % 2:
                    copies.append(vm.fork(attach=lambda copy: copy.find(Net)[0].plug(Tap())))
                else:
                    vm.save(str(tmp_path / "vm"))
                    copies.append(restore_file(tmp_path / "vm"))
            assert vm.running
            wire.limit = 2 * count
            for copy in copies:
                echo_to_the_end(copy, count, wire)
            assert vm.wait(SECONDS) == Outcome("DEBUG_EXIT", 0)
            assert f"net: {count} frames of" in vm.console.text
        finally:
            wire.stop()
            for copy in copies:
                copy.close()
    assert len(wire.heard) == count


def echo_to_the_end(copy: Pc, count: int, other: Wire) -> None:
    """Send frames to a copy until it has had all that it wants."""
    (net,) = copy.find(Net)
    copy.start()
    wire = Wire(net.backend.ifname)
    try:
        assert copy.wait(SECONDS) == Outcome("DEBUG_EXIT", 0), copy.console.text
    finally:
        wire.stop(other)
    assert f"net: {count} frames of" in copy.console.text
    assert 0 < len(wire.heard) < count


def test_a_tap_by_name_and_none(namespace: None, images: Path, tmp_path: Path) -> None:
    """A file makes the interface of the same name again, or says that it is in use; it can be left out as well."""
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=echo count=2")
    with Pc(boot, memory="16M", devices=[Net(Tap("mine"), mac=MAC)]) as vm:
        vm.start()
        exchange("mine", [local_frame(0, 60)])
        vm.save(str(tmp_path / "vm"))
        with pytest.raises(ConfigError, match="another program has it open"):
            restore_file(tmp_path / "vm")
        with restore_file(tmp_path / "vm", net=[None]) as alone:
            assert alone.run(0.2).kind == "TIMEOUT" and not alone.find(Net)[0].is_up
    with restore_file(tmp_path / "vm") as vm:
        vm.start()
        revive("mine", local_frame(1, 61))
        assert vm.wait(SECONDS) == Outcome("DEBUG_EXIT", 0)


def test_a_disk_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is restored from another folder than the one that its disk was named in."""
    (tmp_path / "there").mkdir()
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    monkeypatch.chdir(tmp_path)
    with Pc(GUEST, memory="16M", devices=[Disk("disk.img", readonly=True)]) as vm:
        vm.save("vm")
    monkeypatch.chdir("there")
    with restore_file("../vm") as vm:
        assert vm.find(Disk)[0].capacity == 128


@pytest.mark.host
def test_passt_is_started_again(images: Path, tmp_path: Path) -> None:
    """A file has passt started with the same ports, which have to be free; a fork can have one of its own."""
    if not shutil.which("passt"):
        pytest.skip("passt is not installed")
    if not any(line.split()[1] == "00000000" for line in Path("/proc/net/route").read_text().splitlines()):
        pytest.skip("passt needs a default route of this host")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    boot = BootConfig(str(images / "net.elf"), cmdline="mode=echo count=2")
    with Pc(boot, memory="16M", devices=[Net(Passt([f"tcp:127.0.0.1:{port}-:22"]))]) as vm:
        vm.save(str(tmp_path / "vm"))
        with vm.fork(attach=lambda copy: copy.find(Net)[0].plug(Passt())) as copy:
            assert copy.run(0.1).kind == "TIMEOUT" and copy.find(Net)[0].alive
        with pytest.raises(ConfigError, match="cannot listen on port"):
            restore_file(tmp_path / "vm")
    with restore_file(tmp_path / "vm"):
        socket.create_connection(("127.0.0.1", port)).close()


def test_forged_devices(tmp_path: Path) -> None:
    """Whatever a file says of its devices, in right checksums, it is one line at worst, and nothing is left behind."""
    ports = [ConsolePort(console=True), ConsolePort("agent")]
    devices = [Console(ports), Balloon(), Net(None), Vsock(7, str(tmp_path / "vsock")), Rng()]
    path = tmp_path / "vm"
    with Pc(GUEST, memory="4M", devices=devices) as vm:
        vm.save(str(path))
    good = path.read_bytes()
    with path.open("rb") as file:
        header = read_header(file.fileno(), str(path))
    before = len(os.listdir("/proc/self/fd"))
    chance = random.Random(5)
    refused = 0
    for _ in range(80):
        with path.open("rb") as file:
            document = read_state(file.fileno(), str(path), header)
        part = chance.choice([document["board"]["devices"], [*document["devices"].values()]])
        part = chance.choice(part)
        spoil(chance, part)
        state = encode_state(document)
        if len(state) > header.state_length:
            continue
        state = state.ljust(header.state_length, b"\0")
        bad = bytearray(good)
        bad[PAGE : PAGE + len(state)] = state
        refused += sealed_is_refused(tmp_path / "bad", bad, ConfigError)
    assert refused > 40
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def spoil(chance: random.Random, part: object) -> None:
    """Put something else somewhere into a document."""
    while True:
        places = list(part) if isinstance(part, dict) else list(range(len(part)))  # type: ignore[arg-type]
        if not places:
            return
        at = chance.choice(places)
        inner = part[at]  # type: ignore[index]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.8:
            part = inner
            continue
        wrong = (
            -1,
            1 << 70,
            0xFFFF,
            True,
            "x" * 300,
            "\n",
            b"\xff" * 3,
            b"",
            [],
            [[]],
            {},
            {"$": 1},
            None,
            1.5,
            "/",
            "no",
        )
        part[at] = chance.choice(wrong)  # type: ignore[index]
        return
