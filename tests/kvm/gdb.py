"""Debian's gdb against a machine of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm import Machine
from pykvm.debug.gdbstub.server import GdbServer

SECONDS = 110  # for one gdb; the lab's CPU is emulated
SYMBOLS = Path(__file__).resolve().parents[2] / "images" / "build"


def need_gdb() -> None:
    """Skip where gdb is not installed; where the tests of KVM are required, so is gdb."""
    if shutil.which("gdb") is None:
        complain = pytest.fail if "kvm" in os.environ.get("PYKVM_REQUIRE", "") else pytest.skip
        complain("gdb is not installed: scripts/setup --lab")


def command(server: GdbServer, *commands: str, symbols: str = "") -> list[str]:
    """The gdb command line that connects to `server` and does `commands`."""
    words = ["gdb", "-nx", "-batch", "-iex", "set width 0", "-iex", "set auto-load no"]
    words += [str(SYMBOLS / symbols)] if symbols else []
    for each in (f"target remote {server.address}", *commands):
        words += ["-ex", each]
    return words


def gdb(machine: Machine | GdbServer, *commands: str, symbols: str = "", arch: str = "auto") -> str:
    """What gdb prints, both streams, when it does `commands` to the machine (held until it continues)."""
    need_gdb()
    server = machine if isinstance(machine, GdbServer) else machine.gdb_server(wait=True, arch=arch)
    if isinstance(machine, Machine):
        machine.start()
    done = subprocess.run(
        command(server, *commands, symbols=symbols),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(done.stdout)  # for a failing test
    return done.stdout


def lines(output: str, *expected: str) -> None:
    """Every one of `expected` is a line of `output`, in this order."""
    rest = iter([line.strip() for line in output.splitlines()])
    for line in expected:
        assert any(line == each for each in rest), f"{line!r} does not follow in:\n{output}"
