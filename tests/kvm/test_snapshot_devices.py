"""Machines with virtio devices in snapshots: forked and saved in the middle of their traffic, and what ends where."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, SECONDS, environment, run, spawn
from guests import IMAGES
from test_consoles import DONE, SIZELESS, lines, talk, wait_for

from pykvm import BootConfig, Outcome, Pc, restore_file
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.console import Console, ConsolePort

pytestmark = pytest.mark.usefixtures("images")

GUEST = str(IMAGES / "console.elf")


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_flood_is_forked_and_saved(irqchip: str, tmp_path: Path) -> None:
    """A guest that prints is copied again and again: each copy prints exactly what was left, no byte twice."""
    whole = (lines(600) + SIZELESS).encode()
    said = bytearray()
    boot = BootConfig(GUEST, cmdline="flood=600")
    console = Console([ConsolePort(console=True, sink=said.extend)])
    with Pc(boot, memory="16M", irqchip=irqchip, memfd=True, devices=[console, Balloon()]) as vm:
        for lap in range(4):
            vm.start()
            wait_for(lambda lap=lap: len(said) > 64 * 60 * (lap + 1))
            vm.pause()
            copy = vm.fork() if lap % 2 else None
            if copy is None:
                vm.save(str(tmp_path / "vm"))
                copy = restore_file(tmp_path / "vm")
            before = bytes(said)
            assert whole.startswith(before) and len(before) < len(whole)
            finish(copy, before, whole)
        vm.start()
        wait_for(lambda: len(said) == len(whole))
    assert said == whole


def finish(copy: Pc, before: bytes, whole: bytes) -> None:
    """Run a copy to its end: it prints what was left, and answers."""
    rest = bytearray()
    with copy:
        port = copy.virtio[0].device.ports[0]
        port.sink = rest.extend
        copy.start()
        wait_for(lambda: len(before + rest) >= len(whole))
        wait_for(lambda: port.receive(b"q"))
        assert copy.wait(SECONDS) == Outcome("DEBUG_EXIT", 0)
        copy.console.flush()
    assert before + rest == whole + b"Q"


def saved_by_signal(path: Path, place: str) -> None:
    """Start the guest, wait until it is ready, save it by SIGUSR1 and end it."""
    process = spawn("--save", path, "--console", place, "--debug-exit", "--mem", "16M", GUEST)
    assert process.stdout is not None
    if place == "stdio":
        for _ in SIZELESS.splitlines():
            process.stdout.readline()
    else:
        log = Path(place.removeprefix("file:"))
        wait_for(lambda: log.exists() and log.read_text() == SIZELESS)
    process.send_signal(signal.SIGUSR1)
    wait_for(path.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


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


def spawn_restore(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start `pykvm restore ARGUMENT...`."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, "restore", *arguments], env=environment(), stdin=pipe, stdout=pipe, stderr=pipe)
