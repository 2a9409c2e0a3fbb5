"""Requests of a disk a second: a guest with a virtio-blk driver in ring 3 (images/blk.c), native everywhere."""

from __future__ import annotations

import os
import re

from benchmarks import peers
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.measure import Run, Series
    from benchmarks.peers import Setup

ROUNDS = 5
COUNT = 20_000  # requests of a run
TIME = re.compile(r"blk: (\d+) requests in (\d+) us")
IMAGE_MIB = 64
MEMORY_MIB = 128
DEBUG_EXIT_0 = 1
OURS, QEMU, QEMU_THREAD = "pykvm", "QEMU", "QEMU iothread io_uring"
CACHED, COLD, DIRECT = "", ", cold", ", direct"  # where the image is when a run begins
WORKLOADS = {  # title: options of the guest
    "4 KiB read, depth 1": "op=read depth=1",
    "4 KiB read, depth 32": "op=read depth=32",
    "4 KiB write, depth 1": "op=write depth=1",
    "4 KiB write, depth 32": "op=write depth=32",
    "128 KiB read, depth 4": "op=read depth=4 bytes=131072",
    f"4 KiB read, depth 32{COLD}": "op=read depth=32",
    f"4 KiB read, depth 1{DIRECT}": "op=read depth=1",
    f"4 KiB read, depth 32{DIRECT}": "op=read depth=32",
    f"4 KiB write, depth 32{DIRECT}": "op=write depth=32",
}
COUNTS = {CACHED: COUNT, COLD: COUNT // 4, DIRECT: COUNT // 4}
OPTIONS = {OURS: ",direct", QEMU: ",cache=none", QEMU_THREAD: ",cache=none"}  # what makes a disk direct
QEMU_BASE = "base=0xfeb00000"
NOTES = (
    f"The guest takes the time of {COUNT} requests itself, by its local APIC's timer. Random places of a 64 MiB image "
    f"in the host's page cache; cold: {COUNTS[COLD]} of one that is not; direct: {COUNTS[DIRECT]} past it.",
    "Cold and direct measure the file system of $TMPDIR and what is below it; with --realtime, kernel threads that end "
    "direct writes get hardly a CPU: those figures mean nothing then.",
    "The guest polls the used ring in ring 3 and never halts; both offer EVENT_IDX and the guest uses it.",
    "QEMU microvm: virtio-blk on virtio-mmio, from its main loop with its default threads, and from an iothread with "
    "io_uring (which polls its queues up to 32 us, as pykvm does up to 50 us).",
    "CPU is user and system time of the whole process, start and polling guest included, for one request.",
    "A guest and an I/O thread that both poll want a CPU each: on a busy machine the scheduler is what is measured.",
)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round. WORK stands for the guest's options, DIRECT for the disk's."""
    elf, image = peers.guest("blk.elf"), str(setup.folder / "disk.img")
    start = [*setup.pykvm, "start", "--mem", f"{MEMORY_MIB}M", "--debug-exit", "--disk", f"{image}DIRECT"]

    def theirs(drive: str, device: str, *more: str) -> list[str]:
        return peers.qemu(
            *more,
            *("-global", "virtio-mmio.force-legacy=false"),
            *("-drive", f"if=none,id=disk,format=raw,file={image}{drive}DIRECT"),
            *("-device", f"virtio-blk-device,drive=disk,bus=virtio-mmio-bus.0{device}"),
            *("-kernel", elf, "-append", f"{QEMU_BASE} WORK"),
            memory_mib=MEMORY_MIB,
        )

    return [
        Candidate(OURS, [*start, "--append", "WORK", elf], DEBUG_EXIT_0, environment=setup.environment),
        Candidate(QEMU, theirs("", ""), DEBUG_EXIT_0),
        Candidate(
            QEMU_THREAD,
            theirs(",aio=io_uring", ",iothread=io", "-object", "iothread,id=io"),
            DEBUG_EXIT_0,
        ),
    ]


def _command(candidate: Candidate, work: str, where: str) -> list[str]:
    direct = OPTIONS[candidate.name] if where == DIRECT else ""
    return [word.replace("WORK", work).replace("DIRECT", direct) for word in candidate.command]


def _run(candidate: Candidate, work: str, count: int, where: str = CACHED) -> Run:
    command = _command(candidate, f"mode=bench count={count} {work}", where)
    return spawn(Candidate(candidate.name, command, candidate.status, environment=candidate.environment), timeout_s=120)


def drop_from_cache(image: Path) -> None:
    """Let the host forget what is in an image; one on tmpfs is nowhere else."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(candidate: Candidate, title: str, image: Path) -> dict[str, float]:
    """Requests a second, and microseconds of CPU for one."""
    where = next((each for each in (COLD, DIRECT) if title.endswith(each)), CACHED)
    if where == COLD:
        drop_from_cache(image)
    count = COUNTS[where]
    done = _run(candidate, WORKLOADS[title], count, where)
    found = TIME.search(done.output)
    if found is None:
        raise BenchError(f"{candidate.name}: no time in {done.output[-300:]!r}")
    return {"rate": count / int(found.group(2)) * 1000, "CPU": done.cpu_s / count * 1e6}


def run(setup: Setup) -> Comparison:
    """Measure all workloads; the table has a line for each candidate and workload."""
    image = setup.folder / "disk.img"
    image.write_bytes(b"pykvm blk bench!" * (IMAGE_MIB << 16))
    good, skipped = able(candidates(setup), lambda candidate: _run(candidate, "depth=4", 100))
    if OURS in skipped:
        raise BenchError(f"{OURS}: {skipped[OURS]}")
    rounds = setup.rounds or ROUNDS
    lines: list[Candidate] = []
    series: dict[str, dict[str, Series]] = {}
    aims = []
    for title, work in WORKLOADS.items():
        found = alternate(good, rounds, lambda candidate, title=title: measure(candidate, title, image), setup.say)
        for candidate in good:
            name = f"{candidate.name}: {title}"
            lines.append(Candidate(name, _command(candidate, work, DIRECT if title.endswith(DIRECT) else CACHED)))
            series[name] = found[candidate.name]
        mine = found[OURS]["rate"]
        aims += [
            Aim(f"{title}: {OURS} / {name}, aim 1.00", mine.over(found[name]["rate"])) for name in found if name != OURS
        ]
    return Comparison(
        name="blk",
        title="virtio-blk requests a second, a guest in ring 3",
        rounds=rounds,
        candidates=lines,
        units={"rate": "1000/s", "CPU": "us"},
        series=series,
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
