"""`pykvm start` as a process: streams, serial ports, signals, hosts that cannot run it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import FLOOD, SECONDS, spawn, start
from guests import IMAGES

pytestmark = pytest.mark.usefixtures("images")

HELLO = IMAGES / "hello.bin"
ENDINGS = IMAGES / "endings.elf"
IN_LAB = os.environ.get("PYKVM_LAB") == "1"


@pytest.fixture
def flood(tmp_path: Path) -> Path:
    """A guest that prints for ever."""
    image = tmp_path / "flood.bin"
    image.write_bytes(FLOOD)
    return image


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """spawn(), with the guest at work when it returns (it has printed a byte); killed after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str | Path, read: int = 1, **options: Any) -> subprocess.Popen[bytes]:
        process = spawn(*arguments, **options)
        processes.append(process)
        if read and process.stdout is not None:
            assert process.stdout.read(read), process.stderr.read() if process.stderr else ""
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def no_orphan(process: subprocess.Popen[bytes]) -> bool:
    """Whether nothing is left of the process's group."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status, as a shell shows it; the end has to come soon, on a machine that is not the lab."""
    asked = time.monotonic()
    status = process.wait(SECONDS)
    # A second is what people wait; a vCPU that does not stop is given up after 5 s.
    assert IN_LAB or time.monotonic() - asked < 4.0
    assert no_orphan(process)
    return status if status >= 0 else 128 - status


# -- streams ---------------------------------------------------------------------------------------------------

ECHO = ["--debug-exit", str(IMAGES / "echo.elf")]


def test_piped_stdin() -> None:
    """All of a pipe reaches the guest, in order and without being asked for a terminal."""
    sent = "".join(f"line {number}\n" for number in range(300))
    done = start(*ECHO, input=sent + "\x04")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"echo: ready\n{sent}\necho: {len(sent)} bytes, by interrupt\n"


def test_a_pipe_does_not_escape() -> None:
    """Ctrl-A is data when stdin is no terminal."""
    done = start(*ECHO, input="\x01x\x01\x04")
    assert done.stdout == "echo: ready\n\x01x\x01\necho: 3 bytes, by interrupt\n"


def test_stdin_from_a_file(tmp_path: Path) -> None:
    """A regular file as stdin, which epoll refuses, is read as fast as the guest takes it."""
    source = tmp_path / "input"
    source.write_bytes(b"x" * 2000 + b"\x04")
    with source.open("rb") as stdin:
        done = start(*ECHO, stdin=stdin)
    assert done.stdout == f"echo: ready\n{'x' * 2000}\necho: 2000 bytes, by interrupt\n"


def test_end_of_stdin_is_no_end() -> None:
    """After the end of stdin, and with /dev/null, the guest just hears nothing more."""
    for options in ({"stdin": subprocess.DEVNULL}, {"input": "abc"}):
        done = start("--timeout", "1.5", *ECHO, **options)
        assert done.returncode == 124
        assert done.stdout == "echo: ready\n" + options.get("input", "")


def test_stdin_before_the_guest_listens() -> None:
    """What is sent long before the guest has set its serial port up is not lost."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"early\x04")
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stdin:
        assert start(*ECHO, stdin=stdin).stdout == "echo: ready\nearly\necho: 5 bytes, by interrupt\n"


def test_a_conversation(running: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Pipes are not buffered: each answer is there before the next question."""
    process = running(*ECHO, read=len("echo: ready\r\n"))
    assert process.stdin is not None and process.stdout is not None
    for word in (b"one", b"two", b"three"):
        process.stdin.write(word)
        process.stdin.flush()
        assert process.stdout.read(len(word)) == word
    process.stdin.write(b"\x04")
    process.stdin.flush()
    assert process.stdout.read() == b"\r\necho: 11 bytes, by interrupt\r\n"
    assert wait(process) == 1


