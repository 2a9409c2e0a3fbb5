"""Frames over a tap: a small virtio-net guest that polls in ring 3, under pykvm and under QEMU."""

from __future__ import annotations

from benchmarks import peers, tapnet
from benchmarks.measure import Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Run, Series
    from benchmarks.peers import Setup

ROUNDS = 5
WORK = "{work}"  # in a command: what the guest does
DEBUG_EXIT_0 = 1
OURS, QEMU = "pykvm", "QEMU microvm"
MICROVM_MMIO = 0xFEB00000  # the first virtio-mmio window of QEMU's microvm
# name -> (what the guest does, a few frames, many)
KINDS = {
    "send": ("mode=send bytes=60", 20_000, 220_000),
    "send 1514": ("mode=send bytes=1514", 20_000, 220_000),
    "ping": ("mode=ping bytes=98 depth=64", 10_000, 90_000),
    "ping 1 by 1": ("mode=ping bytes=98 depth=1", 1_000, 9_000),
}
NOTES = (
    "Each figure is the time of one frame: (time of many frames - time of few) / the difference, of two whole "
    "processes one after the other. 1 us is a million frames a second.",
    "send: the guest sends frames that the host's kernel drops, up to 64 in flight. ping: the host's kernel answers "
    "ICMP echo requests, up to 64 (or 1) without an answer: a frame there and one back. The guest polls its rings in "
    "ring 3, which runs natively on every host, and takes no interrupt.",
    "Both use the same persistent tap with virtio headers, in a network namespace of the benchmark's own. QEMU: "
    "virtio-net-device on virtio-mmio version 2 without vhost, served by its main loop; pykvm's I/O thread serves it.",
)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    elf = peers.guest("net.elf")
    net = f"tap,ifname={tapnet.TAP},mac={tapnet.GUEST_MAC}"
    ours = [*setup.pykvm, "start", "--mem", "64M", "--debug-exit", "--net", net, "--append", WORK, elf]
    theirs = peers.qemu(
        *("-global", "virtio-mmio.force-legacy=false"),
        *("-netdev", f"tap,id=n,ifname={tapnet.TAP},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-device,netdev=n,mac={tapnet.GUEST_MAC},bus=virtio-mmio-bus.0"),
        *("-kernel", elf, "-append", f"base={MICROVM_MMIO:#x} {WORK}"),
        memory_mib=64,
    )
    return [
        Candidate(OURS, ours, DEBUG_EXIT_0, "net: mac", setup.environment),
        Candidate(QEMU, theirs, DEBUG_EXIT_0, "net: mac"),
    ]


def _run(candidate: Candidate, work: str) -> Run:
    command = [word.replace(WORK, work) for word in candidate.command]
    return spawn(
        Candidate(candidate.name, command, candidate.status, candidate.prints, candidate.environment), timeout_s=120
    )


def measure(candidate: Candidate) -> dict[str, float]:
    """Microseconds of one frame, for each kind of work."""
    found = {}
    for name, (work, few, many) in KINDS.items():
        times = [_run(candidate, f"{work} count={count}").wall_s for count in (few, many)]
        found[name] = (times[1] - times[0]) / (many - few) * 1e6
    return found


def aims(series: dict[str, dict[str, Series]]) -> Iterator[Aim]:
    """The ratios to QEMU."""
    if OURS in series and QEMU in series:
        for name in KINDS:
            yield Aim(f"{name}: {OURS} / {QEMU}, aim 1.00", series[OURS][name].over(series[QEMU][name]))


def run(setup: Setup) -> Comparison:
    """Measure it."""
    rounds = setup.rounds or ROUNDS
    with tapnet.tap_network():
        good, skipped = able(candidates(setup), lambda candidate: _run(candidate, "mode=ping count=10"))
        series = alternate(good, rounds, measure, setup.say)
    return Comparison(
        name="net",
        title="one frame of a virtio-net guest over a tap",
        rounds=rounds,
        candidates=good,
        units=dict.fromkeys(KINDS, "us"),
        series=series,
        references=(QEMU,),
        aims=list(aims(series)),
        skipped=skipped,
        notes=NOTES,
    )
