"""Whatever is wrong with options or files: status 2, one line on stderr that names it, no traceback, no hang.

Runs `pykvm.cli.main.main` in this process, so that hundreds of cases take seconds.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import start
from guests import IMAGES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm import log
from pykvm.cli.main import main
from pykvm.cli.options import Option
from pykvm.cli.start import OPTIONS

pytestmark = pytest.mark.usefixtures("images")

HELLO = str(IMAGES / "hello.bin")
MULTIBOOT = str(IMAGES / "multiboot.elf")
IN_LAB = os.environ.get("PYKVM_LAB") == "1"
MORE = int(os.environ.get("PYKVM_FUZZ", "0"))  # that many other examples, to search for longer
STATUSES = {0, 2, 4, 6, 124}  # and odd ones, with --debug-exit
FUZZ = settings(
    max_examples=MORE or (40 if IN_LAB else 150),
    deadline=None,
    derandomize=not MORE,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """call(ARGUMENT...) runs `pykvm start ARGUMENT...` here: (status, stdout, stderr)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["start", *arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    yield run
    log.configure()
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def is_one_line(errors: str) -> bool:
    """Whether `errors` is a single printable line of ours."""
    return errors.startswith("pykvm: ") and errors.endswith("\n") and errors[:-1].isprintable()


# An option that makes a device, and what its message names.
WRONG_DEVICES = (
    ("--disk ,ro", "no file given"),
    ("--disk /nonexistent", "/nonexistent: No such file"),
    ("--disk /", "a directory is no disk"),
    ("--disk /dev/null", "a character device is no disk"),
    (f"--disk {HELLO}", "hold no sector"),
    (f"--disk {MULTIBOOT},rw", "'rw' is none of"),
    (f"--disk {MULTIBOOT},ro,ro", "ro is given twice"),
    (f"--disk {MULTIBOOT},ro,overlay", "overlay"),
    (f"--disk {MULTIBOOT},ro,queues=17", "17 queues"),
    (f"--disk {MULTIBOOT},ro,rate=0", "rate: '0'"),
    (f"--disk {MULTIBOOT},ro,iops=x", "iops: 'x'"),
    (f"--disk {MULTIBOOT},format=foo", "format=foo"),
    ("--net ", "--net: ''"),
    ("--net bridge", "--net: 'bridge'"),
    ("--net user,ifname=x", "'ifname=x' is none of"),
    ("--net user,hostfwd=x", "hostfwd: 'x'"),
    ("--net user,hostfwd=tcp::99999-:22", "99999"),
    ("--net tap,ifname=a_name_that_is_too_long", "ifname"),
    ("--net tap,fd=x", "fd: 'x'"),
    ("--net tap,fd=99", "fd 99"),
    ("--net tap,ifname=x,fd=3", "either"),
    ("--console ", "--console: ''"),
    ("--console tcp:1", "'tcp:1'"),
    ("--console file:/", "file:/"),
    ("--console unix:/nonexistent/x", "/nonexistent/x"),
    ("--console unix:/", "no socket"),
    ("--console none,port=", "port="),
    ("--balloon=huge", "'huge'"),
    ("--balloon=size=x", "balloon: 'x'"),
    ("--balloon=size=1T", "balloon: 1099511627776"),
    ("--balloon=size=1M,size=2M", "size is given twice in 'size=1M,size=2M'"),
    ("--rng=rate=0", "rate: '0'"),
    ("--rng=fast", "'fast'"),
    ("--vsock ", "--vsock: ''"),
    ("--vsock 3", "--vsock: '3'"),
    ("--vsock 3:", "'3:'"),
    ("--vsock 2:sock", "CID 2"),
    ("--vsock 3:/nonexistent/x", "/nonexistent/x"),
    ("--vsock 3:/", "no socket"),
    ("--pmem ,ro", "no file given"),
    ("--pmem /nonexistent", "/nonexistent: No such file"),
    ("--pmem /", "a directory is no pmem"),
    (f"--pmem {HELLO}", "no multiple of 2 MiB"),
    ("--pmem /dev/null", "character device"),
    (f"--pmem {HELLO},rw", "'rw' is none of"),
    ("--share ", "no folder given"),
    ("--share /nonexistent", "/nonexistent"),
    (f"--share {HELLO}", HELLO),
    ("--share .,rw", "'rw' is none of"),
    ("--share .,cache=x", "cache=x"),
    (f"--share .:{'t' * 40}", "36 bytes"),
)


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "kernel"),
        ([""], "cannot open"),
        (["--mem", "x", HELLO], "memory: 'x'"),
        (["--mem", "", HELLO], "memory"),
        (["--mem", "0", HELLO], "memory"),
        (["--mem", "-5M", HELLO], "memory"),
        (["--mem", "4K", HELLO], "memory"),
        (["--mem", "1025G", HELLO], "memory"),
        (["--mem", "9" * 400, HELLO], "memory"),
        (["--mem", "nan", HELLO], "memory"),
        (["--mem", "inf", HELLO], "memory"),
        (["--mem", "1e999", HELLO], "memory"),
        (["--mem", "512Q", HELLO], "memory"),
        (["--cpus", "0", HELLO], "cpus: 0"),
        (["--cpus", "-1", HELLO], "cpus: -1"),
        (["--cpus", "65", HELLO], "cpus: 65"),
        (["--cpus", "two", HELLO], "cpus: 'two'"),
        (["--cpus", "1.5", HELLO], "cpus"),
        (["--cpus", "9" * 5000, HELLO], "cpus"),
        (["--cpus", "2", "--irqchip", "none", HELLO], "--irqchip"),
        (["--irqchip", "foo", HELLO], "irqchip: 'foo'"),
        (["--mode", "foo", HELLO], "mode: 'foo'"),
        (["--mode", "long", "--entry", "zz", HELLO], "'zz'"),
        (["--mode", "long", "--entry", "-1", HELLO], "-1"),
        (["--mode", "long", "--entry", "0x10000000000000000", HELLO], "64-bit"),
        (["--mode", "real", "--entry", "0x10000", HELLO], "IP"),
        (["--load-addr", "0x1000", HELLO], "load-addr"),
        (["--mode", "long", "--load-addr", "0xfffffffffffffff0", HELLO], "RAM"),
        (["--mode", "long", "--load-addr", "0xfff0000", "--mem", "16M", HELLO], "RAM"),
        (["--mode", "real", "--load-addr", "0x100000", HELLO], "segment"),
        (["--mode", "real", "--load-addr", "0x1001", HELLO], "segment"),
        (["--timeout", "-1", HELLO], "timeout: '-1'"),
        (["--timeout", "x", HELLO], "timeout"),
        (["--timeout", "nan", HELLO], "timeout"),
        (["--timeout", "1e10", HELLO], "timeout"),
        (["--serial", "tcp:1", HELLO], "'tcp:1'"),
        (["--serial", "stdio", "--serial", "stdio", HELLO], "stdio"),
        (["--serial", "none"] * 5 + [HELLO], "four"),
        (["--serial", "file:/nonexistent/x", HELLO], "/nonexistent/x"),
        (["--serial", "file:/", HELLO], "file:/"),
        (["--serial", "file:", HELLO], "file:"),
        (["--log-level", "loud", HELLO], "log-level: 'loud'"),
        (["--cpu-feature", "avx2", HELLO], "+avx2"),
        (["--cpu-feature", "+no-such", HELLO], "'no-such'"),
        (["--cpu-feature", "+", HELLO], "cpu-feature"),
        (["--cpu-feature", "-cx16,no", HELLO], "+no"),
        (["--bios", HELLO, "--mode", "real"], "--mode"),
        (["--bios", HELLO, "--module", HELLO], "--module"),
        (["--debug-exit=1", HELLO], "--debug-exit"),
        (["--no-such", HELLO], "--no-such"),
        (["--meme", "5M", HELLO], "--mem"),
        (["-m", "5M", HELLO], "-m"),
        ([HELLO, "--mem"], "--mem SIZE"),
        ([HELLO, HELLO], HELLO),
        (["--", HELLO, "--mem"], "--mem"),
        (["--append", "x", HELLO], "command line"),
        (["--module", HELLO, HELLO], "modules"),
        (["--append", "a" * 70_000, str(IMAGES / "pvh.elf")], "70000"),
        (["--irqchip", "none", "--rng", HELLO], "virtio-rng"),
        (["--log-level", "error", *["--disk", f"{MULTIBOOT},ro"] * 40, HELLO], "16 virtio devices"),
        *(([*words.split(" ", 1), HELLO], named) for words, named in WRONG_DEVICES),
    ],
)
def test_wrong_options(arguments: list[str], named: str, call: Call) -> None:
    """The line names the option or value that is wrong."""
    status, output, errors = call(*arguments)
    assert (status, output) == (2, "")
    assert is_one_line(errors), errors
    assert named in errors


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that does not exist is named, with those that do."""
    assert main(["sta\nrt"]) == 2
    errors = capsys.readouterr().err
    assert is_one_line(errors) and "the commands are start, " in errors


@pytest.mark.parametrize("limit", range(10, 46, 5))
def test_few_file_descriptors(limit: int, tmp_path: Path) -> None:
    """Wherever file descriptors run out, a line says so, and no socket is left."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    devices = ["--disk", f"{image},thread", "--balloon", "--rng", "--vsock", f"3:{tmp_path}/v"]
    devices += ["--console", f"unix:{tmp_path}/c,port=c"]
    done = start(*devices, HELLO, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    assert done.returncode in ({0, 4} if limit > 10 else {4}), done
    if done.returncode:
        assert is_one_line(done.stderr) and "ulimit -n" in done.stderr, done
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


# -- files -----------------------------------------------------------------------------------------------------


def elf_header(machine: int = 62, kind: int = 2, bits: int = 64) -> bytes:
    """An ELF64 header without program headers."""
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0x100000, 64, 0, 0, 64, 56, 0, 0, 0, 0)


