"""`pykvm start` on a terminal: raw mode, the escape key, and a terminal that is restored whatever happens."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from command import COMMAND, FLOOD, environment
from guests import IMAGES

pytestmark = pytest.mark.usefixtures("images")

Console = pexpect.spawn  # of bytes
ENDINGS = str(IMAGES / "endings.elf")
ECHO = str(IMAGES / "echo.elf")
EXPECT_S = 60  # for one expectation
CTRL_A, CTRL_D = b"\x01", b"\x04"
READY = rb"echo: ready\r+\n"  # the guest sends CR LF, and the terminal makes CR LF of an LF

# The flags that raw mode clears, by the index of tcgetattr's list
RAW = {0: termios.ICRNL | termios.IXON, 3: termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN}


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., Console]]:
    """on_terminal(ARGUMENT...) runs `pykvm start ARGUMENT...` on a terminal of its own; killed after the test."""
    running: list[Console] = []

    def begin(*arguments: str | Path, command: list[str] | None = None) -> Console:
        words = [*(command or [*COMMAND, "start"]), *map(str, arguments)]
        console = pexpect.spawn(
            words[0], words[1:], env=environment(), timeout=EXPECT_S, echo=True, dimensions=(24, 80)
        )
        console.delaybeforesend = None
        console.cooked = termios.tcgetattr(console.child_fd)  # a pty's two ends share their settings
        running.append(console)
        return console

    yield begin
    for console in running:
        console.close(force=True)


def is_raw(console: Console) -> bool:
    """Whether keys reach the program at once and unchanged."""
    mode = termios.tcgetattr(console.child_fd)
    return not any(mode[index] & flags for index, flags in RAW.items())


def end(console: Console) -> tuple[int, str]:
    """Wait for the end: (exit status, what was printed since). The terminal is as it was before."""
    console.expect(pexpect.EOF)
    output = console.before.decode()
    restored = termios.tcgetattr(console.child_fd)
    console.wait()
    assert restored == console.cooked
    assert "Traceback" not in output, output
    status = console.exitstatus if console.signalstatus is None else 128 + console.signalstatus
    return status, output


def test_raw_while_running(on_terminal: Callable[..., Console]) -> None:
    """The terminal is raw while the guest runs, keeps newline translation of the output, and is restored at the end."""
    console = on_terminal("--debug-exit", ECHO)
    console.expect_exact("echo: ready")
    assert is_raw(console)
    assert termios.tcgetattr(console.child_fd)[1] & termios.OPOST
    console.send(CTRL_D)
    status, output = end(console)
    assert status == 1
    assert "echo: 0 bytes" in output


def test_keys_reach_the_guest_one_by_one(on_terminal: Callable[..., Console]) -> None:
    """Each key comes back as the guest's echo before the next one: no line buffer, no echo of the terminal's own."""
    console = on_terminal("--debug-exit", ECHO)
    console.expect(READY)
    # Ctrl-C, Ctrl-Z, Ctrl-\, Ctrl-S, Ctrl-Q and CR are keys like any other
    for key in (b"a", b"\x03", b"\x1a", b"\x1c", b"\x13", b"\x11", b"\x7f", b"\xc3\xa4", b"\t", b"z"):
        console.send(key)
        console.expect_exact(key)
    console.send(b"\r")
    console.expect(rb"\r+\n")
    console.send(CTRL_D)
    status, output = end(console)
    assert status == 1
    assert "echo: 12 bytes, by interrupt" in output


def test_ctrl_a_x(on_terminal: Callable[..., Console]) -> None:
    """Ctrl-A x ends the machine, with status 0."""
    console = on_terminal("--append", "ending=spin", ENDINGS)
    console.expect_exact("ending: spin")
    console.send(CTRL_A + b"x")
    assert end(console)[0] == 0


def test_ctrl_a_c(on_terminal: Callable[..., Console]) -> None:
    """Ctrl-A c shows the menu, and so does any key that has no meaning; the guest gets neither."""
    console = on_terminal("--debug-exit", ECHO)
    console.expect(READY)
    for key in (b"c", b"?"):
        console.send(CTRL_A + key)
        console.expect_exact("pykvm:")
        for line in ("Ctrl-A x", "Ctrl-A c", "Ctrl-A s", "Ctrl-A Ctrl-A"):
            console.expect_exact(line)
    console.send(b"k" + CTRL_D)
    status, output = end(console)
    assert (status, "echo: 1 bytes" in output) == (1, True)


def test_ctrl_a_ctrl_a(on_terminal: Callable[..., Console]) -> None:
    """Ctrl-A Ctrl-A is one Ctrl-A for the guest, also when the keys come one by one."""
    console = on_terminal("--debug-exit", ECHO)
    console.expect(READY)
    console.send(CTRL_A)
    console.send(CTRL_A)
    console.expect_exact(CTRL_A)
    console.send(CTRL_A + CTRL_A + b"x")
    console.expect_exact(CTRL_A + b"x")
    console.send(CTRL_D)
    status, output = end(console)
    assert (status, "echo: 3 bytes" in output) == (1, True)


def test_ctrl_a_s(on_terminal: Callable[..., Console]) -> None:
    """Ctrl-A s shows the exits of the running guest."""
    console = on_terminal("--stats", "--append", "ending=spin", ENDINGS)
    console.expect_exact("ending: spin")
    console.send(CTRL_A + b"s")
    console.expect_exact("exits by reason\r")
    console.expect(re.compile(rb"IO +\d+"))
    console.expect_exact("0x3f8")
    console.send(CTRL_A + b"x")
    assert end(console)[0] == 0


def test_ctrl_a_b_and_p(on_terminal: Callable[..., Console]) -> None:
    """A break and the power button reach the devices, and the guest that expects neither runs on."""
    console = on_terminal("--debug-exit", ECHO)
    console.expect(READY)
    console.send(CTRL_A + b"p" + CTRL_A + b"b")
    console.send(b"on" + CTRL_D)
    status, output = end(console)
    assert status == 1
    assert "echo: 3 bytes" in output  # a break is a character of zeros


@pytest.mark.parametrize(
    ("ending", "status"), [("triple-fault", 6), ("crash", 6), ("power-off", 0), ("debug-exit code=3", 7), ("halt", 0)]
)
def test_restored_after_the_guests_end(ending: str, status: int, on_terminal: Callable[..., Console]) -> None:
    """However the guest ends, the terminal is restored; a report's lines start at the left margin."""
    console = on_terminal("--debug-exit", "--append", f"ending={ending}", ENDINGS)
    console.expect_exact(f"ending: {ending.split(maxsplit=1)[0]}\r")
    ended, output = end(console)
    assert ended == status
    assert ("vCPU 0:" in output) == (status == 6)
    if status == 6:
        assert re.search(r"\r\nRegisters\r\n", output)


