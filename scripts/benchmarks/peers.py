"""Where pykvm, the C floor, QEMU and the guests are, and how each is called."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import BenchError, clean_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images" / "build"
FLOOR = IMAGES / "floor"
MEMORY_MIB = 512
# As small as microvm gets without losing the serial port: each device and option ROM less makes QEMU faster.
MICROVM = "microvm,x-option-roms=off,pic=off,pit=off,rtc=off"


@dataclass
class Setup:
    """One run of scripts/bench."""

    python: str
    pykvm: list[str]  # the command up to its first argument
    environment: dict[str, str]  # what the command needs besides PATH and HOME
    folder: Path  # for files that only live as long as the run
    rounds: int | None  # None: the benchmark's own default
    say: Callable[[str], object]  # progress
    options: dict[str, str]  # of single benchmarks: lives, ring, cpus, append

    def child(self, script: str, *arguments: str) -> list[str]:
        """A Python program of this folder, run by the interpreter that has pykvm."""
        return [self.python, str(Path(__file__).with_name(script)), *arguments]


def find_pykvm(python: str) -> tuple[list[str], str, dict[str, str]]:
    """(command, description, environment): the console script beside `python`, else the module from the sources."""
    script = Path(python).with_name("pykvm")
    installed = os.access(script, os.X_OK)
    environment = {} if installed else {"PYTHONPATH": str(ROOT)}
    query = "import pykvm, sys; print(sys.version.split()[0], pykvm.__path__[0])"
    answer = subprocess.run(
        [python, "-c", query],
        env=clean_environment(environment),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise BenchError(f"{python} has no pykvm (scripts/setup makes .venv): {answer.stderr.strip()[-300:]}")
    version, path = answer.stdout.split()
    command = [str(script)] if installed else [python, "-m", "pykvm"]
    how = f"console script {script}" if installed else f"{python} -m pykvm (no console script beside it)"
    commit = f", {_commit()}" if Path(path).is_relative_to(ROOT) else ", not this checkout"
    return command, f"{how}; Python {version}; package {path}{commit}", environment


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "no git"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "pykvm", "native"], check=False).returncode
    return f"commit {head.stdout.strip()}{' with changes' if changed else ''}"


def guest(name: str) -> str:
    """The path of a file in images/build, as it is written in commands. BenchError if it was not built."""
    path = IMAGES / name
    if not path.exists():
        raise BenchError(f"{path} is missing: run scripts/setup, or make -C images (initramfs)")
    return str(path)


def qemu(*arguments: str, memory_mib: int = MEMORY_MIB) -> list[str]:
    """A QEMU microvm with a serial port on stdout and isa-debug-exit."""
    machine = ["qemu-system-x86_64", "-accel", "kvm", "-M", MICROVM, "-m", str(memory_mib)]
    bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    return [*machine, *bare, "-device", "isa-debug-exit,iobase=0xf4,iosize=4", *arguments]


def qemu_version() -> str:
    """The first line of --version, or why there is none."""
    if not shutil.which("qemu-system-x86_64"):
        return "QEMU is not installed (apt-get install qemu-system-x86)"
    answer = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0]


def describe_host() -> dict[str, object]:
    """What figures depend on besides the code."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
        models = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "lab": "PYKVM_LAB" in os.environ,
        "load": os.getloadavg()[0],
        "realtime": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "qemu": qemu_version(),
    }
