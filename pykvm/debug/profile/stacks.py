"""Samples of stacks, what they add up to, and the forms that other tools read. Layer: debug, plain data.

Formats: collapsed stacks ("outermost;...;innermost count", Brendan Gregg's FlameGraph) and speedscope's JSON
(https://www.speedscope.app/file-format-schema.json).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvm.debug.symbols import Symbols

    Stack = tuple[int, ...]  # innermost first

HALTED: Stack = (-1,)
WAITING: Stack = (-2,)
MARKERS = {-1: "(halted)", -2: "(waits for SIPI)"}
MAX_STACKS = 1 << 17  # a guest that never calls twice from the same place must not fill the host's memory
SCHEMA = "https://www.speedscope.app/file-format-schema.json"


class Profile:
    """How often each stack of each vCPU was seen."""

    def __init__(self, rate_hz: float) -> None:
        self.rate_hz = rate_hz
        self.samples: Counter[tuple[int, Stack]] = Counter()
        self.total = 0

    def add(self, vcpu: int, stack: Stack) -> None:
        """Count one sample; of too many different stacks only the innermost frame is kept."""
        self.total += 1
        if (vcpu, stack) not in self.samples and len(self.samples) >= MAX_STACKS:
            stack = stack[:1] if (vcpu, stack[:1]) in self.samples else (0,)
        self.samples[vcpu, stack] += 1

    def named(self, symbols: Symbols) -> Counter[tuple[str, ...]]:
        """Stacks as names, outermost first and the vCPU before them.

        With symbols a stack ends where an address has none: code without frame pointers leaves anything in RBP.
        """
        known = len(symbols) > 0
        found: Counter[tuple[str, ...]] = Counter()
        for (vcpu, stack), count in self.samples.items():
            names = [_name(symbols, stack[0])]
            for back in stack[1:]:
                if known and symbols.find(back - 1) is None:
                    break
                names.append(_name(symbols, back - 1))  # the call, not what is behind it
            found[(f"vCPU {vcpu}", *reversed(names))] += count
        return found

    # -- for people ---------------------------------------------------------------------------------------------

    def text(self, symbols: Symbols, rows: int = 20) -> str:
        """The functions with the most samples: in them, and in them or what they called."""
        if not self.total:
            return "no samples: the guest ended before the first one\n"
        alone: Counter[str] = Counter()
        with_callees: Counter[str] = Counter()
        for stack, count in self.named(symbols).items():
            alone[stack[-1]] += count
            for name in set(stack[1:]):
                with_callees[name] += count
        lines = [f"{self.total} samples at {self.rate_hz:g} Hz", f"{'self':>7} {'total':>7}  function"]
        order = sorted(with_callees, key=lambda name: (-alone[name], -with_callees[name], name))
        for name in order[:rows]:
            lines.append(f"{alone[name] / self.total:>7.1%} {with_callees[name] / self.total:>7.1%}  {name}")
        if len(order) > rows:
            lines.append(f"{'':17}and {len(order) - rows} more")
        return "\n".join(lines) + "\n"

    # -- for programs -------------------------------------------------------------------------------------------

    def collapsed(self, symbols: Symbols) -> str:
        """Collapsed stacks, a line each."""
        rows = [
            f"{';'.join(name.replace(';', ':') for name in stack)} {count}"
            for stack, count in sorted(self.named(symbols).items())
        ]
        return "\n".join(rows) + "\n" if rows else ""

    def speedscope(self, symbols: Symbols, name: str = "pykvm") -> str:
        """speedscope's JSON: one sampled profile for each vCPU; weights are counts of samples."""
        frames: dict[str, int] = {}
        vcpus: dict[str, list[tuple[list[int], int]]] = {}
        for (vcpu, *stack), count in sorted(self.named(symbols).items()):
            indices = [frames.setdefault(each, len(frames)) for each in stack]
            vcpus.setdefault(vcpu, []).append((indices, count))
        profiles = [
            {
                "type": "sampled",
                "name": vcpu,
                "unit": "none",
                "startValue": 0,
                "endValue": sum(count for _, count in stacks),
                "samples": [indices for indices, _ in stacks],
                "weights": [count for _, count in stacks],
            }
            for vcpu, stacks in vcpus.items()
        ]
        shared = {"frames": [{"name": each} for each in frames]}
        return json.dumps(
            {"$schema": SCHEMA, "name": name, "exporter": "pykvm", "shared": shared, "profiles": profiles}
        )


def _name(symbols: Symbols, address: int) -> str:
    if address in MARKERS:
        return MARKERS[address]
    found = symbols.find(address)
    return found[0].name if found else hex(address)
