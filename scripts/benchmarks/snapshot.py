"""Snapshots: fork, reset, files; and QEMU's migration to a file and back."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

from benchmarks import peers
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.measure import Run
    from benchmarks.peers import Setup

ROUNDS = 5
TIMEOUT_S = 300
TESTS = 1000
QEMU_READY_S = 30
NOTES = (
    "fork: Pc.fork(snapshot) of a PC with all its devices and a kernel irqchip, from the call to the exit that the "
    "guest's first instruction makes, on the caller's thread; median of 100 in one process. Each is closed before the "
    "next one, which has its KVM VM then; new VM: those before are still there.",
    "The first figure is the median of: fork; reset after 10 pages; one test; KiB (not us) of a fork; restore.",
    "reset: Pc.restore(snapshot) after the guest ran and so many pages were written since; what the guest writes next "
    "is a page fault of the host each, which is not in here.",
    f"tests: {TESTS} forks, each run to its first exit and closed; disk: of a PC with a disk with an overlay, and an "
    "entropy device; rss: private memory of the process for each of 100 forks that have run.",
    "file: Machine.save (with fsync) of a guest that has touched little of its memory, and restore_file up to the "
    "first guest instruction, all memory checked or none (lazy).",
    "QEMU: stop and migrate to a file (no fsync); then a new process with -incoming, from its start to `running` by "
    "QMP. `pykvm restore --timeout 0` is a whole process, start to end.",
)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    kinds = {
        "fork 512M": ("fork", "100", "512M"),
        "fork 2G": ("fork", "100", "2G"),
        "reset 512M": ("reset", "50", "512M"),
        f"{TESTS} tests": ("tests", str(TESTS), "512M"),
        f"{TESTS} tests, disk": ("disk-tests", str(TESTS), "512M"),
        "rss of a fork": ("rss", "100", "512M"),
        "file 512M": ("file", "10", "512M"),
        "file 2G": ("file", "10", "2G"),
    }
    return [
        Candidate(name, setup.child("_snapshot_child.py", *words), environment=setup.environment)
        for name, words in kinds.items()
    ]


def figures(run: Run) -> dict[str, float]:
    """What the process printed."""
    found: dict[str, float] = json.loads(run.output)
    return found


class Qemu:
    """A QEMU with a QMP socket."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.path = folder / "qmp"
        self.path.unlink(missing_ok=True)
        command = peers.qemu("-kernel", peers.guest("echo.elf"), "-qmp", f"unix:{self.path},server=on,wait=off")
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + QEMU_READY_S
        self.socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.socket.connect(str(self.path))
                break
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    self.process.kill()
                    raise BenchError("QEMU does not answer on its QMP socket") from None
                time.sleep(0.002)
        self.stream = self.socket.makefile("rw")
        self.stream.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict[str, object]:
        """Issue a command; what it returns."""
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while "return" not in (answer := json.loads(self.stream.readline())):
            if "error" in answer:
                raise BenchError(f"QEMU: {answer['error']}")
        found: dict[str, object] = answer["return"]
        return found

    def until(self, command: str, status: str) -> None:
        """Ask until the status is that."""
        end = time.monotonic() + QEMU_READY_S
        while (now := self.ask(command).get("status")) != status:
            if time.monotonic() > end or now == "failed":
                raise BenchError(f"QEMU: {command} stays at {now}")
            time.sleep(0.002)

    def close(self) -> None:
        """End it."""
        self.stream.close()
        self.socket.close()
        self.process.kill()
        self.process.communicate()


def qemu_round(setup: Setup) -> dict[str, float]:
    """Microseconds to save and to be running again."""
    file = setup.folder / "qemu.state"
    machine = Qemu(setup.folder)
    try:
        assert machine.process.stdout is not None
        while b"ready" not in machine.process.stdout.readline():
            pass
        begin = time.perf_counter()
        machine.ask("stop")
        machine.ask("migrate", uri=f"exec:cat > {file}")
        machine.until("query-migrate", "completed")
        saved = time.perf_counter() - begin
    finally:
        machine.close()
    begin = time.perf_counter()
    machine = Qemu(setup.folder, "-incoming", f"exec:cat {file}", "-S")
    try:
        machine.until("query-status", "paused")
        machine.ask("cont")
        machine.until("query-status", "running")
        return {"save": saved * 1e6, "median": (time.perf_counter() - begin) * 1e6}
    finally:
        machine.close()


def pykvm_process(setup: Setup) -> dict[str, float]:
    """Microseconds of a whole `pykvm restore` that ends at once."""
    file = setup.folder / "pykvm.snap"
    if not file.exists():
        code = (
            "import sys; from pykvm import Pc\nwith Pc(sys.argv[1], memory='512M') as vm:\n"
            " vm.console.expect('ready'); vm.save(sys.argv[2])"
        )
        subprocess.run([setup.python, "-c", code, peers.guest("echo.elf"), str(file)], check=True)
    begin = time.perf_counter()
    subprocess.run(
        [*setup.pykvm, "restore", "--timeout", "0", str(file)],
        check=False,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return {"median": (time.perf_counter() - begin) * 1e6}


def run(setup: Setup) -> Comparison:
    """Measure it."""
    good, skipped = able(candidates(setup), spawn)
    special = {"pykvm restore, process": lambda: pykvm_process(setup)}
    if shutil.which("qemu-system-x86_64"):
        special["QEMU microvm"] = lambda: qemu_round(setup)
    else:
        skipped["QEMU microvm"] = peers.qemu_version()
    rounds = setup.rounds or ROUNDS
    named = [*good, *(Candidate(name, [name]) for name in special)]

    def measure(each: Candidate) -> dict[str, float]:
        return special[each.name]() if each.name in special else figures(spawn(each, TIMEOUT_S))

    series = alternate(named, rounds, measure, setup.say)
    aims = []
    for name, quantity, text in (
        ("fork 512M", "median", "fork of 512 MiB to its first instruction, aim 1500"),
        ("fork 2G", "median", "fork of 2 GiB, aim as 512 MiB"),
        ("reset 512M", "10 pages", "reset after 10 pages, aim 63"),
        ("reset 512M", "1000 pages", "reset after 1,000 pages, aim 360"),
        ("reset 512M", "100000 pages", "reset after 100,000 pages, aim 30060"),
        (f"{TESTS} tests", "all", f"{TESTS} tests with a fork each, aim 5000000"),
    ):
        if name in series:
            aims.append(Aim(text, series[name][quantity], "us"))
    if "rss of a fork" in series:
        aims.append(Aim("private memory of a fork, aim 1024", series["rss of a fork"]["median"], "KiB"))
    return Comparison(
        name="snapshot",
        title="fork, reset, save and restore",
        rounds=rounds,
        candidates=named,
        units={"median": "us", **{name: "us" for each in series.values() for name in each}},
        series=series,
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
