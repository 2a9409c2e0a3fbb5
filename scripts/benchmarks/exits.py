"""The price of one exit: a guest that writes to a port in a loop of three instructions."""

from __future__ import annotations

from benchmarks import peers
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.measure import Run
    from benchmarks.peers import Setup

ROUNDS = 7
FEW, MANY = 20_000, 100_000
COUNT = "{count}"  # in a command: the number of exits
DEBUG_EXIT_0 = 1
NOTES = (
    f"Each figure is (time of {MANY} exits - time of {FEW} exits) / {MANY - FEW}, of two whole processes one after "
    "the other: whatever does not depend on the number of exits drops out.",
    "The floor's loop drops the byte. pykvm's C action counts it (COUNT) or appends it to a ring that Python drains "
    "when it is full (APPEND: as the console works). pykvm's Python device is an attached object whose write() counts. "
    "QEMU's isa-debugcon (port 0xe9) hands it to a null chardev.",
    "Floor and pykvm run without an irqchip here, QEMU with KVM's: with it KVM has less to exchange with the VMM, and "
    "an exit costs about a tenth less, under pykvm as well.",
    "Ring 3 runs natively on every host. Where KVM interprets ring 0 (pykvm doctor says so), --ring 0 is the cheaper "
    "exit, and shows the VMM's own share better.",
    "CPU is user and system time, the guest's included: trust it more than wall time when the machine is busy.",
)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    elf, ring = peers.guest("ring3.elf"), setup.options["ring"]

    def ours(kind: str) -> list[str]:
        return setup.child("_exits_child.py", kind, COUNT, elf, ring)

    return [
        Candidate("floor", [str(peers.FLOOR), elf, f"port=0x80 count={COUNT} ring={ring}"], DEBUG_EXIT_0),
        Candidate("pykvm C action COUNT", ours("count"), environment=setup.environment),
        Candidate("pykvm C action APPEND", ours("append"), environment=setup.environment),
        Candidate("pykvm Python device", ours("device"), environment=setup.environment),
        Candidate(
            "QEMU isa-debugcon",
            peers.qemu(
                *("-chardev", "null,id=nowhere", "-device", "isa-debugcon,iobase=0xe9,chardev=nowhere"),
                *("-kernel", elf, "-append", f"port=0xe9 count={COUNT} ring={ring}"),
            ),
            DEBUG_EXIT_0,
        ),
    ]


def _run(candidate: Candidate, count: int) -> Run:
    command = [word.replace(COUNT, str(count)) for word in candidate.command]
    return spawn(
        Candidate(candidate.name, command, candidate.status, candidate.prints, candidate.environment), timeout_s=120
    )


def measure(candidate: Candidate) -> dict[str, float]:
    """Microseconds of one exit."""
    few, many = _run(candidate, FEW), _run(candidate, MANY)
    scale = 1e6 / (MANY - FEW)
    return {"wall": (many.wall_s - few.wall_s) * scale, "CPU": (many.cpu_s - few.cpu_s) * scale}


def run(setup: Setup) -> Comparison:
    """Measure it."""
    good, skipped = able(candidates(setup), lambda candidate: _run(candidate, 1000))
    if "floor" in skipped:
        raise BenchError(f"floor: {skipped['floor']}")
    rounds = setup.rounds or ROUNDS
    series = alternate(good, rounds, measure, setup.say)
    aims = []
    for quantity in ("wall", "CPU"):
        floor = series["floor"][quantity]
        for name in ("pykvm C action COUNT", "pykvm C action APPEND"):
            if name in series:
                aims.append(Aim(f"{name} / floor, {quantity}, aim 1.02", series[name][quantity].over(floor)))
        if "pykvm Python device" in series:
            more = series["pykvm Python device"][quantity].minus(floor)
            aims.append(Aim(f"pykvm Python device - floor, {quantity}, aim 1.00 us", more, "us"))
    return Comparison(
        name="exits",
        title=f"one port-out exit of a guest in ring {setup.options['ring']}",
        rounds=rounds,
        candidates=good,
        units={"wall": "us", "CPU": "us"},
        series=series,
        references=("floor", "QEMU isa-debugcon"),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
