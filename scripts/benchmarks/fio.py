"""Debian's fio on a disk of a Linux guest, under pykvm and QEMU; inside the lab, where an unmodified Linux runs."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

from _lab_kernel import Cpio, Modules, read_module

from benchmarks import peers
from benchmarks.linux import find_kernel
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.measure import Series
    from benchmarks.peers import Setup

ROUNDS = 3
IMAGE_MIB = 256
MEMORY_MIB = 768
TIMEOUT_S = 280
OURS, QEMU = "pykvm", "QEMU"
CMDLINE = "console=ttyS0 quiet pykvm.run=/fio-run"
JOBS = {  # name: (title, fio's options)
    "randread-1": ("4 KiB random read, QD 1", "rw=randread bs=4k iodepth=1"),
    "randread-32": ("4 KiB random read, QD 32", "rw=randread bs=4k iodepth=32"),
    "randwrite-1": ("4 KiB random write, QD 1", "rw=randwrite bs=4k iodepth=1"),
    "randwrite-32": ("4 KiB random write, QD 32", "rw=randwrite bs=4k iodepth=32"),
    "read-128k": ("128 KiB sequential read, QD 4", "rw=read bs=128k iodepth=4"),
    "write-128k": ("128 KiB sequential write, QD 4", "rw=write bs=128k iodepth=4"),
}
WARM_UP = (
    "[warm-up]\nrw=randrw\nbs=4k\niodepth=4\nruntime=2\n"  # the first job after a boot is slower, whatever it does
)
RUN = b"""#!/bin/sh
export LD_LIBRARY_PATH=/lib HOME=/tmp
fio --minimal --terse-version=3 /jobs.fio
"""
READ_IOPS, WRITE_IOPS = 7, 48  # fields of a terse line, version 3 (fio(1), TERSE OUTPUT)
NOTES = (
    "One boot a round runs all jobs in turn after a warm-up: direct=1, libaio, 4 s each after 1 s of ramp. The image "
    "is in the lab's page cache (tmpfs); writes are write-back for both.",
    "QEMU: microvm, virtio-blk on virtio-mmio (version 2), default threads, its main loop.",
    "The lab interprets the CPU (TCG): ratios say something, absolute figures nothing.",
)


def _libraries(program: str) -> list[Path]:
    """What a program is linked with, its interpreter too."""
    answer = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", answer.stdout)]


def make_initrd(target: Path) -> None:
    """The test guest's initramfs with fio, its libraries, the jobs and the modules of a disk."""
    fio = shutil.which("fio")
    if not fio:
        raise BenchError("fio is not installed: scripts/setup --lab")
    modules = Modules(Path(os.environ["PYKVM_GUEST_MODULES"])).order("virtio_mmio", "virtio_blk")
    jobs = "[global]\nfilename=/dev/vda\ndirect=1\nioengine=libaio\nthread=1\ntime_based\nruntime=4\nramp_time=1\n"
    jobs += WARM_UP
    jobs += "".join(
        "[{}]\nstonewall\n{}\n".format(name, options.replace(" ", "\n")) for name, (_, options) in JOBS.items()
    )
    files = {
        f"modules/{place:02}-{path.name.removesuffix('.xz')}": read_module(path) for place, path in enumerate(modules)
    }
    files |= {"fio-run": RUN, "jobs.fio": jobs.encode(), "bin/fio": Path(fio).read_bytes()}
    for path in _libraries(fio):
        files[f"lib64/{path.name}" if path.name.startswith("ld-linux") else f"lib/{path.name}"] = path.read_bytes()
    archive = Cpio()
    for folder in ("bin", "lib", "lib64", "modules"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    for name, data in files.items():
        archive.add(name, stat.S_IFREG | 0o755, data)
    base = Path(peers.guest("initramfs.cpio.gz")).read_bytes()
    target.write_bytes(base + bytes(-len(base) % 4) + archive.finish())


def candidates(setup: Setup, kernel: str) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    initrd, image, cpus = str(setup.folder / "fio.cpio"), str(setup.folder / "fio.img"), setup.options["cpus"]
    ours = [*setup.pykvm, "start", "--mem", f"{MEMORY_MIB}M", "--cpus", cpus, "--disk", image]
    ours += ["--initrd", initrd, "--append", CMDLINE, kernel]
    theirs = peers.qemu(
        *("-smp", cpus, "-global", "virtio-mmio.force-legacy=false"),
        *("-drive", f"if=none,id=disk,format=raw,file={image}", "-device", "virtio-blk-device,drive=disk"),
        *("-kernel", kernel, "-initrd", initrd, "-append", CMDLINE),
        memory_mib=MEMORY_MIB,
    )
    return [Candidate(OURS, ours, 0, "status 0", setup.environment), Candidate(QEMU, theirs, 0, "status 0")]


def measure(candidate: Candidate) -> dict[str, float]:
    """IOPS of each job."""
    output = spawn(candidate, TIMEOUT_S).output
    found = {}
    for line in output.splitlines():
        fields = line.strip().split(";")
        if len(fields) > WRITE_IOPS and fields[2] in JOBS:
            found[fields[2]] = float(fields[READ_IOPS]) + float(fields[WRITE_IOPS])
    if set(found) != set(JOBS):
        raise BenchError(f"{candidate.name}: fio said nothing of {sorted(set(JOBS) - set(found))}: {output[-1500:]}")
    return found


def run(setup: Setup) -> Comparison:
    """Measure it; the table has a line for each candidate and job."""
    kernel = find_kernel()
    make_initrd(setup.folder / "fio.cpio")
    (setup.folder / "fio.img").write_bytes(b"pykvm fio bench!" * (IMAGE_MIB << 16))
    good, skipped = able(candidates(setup, kernel), lambda candidate: None)
    rounds = setup.rounds or ROUNDS
    found = alternate(good, rounds, measure, setup.say)
    series: dict[str, dict[str, Series]] = {}
    aims, lines = [], []
    for job, (title, _) in JOBS.items():
        for candidate in good:
            series[f"{candidate.name}: {title}"] = {"IOPS": found[candidate.name][job]}
            lines.append(Candidate(f"{candidate.name}: {title}", candidate.command))
        if QEMU in found:
            aims.append(Aim(f"{title}: {OURS} / {QEMU}, aim 1.00", found[OURS][job].over(found[QEMU][job])))
    return Comparison(
        name="fio",
        title=f"fio in Debian's kernel, {setup.options['cpus']} CPU",
        rounds=rounds,
        candidates=lines,
        units={"IOPS": ""},
        series=series,
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