def test_restored_after_a_timeout(on_terminal: Callable[..., Console]) -> None:
    """A timeout restores the terminal."""
    console = on_terminal("--timeout", "0.5", "--append", "ending=spin", ENDINGS)
    assert end(console)[0] == 124


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_restored_after_a_signal(number: signal.Signals, on_terminal: Callable[..., Console]) -> None:
    """A signal restores the terminal, also when it comes several times."""
    console = on_terminal("--append", "ending=spin", ENDINGS)
    console.expect_exact("ending: spin")
    assert is_raw(console)
    for _ in range(3):
        console.kill(number)
    assert end(console)[0] == 128 + number


def test_restored_after_a_signal_while_the_terminal_stalls(tmp_path: Path, on_terminal: Callable[..., Console]) -> None:
    """A terminal that shows nothing more (Ctrl-S, a dead connection) does not keep a signal from ending pykvm."""
    image = tmp_path / "flood.bin"
    image.write_bytes(FLOOD)
    console = on_terminal("--mem", "1M", image)
    console.expect_exact("xxxx")  # from here on nothing is read: the pty fills up
    assert is_raw(console)
    console.kill(signal.SIGTERM)
    assert end(console)[0] == 128 + signal.SIGTERM


# A `pykvm start` in which something that must not fail does
BROKEN = """
import sys
from pykvm.cli import start
from pykvm.cli.main import entry
from pykvm.devices.debugexit import DebugExit

def fail(*arguments):
    raise RuntimeError("on purpose")

{break_it}
entry()
"""


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        ("DebugExit.write = fail", 4),  # a device, on the vCPU's thread
        ("start._wait = fail", 1),  # the main thread, while the guest runs
        ("start._wait = lambda *arguments: sys.exit(3)", 3),
    ],
    ids=["device", "main", "exit"],
)
def test_restored_after_an_exception(
    break_it: str, expected: int, tmp_path: Path, on_terminal: Callable[..., Console]
) -> None:
    """An exception in a device or in pykvm itself restores the terminal first."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(break_it=break_it))
    command = [sys.executable, str(script), "start"]
    console = on_terminal("--debug-exit", "--append", "ending=debug-exit", ENDINGS, command=command)
    console.expect(pexpect.EOF)
    assert termios.tcgetattr(console.child_fd) == console.cooked
    console.wait()
    assert console.exitstatus == expected, console.before
    assert ("Traceback" in console.before.decode()) == (expected == 1)


def test_an_error_before_the_start_leaves_the_terminal_alone(on_terminal: Callable[..., Console]) -> None:
    """Wrong usage on a terminal is one line."""
    console = on_terminal("/nonexistent")
    status, output = end(console)
    assert (status, output) == (2, "pykvm: /nonexistent: cannot open: No such file or directory\r\n")


def test_no_raw_mode_without_stdio(on_terminal: Callable[..., Console]) -> None:
    """With --serial none the terminal stays as it is, so Ctrl-C ends pykvm."""
    console = on_terminal("--stats", "--serial", "none", "--timeout", "60", "--append", "ending=spin", ENDINGS)
    # nothing is printed: wait for the threads of the machine
    while len(os.listdir(f"/proc/{console.pid}/task")) < 3:
        assert console.isalive()
    assert not is_raw(console)
    console.send(b"\x03")
    status, _ = end(console)
    assert status == 128 + signal.SIGINT


def test_output_to_a_pipe_input_from_the_terminal(on_terminal: Callable[..., Console], tmp_path: Path) -> None:
    """`pykvm start ... | tee`: stdin is a terminal, stdout is none; keys still work, and the menu goes to stdout."""
    output = tmp_path / "output"
    script = f'exec "$@" > {output}'
    command = ["sh", "-c", script, "sh", *COMMAND, "start"]
    console = on_terminal("--debug-exit", ECHO, command=command)
    while not output.exists() or b"ready" not in output.read_bytes():
        assert console.isalive()
    assert is_raw(console)
    console.send(b"hi" + CTRL_D)
    assert end(console)[0] == 1
    assert b"hi\r\necho: 2 bytes" in output.read_bytes()


def test_the_terminals_size_stays(on_terminal: Callable[..., Console]) -> None:
    """Nothing but the line discipline is changed: the window's size stays."""
    console = on_terminal("--append", "ending=spin", ENDINGS)
    console.expect_exact("ending: spin")
    size = os.get_terminal_size(console.child_fd)
    console.send(CTRL_A + b"x")
    assert end(console)[0] == 0
    assert os.get_terminal_size(console.child_fd) == size == (80, 24)
