"""`pykvm start` as a process: exit statuses, options, what it reports."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import pytest
from command import run, start
from guests import IMAGES

pytestmark = pytest.mark.usefixtures("images")

HELLO = IMAGES / "hello.bin"
ENDINGS = IMAGES / "endings.elf"


# -- exit statuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("debug-exit", 1),
        ("debug-exit code=42", 85),
        ("debug-exit code=255", 255),
        ("power-off", 0),
        ("cf9", 0),
        ("halt", 0),
        ("exception", 255),
        ("triple-fault", 6),
        ("crash", 6),
        ("pvpanic", 6),
    ],
)
def test_status_of_an_ending(ending: str, status: int) -> None:
    """The guest's end decides the exit status; its console goes to stdout, a crash report to stderr."""
    done = start("--debug-exit", "--append", f"ending={ending}", ENDINGS)
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith(f"ending: {ending.split(maxsplit=1)[0]}\n")
    assert ("vCPU 0: " in done.stderr) == (status == 6)
    assert "Traceback" not in done.stderr


def test_status_of_a_timeout() -> None:
    """--timeout ends a guest that would run for ever with 124, and one line says why."""
    done = start("--timeout", "0.3", "--append", "ending=spin", ENDINGS)
    assert (done.returncode, done.stdout) == (124, "ending: spin\n")
    assert done.stderr == "pykvm: TIMEOUT: after 0.3 s\n"


def test_no_debug_exit_unless_asked_for() -> None:
    """Without --debug-exit the port is no end: the guest goes on and halts, status 0."""
    done = start("--append", "ending=debug-exit code=3", ENDINGS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ending: debug-exit\n", "")


@pytest.mark.parametrize("image", ["hello.bin", "hello32.elf", "hello64.elf"])
def test_hello(image: str) -> None:
    """A guest's console is all of stdout, nothing is on stderr, and the status is 0."""
    mode = {"hello.bin": "real", "hello32.elf": "protected", "hello64.elf": "long"}[image]
    done = start("--mem", "512M", IMAGES / image)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Hello from {mode} mode\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (2, "usage: pykvm COMMAND")),
        (["--help"], (0, "usage: pykvm COMMAND")),
        (["start", "--help"], (0, "usage: pykvm start")),
        (["start", "-h"], (0, "usage: pykvm start")),
        (["version"], (0, "/dev/kvm speaks API 12")),
        (["--version"], (0, "pykvm")),
    ],
)
def test_help_and_version(arguments: list[str], expected: tuple[int, str]) -> None:
    """Help goes to stdout with status 0; no command at all is wrong usage."""
    done = run(*arguments)
    assert done.returncode == expected[0]
    assert expected[1] in done.stdout
    assert done.stderr == ""


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "image"), [("real", "hello.bin"), ("protected", "hello32.bin"), ("long", "hello64.bin")]
)
def test_mode(mode: str, image: str) -> None:
    """--mode takes the kernel as a flat image."""
    done = start("--mode", mode, IMAGES / image)
    assert (done.returncode, done.stdout) == (0, f"Hello from {mode} mode\n")


def test_load_address_and_entry(tmp_path: Path) -> None:
    """--load-addr and --entry (in hexadecimal) place and start a flat image: 16 bytes in, behind an endless loop."""
    # mov $'k', %al; mov $0x3f8, %dx; out %al, %dx; call 1f; 1: pop %ax; (its address) out %al, %dx; cli; hlt
    code = bytes.fromhex("b06b baf803 ee e80000 58 ee fa f4")
    image = tmp_path / "image.bin"
    image.write_bytes(b"\xeb\xfe" * 8 + code)
    done = start("--mode", "real", "--load-addr", "0x7c00", "--entry=0x10", "--serial", f"file:{tmp_path}/out", image)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == b"k" + bytes([0x19])


def test_modules(tmp_path: Path) -> None:
    """--initrd and --module FILE:ARGS reach a multiboot kernel in order; ARGS may have colons and spaces."""
    initrd, module = tmp_path / "initrd", tmp_path / "module"
    initrd.write_bytes(b"one")
    module.write_bytes(b"two!")
    options = ["--initrd", str(initrd), "--module", f"{module}:a=b:c d", "--module", str(module)]
    done = start("--debug-exit", "--append", "x y", *options, IMAGES / "multiboot.elf")
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1]) == (1, "multiboot: ok")
    assert f'multiboot: cmdline "{IMAGES / "multiboot.elf"} x y"' in lines
    assert [line.split(" ", 2)[2] for line in lines if ": module" in line] == [
        f'"{initrd}" 3 bytes adler32 {zlib.adler32(b"one"):#x}',
        f'"{module} a=b:c d" 4 bytes adler32 {zlib.adler32(b"two!"):#x}',
        f'"{module}" 4 bytes adler32 {zlib.adler32(b"two!"):#x}',
    ]


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_cpus(irqchip: str) -> None:
    """--cpus 2 gives the guest two CPUs, with either irqchip."""
    done = start("--debug-exit", "--cpus", "2", "--irqchip", irqchip, IMAGES / "smp.elf")
    assert done.returncode == 1, done.stdout
    assert done.stdout.endswith("smp: 2 of 2 cpus\n")


# mov $N, %eax; xor %ecx, %ecx; cpuid; four bytes of a register to COM1; cli; hlt (real mode)
def cpuid_guest(leaf: int, register: str) -> bytes:
    """A flat image that prints a register of a CPUID leaf, four raw bytes, lowest first."""
    move = {"ebx": b"\x66\x89\xd8", "ecx": b"\x66\x89\xc8", "edx": b"\x66\x89\xd0"}[register]
    select = b"\x66\xb8" + leaf.to_bytes(4, "little") + b"\x66\x31\xc9\x0f\xa2"
    return select + move + b"\xba\xf8\x03" + b"\xee\x66\xc1\xe8\x08" * 4 + b"\xfa\xf4"