FILES = {
    "empty": b"",
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "script": b"#!/bin/sh\n",
    "qcow2": b"QFI\xfb" + bytes(600),
    "half a magic": b"\x7fELF",
    "elf without segments": elf_header(),
    "elf for arm": elf_header(machine=183),
    "object file": elf_header(kind=1),
    "elf cut short": (IMAGES / "pvh.elf").read_bytes()[:100] if (IMAGES / "pvh.elf").exists() else b"\x7fELF",
    "bzimage cut short": bytes(0x1FE) + b"\x55\xaa\xeb\x66HdrS" + bytes(20),
    "zeroed bzimage": bytes(0x1FE) + b"\x55\xaa\xeb\x66HdrS" + bytes(4000),
}


@pytest.mark.parametrize("name", FILES)
def test_no_kernel(name: str, call: Call, tmp_path: Path) -> None:
    """A file that is no kernel is refused by its name, with the reason."""
    path = tmp_path / name
    path.write_bytes(FILES[name])
    status, _, errors = call(str(path))
    assert status == 2
    assert is_one_line(errors) and str(path) in errors, errors


@pytest.mark.parametrize("option", ["kernel", "initrd", "module", "bios"])
@pytest.mark.parametrize("kind", ["absent", "directory", "fifo", "device", "loop", "below a file"])
def test_no_regular_file(kind: str, option: str, call: Call, tmp_path: Path) -> None:
    """Whatever is in the place of a file: it is named, and nothing waits for it."""
    path = tmp_path / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "below a file":
        path = Path(HELLO, "x")
    arguments = {"kernel": [str(path)], "bios": ["--bios", str(path)]}.get(
        option, [f"--{option}", str(path), MULTIBOOT]
    )
    status, _, errors = call(*arguments)
    assert status == 2
    assert is_one_line(errors) and str(path) in errors, errors


