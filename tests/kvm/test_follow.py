"""Following processes that use KVM: QEMU, pykvm itself, by launching and by attaching."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import guests
import pytest

pytest.importorskip("ptrace", reason="python-ptrace (pykvm-vmm[trace]) is not installed")

QEMU = shutil.which("qemu-system-x86_64")
SMALL = "microvm,x-option-roms=off,pic=off,pit=off,rtc=off"
COUNT = 60
STATUS = 1  # debug-exit 0


def follow(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """`pykvm trace WORDS`."""
    return command.run("trace", *words)


def test_qemu(tmp_path: Path) -> None:
    """QEMU's start decoded: its RAM as a memory region, its eventfds, its vCPU's exits by reason and port."""
    if QEMU is None:
        pytest.skip("QEMU is not installed (apt-get install qemu-system-x86)")
    qemu = [
        *(QEMU, "-accel", "kvm", "-M", SMALL, "-m", "64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        *("-kernel", str(guests.IMAGES / "ring3.elf"), "-append", f"port=0x80 count={COUNT}"),
    ]
    done = follow("--output", tmp_path / "out", "--", *qemu)
    assert done.returncode == STATUS, done.stderr
    text = (tmp_path / "out").read_text()
    assert re.search(r"KVM_CREATE_VM\(\d+<kvm>\) = \d+", text)
    assert re.search(r"KVM_SET_USER_MEMORY_REGION\(\d+<kvm-vm>, \{slot=0, .*memory_size=0x4000000, ", text)
    assert re.search(r"KVM_CREATE_VCPU\(\d+<kvm-vm>, 0\) = \d+", text)
    assert "KVM_IOEVENTFD" in text and "KVM_IOEVENTFD_FLAG_PIO" in text
    assert re.search(r"KVM_SET_CPUID2\(\d+<kvm-vcpu:0>, \{nent=\d+, .*function=0", text)
    runs = re.findall(r"KVM_RUN\(\d+<kvm-vcpu:0>\) = 0 -> (.*) <", text)
    assert len([run for run in runs if run.startswith("IO out 0x80 1 byte = 0x2e")]) == COUNT
    assert re.search(rf"^  IO out 0x80 1 byte +{COUNT}$", text, re.MULTILINE)


def test_pykvm_itself_as_a_grandchild() -> None:
    """Through a shell's fork and exec, the thread of the vCPU included; the status is the command's."""
    words = [sys.executable, "-m", "pykvm", "start", "--debug-exit", "--append", f"count={COUNT}"]
    script = 'true; "$@"; exit $?'
    done = follow("--json", "--", "sh", "-c", script, "sh", *words, guests.IMAGES / "ring3.elf")
    assert done.returncode == STATUS, done.stderr
    found = json.loads(done.stdout)
    assert found["ioctls"]["KVM_CREATE_VM"]["calls"] == 1
    assert found["exits"]["IO out 0x80 1 byte"] == COUNT
    assert found["exits"]["IO out 0xf4 1 byte"] == 1
    assert found["ioctls"]["KVM_RUN"]["calls"] == sum(found["reasons"].values())


def test_attaching_and_letting_go() -> None:
    """A running guest is followed from the outside, its kvm_run found; let go, it answers as before."""
    machine = command.spawn("--debug-exit", guests.IMAGES / "echo.elf")
    assert machine.stdin is not None and machine.stdout is not None
    try:
        while b"echo" not in machine.stdout.readline():
            pass
        words = ["trace", "--json", "--timeout", "60", "attach", str(machine.pid)]
        tracer = subprocess.Popen(
            [*command.COMMAND, *words], env=command.environment(), stdout=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: f"TracerPid:\t{tracer.pid}" in status_of(machine.pid))
            machine.stdin.write(b"hello\n")
            machine.stdin.flush()
            assert b"hello" in machine.stdout.readline()
        finally:
            tracer.send_signal(signal.SIGINT)
        found = json.loads(tracer.communicate(timeout=command.SECONDS)[0])
        assert tracer.returncode == 0
        assert found["reasons"].get("IO", 0) + found["reasons"].get("EINTR", 0) > 0
        assert "(its kvm_run was not found)" not in found["reasons"]
        wait_for(lambda: "TracerPid:\t0" in status_of(machine.pid))
        machine.stdin.write(b"again\n")
        machine.stdin.flush()
        assert b"again" in machine.stdout.readline()
    finally:
        os.killpg(machine.pid, signal.SIGTERM)
        machine.communicate(timeout=command.SECONDS)


def status_of(pid: int) -> str:
    """/proc/PID/status."""
    return Path(f"/proc/{pid}/status").read_text()


def wait_for(condition: object) -> None:
    """Wait until a function gives true."""
    end = time.monotonic() + command.SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_timeout_ends_the_command() -> None:
    """No orphan: a command that hangs is ended, and its status says by which signal."""
    done = follow("--timeout", "0.5", "--", "sleep", "1000")
    assert done.returncode == 128 + signal.SIGTERM
    assert "no KVM ioctl was seen" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attach", "0"], "is no process id"),
        (["attach", "x"], "is no process id"),
        (["attach", "2147483647"], "there is no process"),
        (["attach"], "attach PID"),
        (["--"], "usage"),
        (["--", "no-such-command-here"], "no such command"),
        (["--timeout", "-1", "--", "true"], "no number of seconds"),
        (["--output", "/none/x", "--", "true"], "No such file"),
    ],
)
def test_wrong_usage(words: list[str], said: str) -> None:
    """One line and status 2."""
    done = follow(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr


def test_without_python_ptrace(tmp_path: Path) -> None:
    """Where the extra is not installed, one line says how to get it."""
    (tmp_path / "ptrace").mkdir()
    (tmp_path / "ptrace" / "__init__.py").write_text("raise ImportError")
    environment = command.environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    done = subprocess.run(
        [*command.COMMAND, "trace", "--", "true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "pip install 'pykvm-vmm[trace]'" in done.stderr and done.stderr.count("\n") == 1
