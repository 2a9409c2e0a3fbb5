"""A machine's life in one process: create, run to the first HLT, close, many times."""

from __future__ import annotations

import json

from benchmarks import peers
from benchmarks.measure import Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.measure import Run
    from benchmarks.peers import Setup

ROUNDS = 5
TIMEOUT_S = 300
TRIAL = 3  # lives of the unmeasured first run
AIM = "pykvm Machine none"
NOTES = (
    f"Each round is one process per candidate with so many machines of {peers.MEMORY_MIB} MiB one after the other; its "
    "figure is the median life as the caller sees it.",
    "'all' is the whole time through the number of machines. It includes closing KVM's file descriptors, which with "
    "an in-kernel irqchip wait for grace periods of the kernel: pykvm does that on another thread.",
    "The floor and Machine none have no irqchip and run a single HLT; the floor sets no CPUID and no MSRs, and opens "
    "/dev/kvm once. 'stepped' drives the vCPU by run_once() on the caller's thread, as the floor does; run() has a "
    "thread for each vCPU. With an irqchip HLT is no exit: the end has to be found out. Pc is the whole PC with its "
    "devices and tables, booting hello.bin.",
    "growth is what the process has more of at the end than after 100 machines, everything closed.",
)


def candidates(setup: Setup, lives: int) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    kinds = {
        "pykvm Machine none": ("none", str(lives)),
        "pykvm Machine none, stepped": ("none-stepped", str(lives)),
        "pykvm Machine split": ("split", str(lives)),
        "pykvm Machine kernel": ("kernel", str(lives)),
        "pykvm Pc hello.bin": ("pc", str(lives), peers.guest("hello.bin")),
    }
    floor = [str(peers.FLOOR), "--mem", str(peers.MEMORY_MIB), "--json", "--lifecycle", str(lives)]
    return [
        Candidate("floor", floor),
        *(
            Candidate(name, setup.child("_lifecycle_child.py", *words), environment=setup.environment)
            for name, words in kinds.items()
        ),
    ]


def figures(run: Run, lives: int) -> dict[str, float]:
    """Microseconds and growth of one process."""
    found = json.loads(run.output)
    taken = {"median": found["median_us"], "all": found.get("all_us", run.wall_s * 1e6 / lives)}
    growth = found.get("growth", {})
    return taken | {f"growth {name.removesuffix('_kib')}": value for name, value in growth.items()}


def run(setup: Setup) -> Comparison:
    """Measure it."""
    lives = int(setup.options["lives"])
    _, skipped = able(candidates(setup, TRIAL), spawn)
    good = [candidate for candidate in candidates(setup, lives) if candidate.name not in skipped]
    rounds = setup.rounds or ROUNDS
    series = alternate(good, rounds, lambda each: figures(spawn(each, TIMEOUT_S), lives), setup.say)
    aims = []
    if "floor" in series and AIM in series:
        floor = series["floor"]["median"]
        for name in (AIM, "pykvm Machine none, stepped"):
            if name in series:
                aims.append(Aim(f"{name} / floor, aim 1.3", series[name]["median"].over(floor)))
    units = {"median": "us", "all": "us", "growth fds": "", "growth threads": "", "growth rss": "KiB"}
    return Comparison(
        name="lifecycle",
        title=f"create, run to HLT, close: {lives} machines in a process",
        rounds=rounds,
        candidates=good,
        units=units,
        series=series,
        references=("floor",),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