def test_stdout_reader_that_goes(running: Callable[..., subprocess.Popen[bytes]], flood: Path) -> None:
    """`| head -c1`: the end of the reader ends the machine quietly, with SIGPIPE's status."""
    process = running("--mem", "1M", flood)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert wait(process) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_stdout_reader_that_stalls(running: Callable[..., subprocess.Popen[bytes]], flood: Path) -> None:
    """A reader that reads no more holds the guest up, but neither --timeout nor SIGTERM."""
    stalled = running("--mem", "1M", "--timeout", "1", flood, read=0)
    terminated = running("--mem", "1M", flood)
    assert stalled.wait(SECONDS) == 124
    terminated.send_signal(signal.SIGTERM)
    assert wait(terminated) == 128 + signal.SIGTERM


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_closed_streams(stream: str) -> None:
    """A standard stream that the caller closed is no error, and no other file takes its place."""
    number = {"stdin": 0, "stdout": 1, "stderr": 2}[stream]
    done = start(HELLO, preexec_fn=lambda: os.close(number))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if stream == "stdout" else "Hello from real mode\n")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--serial", "file:/dev/full"]])
def test_full_disk(arguments: list[str]) -> None:
    """Output that cannot be written is one line on stderr and a status that says so."""
    with Path("/dev/full").open("wb") as full:
        done = start(*arguments, HELLO, stdout=full)
    assert done.returncode == 4
    assert re.fullmatch(r"pykvm: (\S+: )?No space left on device\n", done.stderr)


# -- serial ports ----------------------------------------------------------------------------------------------


def two_ports(first: bytes, second: bytes) -> bytes:
    """A flat image that prints `first` on COM1 and `second` on COM2, then halts."""
    code = b""
    for port, text in ((0x3F8, first), (0x2F8, second)):
        code += b"\xba" + port.to_bytes(2, "little") + b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in text)
    return code + b"\xfa\xf4"


def test_two_serial_ports(tmp_path: Path) -> None:
    """Each --serial is the next port: the first to stdout, the second to a file, which is truncated."""
    image, log = tmp_path / "image.bin", tmp_path / "com2.log"
    image.write_bytes(two_ports(b"one", b"two"))
    log.write_text("old contents")
    done = start("--serial", "stdio", "--serial", f"file:{log}", image)
    assert (done.returncode, done.stdout, log.read_text()) == (0, "one", "two")
    done = start("--serial", f"file:{log}", "--serial", "stdio", image)
    assert (done.stdout, log.read_text()) == ("two", "one")
    done = start("--serial", "none", "--serial", "none", image)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = start("--json", "--serial", "none", "--serial", "stdio", image)
    assert json.loads(done.stdout)["console"] == "onetwo"


def test_serial_pty(running: Callable[..., subprocess.Popen[bytes]]) -> None:
    """--serial pty names a terminal on stderr that talks to the guest, for one program after the other."""
    process = running("--serial", "pty", *ECHO, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    said = process.stderr.readline().decode()
    match = re.fullmatch(r"pykvm: COM1 is (/dev/pts/\d+)\n", said)
    assert match, said
    for word in (b"first", b"second"):
        fd = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
        try:
            os.write(fd, word)
            seen = b""
            while word not in seen:
                seen += os.read(fd, 100)
        finally:
            os.close(fd)
    fd = os.open(match[1], os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, b"\x04")
        assert wait(process) == 1
    finally:
        os.close(fd)


def test_a_pty_that_nobody_reads(tmp_path: Path) -> None:
    """Output to a pty without a reader is lost, as on a cable: it does not hold the guest up."""
    # mov $0x3f8, %dx; mov $'x', %al; mov $60000, %cx; 1: out %al, %dx; loop 1b; cli; hlt
    image = tmp_path / "image.bin"
    image.write_bytes(bytes.fromhex("baf803 b078 b960ea ee e2fd faf4"))
    done = start("--serial", "pty", "--stats", image)
    assert done.returncode == 0
    assert re.search(r"^  0x3f8 +0 +60000 ", done.stderr, re.MULTILINE)  # a pty holds 4 KiB, the ring in C 16 KiB


# -- signals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["spin", "halt-if"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it(number: signal.Signals, ending: str, running: Callable[..., subprocess.Popen[bytes]]) -> None:
    """SIGTERM, SIGINT and SIGHUP end a running machine soon, with 128 + N and nothing left behind."""
    process = running("--append", f"ending={ending}", ENDINGS, read=len(f"ending: {ending}\r\n"))
    process.send_signal(number)
    assert wait(process) == 128 + number
    assert process.stderr is not None and process.stderr.read() == b""


def test_signals_in_a_row(running: Callable[..., subprocess.Popen[bytes]], flood: Path) -> None:
    """A second signal does not cut the tidying up short."""
    process = running("--cpus", "4", "--mem", "1M", flood)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
    assert wait(process) in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
    assert process.stderr is not None and process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number: signal.Signals, running: Callable[..., subprocess.Popen[bytes]]) -> None:
    """What the caller ignores (nohup, a shell's &) does not end the machine."""

    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    process = running(*ECHO, read=len("echo: ready\r\n"), preexec_fn=ignore)
    process.send_signal(number)
    assert process.stdin is not None
    process.stdin.write(b"still here\x04")
    process.stdin.flush()
    assert process.stdout is not None and process.stdout.read().startswith(b"still here")
    assert wait(process) == 1