def test_cpu_feature(tmp_path: Path) -> None:
    """--cpu-feature masks and forces bits of CPUID; both spellings of a list are taken."""
    image, output = tmp_path / "cpuid.bin", tmp_path / "out"
    image.write_bytes(cpuid_guest(1, "ecx"))

    def leaf_1_ecx(*options: str) -> int:
        done = start(*options, "--serial", f"file:{output}", image)
        assert done.returncode == 0, done.stderr
        return int.from_bytes(output.read_bytes(), "little")

    x2apic, cx16 = 1 << 21, 1 << 13  # bits that every backend lets be cleared
    assert leaf_1_ecx() & (x2apic | cx16) == x2apic | cx16
    assert leaf_1_ecx("--cpu-feature", "-x2apic") & (x2apic | cx16) == cx16
    assert leaf_1_ecx("--cpu-feature", "-x2apic,-cx16") & (x2apic | cx16) == 0
    assert leaf_1_ecx("--cpu-feature", "-x2apic", "--cpu-feature=-cx16") & (x2apic | cx16) == 0
    assert leaf_1_ecx("--cpu-feature", "-cx16,+cx16") & cx16


def test_testdev() -> None:
    """--testdev adds the PC test device: its latch at 0xe0 gives back what was written."""
    done = start("--testdev", "--debug-exit", "--append", "port=0xe0 hlt=0", IMAGES / "exits.elf")
    assert "exits: out4 0xa55a1234, in4 0xa55a1234" in done.stdout
    done = start("--debug-exit", "--append", "port=0xe0 hlt=0", IMAGES / "exits.elf")
    assert "exits: out4 0xa55a1234, in4 0xffffffff" in done.stdout


# -- reports ---------------------------------------------------------------------------------------------------


def test_json() -> None:
    """--json prints one document with the outcome and the console, and nothing else."""
    done = start("--json", "--debug-exit", "--append", "ending=debug-exit code=5", ENDINGS)
    assert (done.returncode, done.stderr) == (11, "")
    assert json.loads(done.stdout) == {
        "outcome": "DEBUG_EXIT",
        "code": 5,
        "detail": "",
        "vcpu": None,
        "exit_status": 11,
        "protocol": "multiboot",
        "console": "ending: debug-exit\r\n",
    }


@pytest.mark.parametrize(("ending", "kind"), [("triple-fault", "TRIPLE_FAULT"), ("crash", "CRASH")])
def test_json_of_a_crash(ending: str, kind: str) -> None:
    """A crash's report is in the document as data, and stderr is empty."""
    done = start("--json", "--append", f"ending={ending}", ENDINGS)
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr, document["outcome"]) == (6, "", kind)
    assert document["report"]["kind"] == kind
    assert document["report"]["registers"].keys() >= {"rax", "rip", "rflags"}


def test_json_of_a_timeout() -> None:
    """A timeout is an outcome like any other."""
    done = start("--json", "--timeout", "0.3", "--append", "ending=spin", ENDINGS)
    document = json.loads(done.stdout)
    assert (done.returncode, document["outcome"], document["exit_status"]) == (124, "TIMEOUT", 124)
    assert document["console"] == "ending: spin\r\n"


def test_json_takes_stdin() -> None:
    """Under --json the guest still reads stdin."""
    done = start("--json", "--debug-exit", IMAGES / "echo.elf", input="abc\x04")
    assert json.loads(done.stdout)["console"] == "echo: ready\r\nabc\r\necho: 3 bytes, by interrupt\r\n"


def test_stats() -> None:
    """--stats prints exits by reason and by port on stderr, and where the time went."""
    done = start("--stats", "--debug-exit", "--append", "port=0x5000 count=321", IMAGES / "ring3.elf")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(r"^  IO +\d+ +\d+\.\d%$", done.stderr, re.MULTILINE)
    assert re.search(r"^  0x5000 +0 +321\b", done.stderr, re.MULTILINE)
    assert re.search(r"^  in the guest +\d+\.\d+ +\d+\.\d%$", done.stderr, re.MULTILINE)


def test_stats_as_json() -> None:
    """With --json the statistics are part of the document, by address."""
    done = start("--stats", "--json", "--debug-exit", "--append", "port=0x5000 count=321 dir=in", IMAGES / "ring3.elf")
    stats = json.loads(done.stdout)["stats"]
    ports = {int(each["address"], 16): (each["reads"], each["writes"]) for each in stats["ports"]}
    assert ports[0x5000] == (321, 0)
    assert stats["exits"] == sum(stats["reasons"].values())
    assert stats["guest_ns"] > 0


def test_log_levels() -> None:
    """Nothing is logged by default; --log-level debug says where nothing answers, once per address, also as JSON."""
    arguments = ["--debug-exit", "--append", "hlt=0", IMAGES / "exits.elf"]
    assert start(*arguments).stderr == ""
    assert start("--log-level", "error", *arguments).stderr == ""
    debug = start("--log-level", "debug", *arguments).stderr
    assert "unmapped access" in debug
    assert debug.count("0x5000") == 1
    lines = [json.loads(line) for line in start("--log-level=debug", "--log-json", *arguments).stderr.splitlines()]
    assert {"event", "level", "timestamp", "address"} <= lines[0].keys()
    assert sum(line["address"] == "0x5000" for line in lines) == 1
