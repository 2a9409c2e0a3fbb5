"""A process of `scripts/bench lifecycle`: _lifecycle_child.py KIND ROUNDS [KERNEL]; prints its figures as JSON.

KIND: none, split or kernel (the irqchip of a bare Machine), none-stepped (the same by run_once, without a thread),
pc (a Pc that boots KERNEL).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from functools import partial
from time import perf_counter

from pykvm import Machine, Pc
from pykvm.core import reaper
from pykvm.x86.states import real_mode

MEMORY = "512M"
SETTLED_AFTER = 100  # rounds until imports, caches and the allocator's arenas are what they stay
HLT = b"\xf4"


def one_bare(irqchip: str) -> None:
    """A Machine whose guest is a single HLT, at 0x10000 as the floor has it."""
    with Machine(memory=MEMORY, irqchip=irqchip) as vm:
        vm.memory.write(0x10000, b"\xfa" + HLT if irqchip != "none" else HLT)  # cli first: it is to end for good
        vm.vcpus[0].load_state(real_mode(0x1000, 0))
        outcome = vm.run(timeout=5)
    if outcome.kind != "HALTED":
        sys.exit(f"{outcome!r}")


def one_stepped() -> None:
    """The same on this thread."""
    with Machine(memory=MEMORY, irqchip="none") as vm:
        vm.memory.write(0x10000, HLT)
        vm.vcpus[0].load_state(real_mode(0x1000, 0))
        outcome = vm.vcpus[0].run_once().outcome
    if outcome is None or outcome.kind != "HALTED":
        sys.exit(f"{outcome!r}")


def one_pc(kernel: str) -> None:
    """A PC that boots a kernel which prints a line and halts."""
    with Pc(kernel, memory=MEMORY) as pc:
        outcome = pc.run(timeout=5)
        text = pc.console.text
    if outcome.kind != "HALTED" or not text.endswith("mode\r\n"):
        sys.exit(f"{outcome!r} {text!r}")


def resources() -> dict[str, int]:
    """What must not grow."""
    reaper.drain()
    with open("/proc/self/statm", encoding="ascii") as stream:
        pages = int(stream.read().split()[1])
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "rss_kib": pages * os.sysconf("SC_PAGESIZE") // 1024,
    }


def main(kind: str, rounds: int, *kernel: str) -> None:
    """Time every round."""
    step = partial(one_pc, *kernel) if kind == "pc" else partial(one_bare, kind)
    if kind == "none-stepped":
        step = partial(one_stepped)
    times, settled, began = [], resources(), perf_counter()
    for number in range(rounds):
        if number == min(SETTLED_AFTER, rounds - 1):
            settled = resources()
        started = perf_counter()
        step()
        times.append((perf_counter() - started) * 1e6)
    reaper.drain()
    whole = (perf_counter() - began) * 1e6 / rounds
    growth = {name: value - settled[name] for name, value in resources().items()}
    print(json.dumps({"median_us": statistics.median(times), "all_us": whole, "growth": growth}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