def test_a_signal_before_the_guest_runs(tmp_path: Path) -> None:
    """SIGTERM at any moment of the start leaves no traceback."""
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        process = spawn("--append", "ending=spin", ENDINGS)
        time.sleep(delay * (20 if IN_LAB else 1))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM), errors.decode()
        assert errors == b""


def test_a_signal_as_soon_as_the_guest_runs(running: Callable[..., subprocess.Popen[bytes]], flood: Path) -> None:
    """SIGTERM in the moment when the main thread begins to wait is heard as well."""
    for _ in range(12):
        process = running("--mem", "1M", flood)
        process.send_signal(signal.SIGTERM)
        assert wait(process) == 128 + signal.SIGTERM


# -- hosts that cannot -----------------------------------------------------------------------------------------

namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode,
    reason="mount namespaces are not allowed here",
)


def in_namespace(prepare: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`pykvm start ARGUMENT...` in a mount namespace that the shell command `prepare` has changed."""
    from command import COMMAND, environment

    script = f'{prepare} && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *COMMAND, "start", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)


@namespaces
@pytest.mark.parametrize(
    ("prepare", "advice"),
    [
        ("mount -t tmpfs none /dev", r"does not exist: enable virtualisation .* load kvm_intel or kvm_amd"),
        ("mount --bind /dev/null /dev/kvm", r"is not a KVM device"),
        ("mount --bind /etc/hostname /dev/kvm", r"is not a KVM device"),
    ],
    ids=["absent", "null", "file"],
)
def test_no_kvm(prepare: str, advice: str) -> None:
    """Without a usable /dev/kvm the status is 4, and one line says what to do."""
    done = in_namespace(prepare, HELLO)
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    assert re.fullmatch(rf"pykvm: /dev/kvm {advice}.*\n", done.stderr), done.stderr


def test_no_permission(tmp_path: Path) -> None:
    """A /dev/kvm that this user may not open is status 4, with the group and the udev rule."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to become somebody else")
    if os.stat("/dev/kvm").st_mode & 0o006 or os.stat("/dev/kvm").st_gid == 65534:
        pytest.skip("everybody may open this host's /dev/kvm")
    from command import COMMAND, environment

    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *COMMAND, "start", str(HELLO)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False, cwd="/"
    )
    if "No module named" in done.stderr or "failed to execute" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        r"pykvm: no permission to open /dev/kvm: run `sudo usermod -aG kvm \$USER`.*udev.*\n", done.stderr
    )


def test_too_little_address_space() -> None:
    """RAM that the host does not give is one line, no traceback."""
    limit = 1 << 30

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = start("--mem", "2G", HELLO, preexec_fn=restrict)
    assert done.returncode in (2, 4)
    assert re.fullmatch(r"pykvm: memory: cannot map 2048 MiB.*\n", done.stderr)


def test_too_few_file_descriptors() -> None:
    """Whatever the limit of open files, the answer is one line or a run, never a traceback."""
    for limit in range(6, 14):  # Python itself needs some to start
        done = start(
            "--mem", "1M", HELLO, preexec_fn=lambda n=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
        )
        if done.returncode == 0:
            assert done.stdout == "Hello from real mode\n"
            break
        assert (done.returncode, done.stdout) == (4, ""), (limit, done.stderr)
        assert re.fullmatch(r"pykvm: .*[Tt]oo many open files.*\n", done.stderr), (limit, done.stderr)
    else:
        pytest.fail("13 descriptors are not enough")
