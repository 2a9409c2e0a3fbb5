"""Linux to its init: Debian's cloud kernel with a busybox initramfs, inside the lab."""

from __future__ import annotations

import os
import subprocess
import time
from select import select

from benchmarks import peers
from benchmarks.measure import BenchError, Candidate, able, alternate, clean_environment
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.peers import Setup

ROUNDS = 3
MARKER = b"pykvm-initramfs: up"
TIMEOUT_S = 300
UNPACKED, PACKED, QEMU = "pykvm", "pykvm --no-unpack", "QEMU microvm"
NOTES = (
    f"Time from the creation of the process until the guest's init has printed '{MARKER.decode()}' on its serial "
    "port; then the process is killed. All get the same bzImage, initramfs and command line.",
    "By default pykvm unpacks the kernel on the host and boots its ELF payload; --no-unpack lets the guest unpack "
    "itself, as under QEMU.",
    "QEMU: microvm with only a serial port, its i8254, i8259, RTC and option ROMs off; with ACPI, as pykvm has.",
)


def candidates(setup: Setup, kernel: str) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    initrd, append, cpus = peers.guest("initramfs.cpio.gz"), setup.options["append"], setup.options["cpus"]
    start = [*setup.pykvm, "start", "--mem", f"{peers.MEMORY_MIB}M", "--cpus", cpus]
    rest = ["--initrd", initrd, "--append", append, kernel]
    theirs = peers.qemu("-smp", cpus, "-kernel", kernel, "-initrd", initrd, "-append", append)
    return [
        Candidate(UNPACKED, [*start, *rest], environment=setup.environment),
        Candidate(PACKED, [*start, "--no-unpack", *rest], environment=setup.environment),
        Candidate(QEMU, theirs),
    ]


def measure(candidate: Candidate) -> dict[str, float]:
    """Seconds until the marker."""
    started = time.perf_counter()
    process = subprocess.Popen(
        candidate.command,
        env=clean_environment(candidate.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    seen = bytearray()
    try:
        while MARKER not in seen:
            left = started + TIMEOUT_S - time.perf_counter()
            ready = select([process.stdout], [], [], max(left, 0))[0]
            data = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not data:
                why = "the process ended" if ready else f"not in {TIMEOUT_S} s"
                raise BenchError(
                    f"{candidate.name}: no init, {why}; it said ...{bytes(seen[-1500:]).decode(errors='replace')}"
                )
            seen += data
        return {"time": time.perf_counter() - started}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def find_kernel() -> str:
    """The bzImage of the lab."""
    kernel = os.environ.get("PYKVM_GUEST_KERNEL")
    if not kernel:
        raise BenchError("linux: no PYKVM_GUEST_KERNEL: run it in the lab, scripts/lab scripts/bench linux")
    return kernel


def run(setup: Setup) -> Comparison:
    """Measure it."""
    # no trial, which would take as long as a round
    good, skipped = able(candidates(setup, find_kernel()), lambda candidate: None)
    rounds = setup.rounds or ROUNDS
    series = alternate(good, rounds, measure, setup.say)
    aims = []
    if QEMU in series:
        theirs = series[QEMU]["time"]
        aims = [
            Aim(f"{name} / {QEMU}, aim {aim}", series[name]["time"].over(theirs))
            for name, aim in ((UNPACKED, "0.80"), (PACKED, "1.00"))
            if name in series
        ]
    return Comparison(
        name="linux",
        title=f"Linux to init, {setup.options['cpus']} CPU, {peers.MEMORY_MIB} MiB",
        rounds=rounds,
        candidates=good,
        units={"time": "s"},
        series=series,
        references=(QEMU,),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
