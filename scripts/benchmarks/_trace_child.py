"""A process of `scripts/bench trace`: _trace_child.py off|unhooked|rip|on COUNT RING3_ELF RING FILE.

Prints the seconds that the guest's run took.
"""

from __future__ import annotations

import sys
import time

from pykvm import BootConfig, Pc

PORT = range(0x5000, 0x5001)  # no device of the PC's


def main(kind: str, count: int, kernel: str, ring: str, path: str) -> None:
    """Run the guest; complain if not every exit is in the trace."""
    cmdline = f"port={PORT.start:#x} count={count} ring={ring}"
    with Pc(BootConfig(kernel, cmdline=cmdline), memory="64M", irqchip="none") as pc:
        action = pc.actions.count(PORT)
        trace = pc.trace_exits(path) if kind == "on" else None
        started = time.perf_counter()
        outcome = pc.run(timeout=100)
        took = time.perf_counter() - started
        if trace is not None:
            trace.close()
            if trace.written + trace.lost < count:
                sys.exit(f"{trace.written} exits written, {trace.lost} lost, of {count}")
            print(f"lost {trace.lost}")
        if outcome.kind != "DEBUG_EXIT" or action.hits != count:
            sys.exit(f"{outcome!r}, {action.hits} of {count} exits")
    print(f"took {took}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
