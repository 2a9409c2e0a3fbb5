"""A process of `scripts/bench snapshot`: _snapshot_child.py KIND ROUNDS [MEMORY]; prints its figures as JSON.

KIND: fork (call to first guest instruction), reset (by dirty pages), tests (a fork for each of ROUNDS tests),
disk-tests (the same with virtio devices), rss (what ROUNDS forks cost), file (save and restore).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from pykvm import BootConfig, Pc, restore_file
from pykvm.virtio.blk import Disk
from pykvm.virtio.rng import Rng

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.virtio.device import VirtioDevice

READY = "ready"
# real mode: mov $0x3f8, %dx; mov $c, %al; out %al, %dx for each character; 1: out %al, $0x80; jmp 1b
GUEST = b"\xba\xf8\x03" + b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in b"ready\n") + b"\xe6\x80\xeb\xfc"
FIRST_TOUCHED = 16 << 20
DIRTY = (10, 1000, 100_000)


def booted(memory: str, devices: Sequence[VirtioDevice] = ()) -> Pc:
    """A PC whose guest has said that it is ready, and now writes to a port for ever."""
    with tempfile.NamedTemporaryFile() as kernel:
        kernel.write(GUEST)
        kernel.flush()
        vm = Pc(BootConfig(kernel.name, mode="real"), memory=memory, memfd=True, devices=devices)
    vm.console.expect(READY)
    return vm


def fork(rounds: int, memory: str) -> dict[str, float]:
    """Microseconds from the call to the exit that the first guest instructions make; snapshot taken before.

    Each is closed before the next one, which has its KVM VM then; "new VM": with those before still there.
    """
    with booted(memory) as vm:
        times = fork_times(vm, rounds, keep=False)
        new = fork_times(vm, rounds, keep=True)
    return {"median": statistics.median(times), "best": min(times), "new VM": statistics.median(new)}


def fork_times(vm: Pc, rounds: int, *, keep: bool) -> list[float]:
    """Microseconds of each."""
    snapshot, times, children = vm.snapshot(), [], []
    for _ in range(rounds):
        begin = perf_counter()
        children.append(vm.fork(snapshot))
        children[-1].vcpus[0].run_once()
        times.append((perf_counter() - begin) * 1e6)
        if not keep:
            children.pop().close()
    for child in children:
        child.close()
    return times


def reset(rounds: int, memory: str) -> dict[str, float]:
    """Microseconds of `restore` after the guest has run and so many pages were written."""
    figures = {}
    with booted(memory) as vm:
        snapshot = vm.snapshot()
        for pages in DIRTY:
            times = []
            for _ in range(rounds if pages < DIRTY[-1] else max(3, rounds // 20)):
                vm.vcpus[0].run_once()
                for page in range(pages):
                    vm.memory.view(FIRST_TOUCHED + page * 4096, 1)[0] = 1
                begin = perf_counter()
                vm.restore(snapshot)
                times.append((perf_counter() - begin) * 1e6)
            figures[f"{pages} pages"] = statistics.median(times)
    return {"median": figures[f"{DIRTY[0]} pages"], **figures}


def tests(rounds: int, memory: str) -> dict[str, float]:
    """Seconds for so many tests: fork, run until the guest has printed, close."""
    with booted(memory) as vm:
        return _tests(vm, rounds)


def disk_tests(rounds: int, memory: str) -> dict[str, float]:
    """The same for a PC with a disk that has an overlay, and an entropy device."""
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(64 << 20)
        with booted(memory, [Disk(image.name, overlay=True), Rng()]) as vm:
            return _tests(vm, rounds)


def _tests(vm: Pc, rounds: int) -> dict[str, float]:
    snapshot, begin = vm.snapshot(), perf_counter()
    for _ in range(rounds):
        with vm.fork(snapshot) as child:
            child.vcpus[0].run_once()
    took = (perf_counter() - begin) * 1e6
    return {"all": took, "median": took / rounds}


def private_kib() -> int:
    """Memory that this process alone has."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return sum(
        int(line.split()[1]) for line in text.splitlines() if line.startswith(("Private_Clean", "Private_Dirty"))
    )


def rss(rounds: int, memory: str) -> dict[str, float]:
    """KiB of this process for each fork that has run."""
    with booted(memory) as vm:
        snapshot = vm.snapshot()
        children = [vm.fork(snapshot) for _ in range(3)]
        before, more = private_kib(), []
        for _ in range(rounds):
            more.append(vm.fork(snapshot))
            more[-1].vcpus[0].run_once()
        each = (private_kib() - before) / rounds
        for child in children + more:
            child.close()
    return {"median": each}


def file(rounds: int, memory: str) -> dict[str, float]:
    """Microseconds to save, to restore to the first guest instruction with and without reading memory first."""
    times: dict[str, list[float]] = {"save": [], "restore": [], "restore lazy": []}
    with booted(memory) as vm, tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vm.snap")
        for _ in range(rounds):
            begin = perf_counter()
            vm.save(path)
            times["save"].append((perf_counter() - begin) * 1e6)
            for name, lazy in (("restore", False), ("restore lazy", True)):
                begin = perf_counter()
                machine = restore_file(path, lazy=lazy)
                machine.vcpus[0].run_once()
                times[name].append((perf_counter() - begin) * 1e6)
                machine.close()
    figures = {name: statistics.median(values) for name, values in times.items()}
    return {"median": figures["restore"], **figures}


KINDS = {"fork": fork, "reset": reset, "tests": tests, "disk-tests": disk_tests, "rss": rss, "file": file}

if __name__ == "__main__":
    kind, count, *size = sys.argv[1:]
    print(json.dumps(KINDS[kind](int(count), size[0] if size else "512M")))
