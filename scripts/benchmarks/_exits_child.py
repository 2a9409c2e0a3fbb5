"""A process of `scripts/bench exits`: _exits_child.py device|count|append COUNT RING3_ELF RING."""

from __future__ import annotations

import sys

from pykvm import BootConfig, Device, Pc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PORT = range(0x5000, 0x5001)  # no device of the PC's


class Counter(Device):
    """The least Python device."""

    name = "counter"

    def __init__(self) -> None:
        self.writes = 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Count an access."""
        self.writes += 1


class Drainer(Device):
    """What is behind a ring: it gets the byte that no longer fits, and empties the ring, as the serial port does."""

    name = "drainer"

    def __init__(self, drain: Callable[[], bytes]) -> None:
        self.drain = drain
        self.writes = 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Empty the ring."""
        self.drain()
        self.writes += 1


def main(kind: str, count: int, kernel: str, ring: str) -> None:
    """Run the guest; complain if not every exit arrived."""
    cmdline = f"port={PORT.start:#x} count={count} ring={ring}"
    # no irqchip, as the floor: with one, KVM itself takes less time for an exit
    with Pc(BootConfig(kernel, cmdline=cmdline), memory="512M", irqchip="none") as pc:
        device: Counter | Drainer = Counter()
        action = None
        if kind == "count":
            action = pc.actions.count(PORT)
        elif kind == "append":
            action, buffer = pc.actions.append(PORT.start)
            device = Drainer(buffer.drain)
        pc.attach(device, ports=PORT)
        outcome = pc.run(timeout=100)
        answered = device.writes + (action.hits if action is not None else 0)
    if outcome.kind != "DEBUG_EXIT" or outcome.code != 0 or answered != count:
        sys.exit(f"{outcome!r}, {answered} of {count} exits")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