def test_hostile_file_name(call: Call) -> None:
    """Line breaks and escape sequences in a file's name do not reach the terminal."""
    status, _, errors = call("no\nsuch\x1b[31m file\r")
    assert status == 2
    assert errors == "pykvm: no\\nsuch\\x1b[31m file\\r: cannot open: No such file or directory\n"


def test_arguments_that_are_no_text() -> None:
    """Bytes that are no UTF-8 reach the guest unchanged, and a message escaped."""
    done = start(b"no\xffsuch")
    assert (done.returncode, done.stderr) == (2, "pykvm: no\\udcffsuch: cannot open: No such file or directory\n")
    done = start("--debug-exit", "--append", b"x\xff\xc3\xa4", "--serial", "file:/dev/stdout", MULTIBOOT)
    assert done.returncode == 1, done.stderr
    assert "x\ufffd\u00e4" in done.stdout


@pytest.mark.parametrize("what", ["kernel", "initrd", "module"])
def test_too_large_for_memory(what: str, call: Call, tmp_path: Path) -> None:
    """An image that does not fit into the guest's memory is named."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(20 << 20)
    arguments = [str(path), "--mode", "long"] if what == "kernel" else [f"--{what}", str(path), MULTIBOOT]
    status, _, errors = call("--mem", "8M", *arguments)
    assert status == 2
    assert is_one_line(errors) and str(path) in errors, errors


def test_a_file_that_is_no_kernel_at_all(call: Call, tmp_path: Path) -> None:
    """An image of more than 4 GiB is refused before it is read."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(5 << 30)
    status, _, errors = call(str(path))
    assert status == 2
    assert "too large" in errors


