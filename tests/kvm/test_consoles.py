"""`pykvm start --console` with the virtio-console driver of images/console.c: where its bytes go, and come from."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import command
import pexpect
import pytest
from guests import IMAGES

pytestmark = pytest.mark.usefixtures("images")

GUEST = str(IMAGES / "console.elf")
SECONDS = 60
READY = "hvc: ready\n"
SIZELESS = READY + "hvc: 0 columns, 0 rows\n"
DONE = 1  # (0 << 1) | 1: the guest's debug-exit
OPTIONS = ("--debug-exit", "--mem", "16M", GUEST)


def lines(count: int) -> str:
    """What flood=COUNT prints."""
    return "".join(f"{number!s:.<63}\n" for number in range(count))


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_pipes(irqchip: str) -> None:
    """Standard input and output are the guest's terminal; notifications and interrupts arrive with either irqchip."""
    result = command.start("--console", "stdio", "--irqchip", irqchip, *OPTIONS, input="hello\nq")
    assert (result.returncode, result.stdout) == (DONE, SIZELESS + "HELLO\nQ"), result.stderr


def test_serial_port_beside_it() -> None:
    """With --console stdio COM1 goes nowhere unless it is sent somewhere; both on stdio are refused."""
    result = command.start("--console", "stdio", "--serial", "stdio", *OPTIONS)
    assert result.returncode == 2 and "only one port can be stdio" in result.stderr


def test_json() -> None:
    """The console's output is in the document."""
    result = command.start("--console", "stdio", "--json", *OPTIONS, input="q")
    assert result.returncode == DONE
    assert json.loads(result.stdout)["console"] == SIZELESS + "Q"


def test_terminal_and_its_size() -> None:
    """On a terminal keys go to the guest one by one, it learns the size and each change, and Ctrl-A x ends it."""
    words = [*command.COMMAND[1:], "start", "--console", "stdio", *OPTIONS]
    console = pexpect.spawn(
        sys.executable, words, env=command.environment(), timeout=SECONDS, echo=True, dimensions=(24, 80)
    )
    try:
        cooked = termios.tcgetattr(console.child_fd)
        console.expect_exact("hvc: 80 columns, 24 rows")
        assert termios.tcgetattr(console.child_fd) != cooked
        console.setwinsize(30, 100)
        console.expect_exact("hvc: 100 columns, 30 rows")
        console.send("k")
        console.expect_exact("K")
        console.send("\x01x")
        console.expect(pexpect.EOF)
        assert termios.tcgetattr(console.child_fd) == cooked
    finally:
        console.close(force=True)


def test_file(tmp_path: Path) -> None:
    """Output to a file is whole; there is no input."""
    path = tmp_path / "log"
    process = command.spawn("--console", f"file:{path}", *OPTIONS[:-1], "--append", "flood=1000", GUEST)
    wait_for(lambda: path.exists() and path.read_text().endswith("rows\n"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert path.read_text() == lines(1000) + SIZELESS


def wait_for(what: object) -> None:
    """Poll until `what()` is true."""
    end = time.monotonic() + SECONDS
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_slow_reader() -> None:
    """Output that nobody reads stays in the guest; when somebody does, every byte comes."""
    process = command.spawn("--console", "stdio", *OPTIONS[:-1], "--append", "flood=3000", GUEST)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"q")
    process.stdin.close()
    time.sleep(0.5)
    assert process.poll() is None  # 192 KB do not fit a pipe
    assert process.stdout.read().decode() == lines(3000) + SIZELESS + "Q"
    assert process.wait(SECONDS) == DONE


def test_reader_that_leaves() -> None:
    """As any program whose reader has gone, pykvm ends, and says so."""
    process = command.spawn("--console", "stdio", *OPTIONS[:-1], "--append", "flood=100000000", GUEST)
    assert process.stdout is not None
    process.stdout.read(1000)
    process.stdout.close()
    assert process.wait(SECONDS) != 0


def test_reader_that_stalls_does_not_hold_up_the_end() -> None:
    """SIGTERM ends a machine whose output nobody reads."""
    process = command.spawn("--console", "stdio", *OPTIONS[:-1], "--append", "flood=100000000", GUEST)
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], SECONDS)[0]
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    process.stdout.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Path]:
    """A running guest whose console is at this socket; it is ended in order after the test."""
    path = tmp_path / "console"
    process = command.spawn("--console", f"unix:{path}", *OPTIONS)
    wait_for(path.exists)
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM, process.stderr and process.stderr.read()
    assert not path.exists()


def talk(path: Path, text: bytes) -> bytes:
    """Connect, send, and return what comes back, up to as many bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        client.sendall(text)
        return answer(client, len(text))


def answer(client: socket.socket, size: int) -> bytes:
    """The last `size` bytes of an echo, after what the guest says at its start."""
    data = b""
    while len(re.sub(rb"(?s)hvc: .*?\n", b"", data)) < size:
        piece = client.recv(4096)
        assert piece, data
        data += piece
    return data[-size:]


def test_unix_socket(serving: Path) -> None:
    """One client after the other talks to the guest; one that comes meanwhile waits for its turn."""
    assert talk(serving, b"first") == b"FIRST"
    with socket.socket(socket.AF_UNIX) as holder, socket.socket(socket.AF_UNIX) as waiter:
        for client in (holder, waiter):
            client.settimeout(SECONDS)
            client.connect(str(serving))
        waiter.sendall(b"waiter")
        holder.sendall(b"holder")
        assert answer(holder, 6) == b"HOLDER"
        assert not select.select([waiter], [], [], 0.2)[0]
        holder.close()
        assert answer(waiter, 6) == b"WAITER"


def test_unix_socket_in_use(serving: Path) -> None:
    """A second machine does not take the first one's socket away."""
    result = command.start("--console", f"unix:{serving}", *OPTIONS)
    assert result.returncode == 2 and "another process listens there" in result.stderr
    assert talk(serving, b"still here") == b"STILL HERE"


def test_pty_that_nobody_reads() -> None:
    """Output to an unread pty is swallowed, and the guest goes on; a program that opens it can type."""
    process = command.spawn("--console", "pty", *OPTIONS[:-1], "--append", "flood=3000", GUEST)
    assert process.stderr is not None
    match = re.search(rb"virtio console is (\S+)", process.stderr.readline())
    assert match is not None
    fd = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"q")
    assert process.wait(SECONDS) == DONE
    os.close(fd)


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("nowhere", "none of stdio"),
        ("file:", "none of stdio"),
        ("unix:/nonexistent/socket", "No such file"),
        ("file:/nonexistent/file", "No such file"),
        ("stdio,port=", "needs a name"),
        ("stdio,size=1", "none of port=..."),
    ],
)
def test_wrong_places(where: str, problem: str) -> None:
    """One clear line and status 2."""
    result = command.start("--console", where, *OPTIONS)
    assert result.returncode == 2 and problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
