"""What tracing every exit costs, beside the same run untraced: a guest that writes to a port in a short loop."""

from __future__ import annotations

from benchmarks import peers
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.measure import Run
    from benchmarks.peers import Setup

ROUNDS = 9
FEW, MANY = 10_000, 60_000
COUNT = "{count}"
FLOOR, OFF, ON = "floor", "pykvm, not traced", "pykvm, traced"
NOTES = (
    f"Each figure is (time of {MANY} exits - time of {FEW} exits) / {MANY - FEW}, of two whole processes one after "
    "the other. A C action answers the exits in all of pykvm's runs, as the cheapest kind of exit shows the cost best.",
    "Traced: a 64-byte record of each exit with the guest's RIP (KVM_CAP_SYNC_REGS), drained to a file by the I/O "
    "thread: CPU time includes that thread, wall time the part on the vCPU's thread and, on few CPUs, the other's.",
    "Not traced is the shipped code with tracing off; the floor (a loop in C without any hook) stands beside it: what "
    "off costs is inside the difference to it.",
)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    elf, ring = peers.guest("ring3.elf"), setup.options["ring"]
    path = str(setup.folder / "trace")

    def ours(kind: str) -> list[str]:
        return setup.child("_trace_child.py", kind, COUNT, elf, ring, path)

    return [
        Candidate(FLOOR, [str(peers.FLOOR), elf, f"port=0x5000 count={COUNT} ring={ring}"], 1),
        Candidate(OFF, ours("off"), environment=setup.environment),
        Candidate(ON, ours("on"), environment=setup.environment),
    ]


def _run(candidate: Candidate, count: int) -> Run:
    command = [word.replace(COUNT, str(count)) for word in candidate.command]
    return spawn(Candidate(candidate.name, command, candidate.status, environment=candidate.environment), 120)


def measure(candidate: Candidate) -> dict[str, float]:
    """Microseconds of one exit."""
    few, many = _run(candidate, FEW), _run(candidate, MANY)
    scale = 1e6 / (MANY - FEW)
    return {"wall": (many.wall_s - few.wall_s) * scale, "CPU": (many.cpu_s - few.cpu_s) * scale}


def run(setup: Setup) -> Comparison:
    """Measure it."""
    good, skipped = able(candidates(setup), lambda candidate: _run(candidate, 1000))
    if missing := {OFF, ON} & set(skipped):
        raise BenchError("; ".join(f"{name}: {skipped[name]}" for name in missing))
    rounds = setup.rounds or ROUNDS
    series = alternate(good, rounds, measure, setup.say)
    aims = []
    for quantity in ("wall", "CPU"):
        more = series[ON][quantity].minus(series[OFF][quantity])
        aims.append(Aim(f"{ON} - {OFF}, {quantity}, aim 1.5 us", more, "us"))
        if FLOOR in series:
            aims.append(
                Aim(f"{OFF} / {FLOOR}, {quantity}, aim 1.02", series[OFF][quantity].over(series[FLOOR][quantity]))
            )
    return Comparison(
        name="trace",
        title=f"one port-out exit of a guest in ring {setup.options['ring']}, recorded or not",
        rounds=rounds,
        candidates=good,
        units={"wall": "us", "CPU": "us"},
        series=series,
        references=(OFF,),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