# -- fuzzing ---------------------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
BAD = ("", "x", "-1", "9" * 30, "/", "/dev/null", "file:/")
GOOD = {  # values of each option that make sense, though perhaps not together
    "--mem": ("1M", "2M", "64M", "3G", "5G", "64", "2.5M"),
    "--cpus": ("1", "2", "3", "0x2"),
    "--append": ("", "ending=halt", "x" * 5000, "\xff"),
    "--bios": (HELLO,),
    "--initrd": (HELLO, MULTIBOOT),
    "--module": (HELLO, f"{MULTIBOOT}:a b"),
    "--mode": ("real", "protected", "long"),
    "--entry": ("0", "0x10", "0x100000"),
    "--load-addr": ("0", "0x7c00", "0x100000"),
    "--irqchip": ("kernel", "split", "none"),
    "--cpu-feature": ("+avx2", "-cx16", "-lm,+sse"),
    "--serial": ("stdio", "none", "pty", "file:out"),
    "--timeout": ("0", "0.001"),
    "--coverage": ("blocks", "blocks.info"),
    "--gdb": ("0", "127.0.0.1:0", "unix:gdb"),
    "--gdb-arch": ("16", "64", "auto"),
    "--disk": (f"{HELLO},ro", f"{MULTIBOOT},ro,id=x"),
    "--net": ("tap,fd=99",),
    "--console": ("none", "file:out", "stdio", "none,port=x"),
    "--balloon": ("size=16M", "no-reporting"),
    "--rng": ("rate=1000",),
    "--vsock": ("3:sock",),
    "--share": ("/nonexistent", ".,cache=x"),  # a real one starts a process each time
    "--pmem": (f"{HELLO},ro", f"{MULTIBOOT},ro"),
    "--save": ("saved",),
    "--trace": ("traced",),
    "--log-level": tuple(log.LEVELS),
}


def an_option(option: Option) -> st.SearchStrategy[list[str]]:
    """The option with a value, mostly one that makes sense."""
    if not option.metavar:
        return st.just([option.name])
    good = st.sampled_from(GOOD[option.name])
    value = st.integers(0, 19).flatmap(lambda n: ANY if n == 18 else st.sampled_from(BAD) if n == 19 else good)
    return st.one_of(value.map(lambda text: [option.name, text]), value.map(lambda text: [f"{option.name}={text}"]))


WORDS = st.one_of(st.sampled_from(["--", "-", "--no-such", "--mem"]), ANY).map(lambda word: [word])
ARGUMENTS = st.tuples(
    st.lists(st.one_of([an_option(option) for option in OPTIONS]), max_size=5),
    st.integers(0, 9).flatmap(lambda n: st.just([]) if n else st.lists(WORDS, max_size=2)),
    st.sampled_from([[[HELLO]], [[MULTIBOOT]], [[MULTIBOOT]], [[MULTIBOOT]], []]),
).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


@FUZZ
@given(arguments=ARGUMENTS)
def test_fuzzed_options(call: Call, arguments: list[list[str]]) -> None:
    """No list of options gives a traceback or hangs."""
    words = [word for group in arguments for word in group]
    status, _, errors = call(*words, *(["--timeout", "0.02"] if "--" not in words else []))
    assert status in STATUSES or status & 1, (words, status)
    if status in (2, 4):
        # a pty is named before the rest is looked at, and debug logs may come first
        assert errors.splitlines()[-1].startswith("pykvm: ")
    assert "Traceback" not in errors


SEEDS = (
    "hello.bin",
    "hello64.elf",
    "multiboot.elf",
    "multiboot2.elf",
    "multiboot_kludge.bin",
    "pvh.elf",
    "endings.elf",
)
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


@FUZZ
@given(
    seed=st.sampled_from(SEEDS),
    chance=st.randoms(use_true_random=False),
    cut=st.one_of(st.none(), st.integers(0, 5000)),
    changes=st.integers(0, 12),
    flat=st.sampled_from([(), ("--mode", "real"), ("--mode", "protected"), ("--mode", "long")]),
)
def test_fuzzed_images(
    call: Call,
    tmp_path: Path,
    seed: str,
    chance: random.Random,
    cut: int | None,
    changes: int,
    flat: tuple[str, ...],
) -> None:
    """Damaged images are refused, or run into whatever end they find; never a traceback, never a hang."""
    image = bytearray((IMAGES / seed).read_bytes()[:cut])
    for _ in range(changes if image else 0):
        # mostly in the headers
        at = chance.randrange(min(len(image), 600 if chance.random() < 0.8 else len(image)))
        width = chance.choice((1, 1, 2, 4, 8))
        image[at : at + width] = bytes(chance.choice((*INTERESTING, chance.randrange(256))) for _ in range(width))
    path = tmp_path / "image"
    path.write_bytes(image)
    status, _, errors = call("--debug-exit", "--timeout", "0.02", "--mem", "16M", *flat, str(path))
    assert status in STATUSES or status & 1, status
    assert "Traceback" not in errors
    if status == 2:
        assert is_one_line(errors), errors


@FUZZ
@given(code=st.binary(min_size=1, max_size=200), mode=st.sampled_from(["real", "protected", "long"]))
def test_random_code(call: Call, tmp_path: Path, code: bytes, mode: str) -> None:
    """Random bytes as code end in some orderly way."""
    path = tmp_path / "image"
    path.write_bytes(code)
    status, _, errors = call("--debug-exit", "--timeout", "0.02", "--mem", "2M", "--mode", mode, str(path))
    assert status in (0, 6, 124) or status & 1, (status, errors)
    assert "Traceback" not in errors
