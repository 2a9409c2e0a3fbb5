"""What a device is. Layer: core; imports only Outcome.

A device sees offsets into its own region, never addresses, and never the VM. It gets its IrqLine and its sinks in
its constructor. Accesses are 1, 2, 4 or 8 bytes wide; the bus guarantees 0 <= offset and offset + size <= length of
the region, masks what `read` returns to the access size, and hands `write` an unsigned value of that size.

`read` and `write` run on the vCPU thread that made the access: a device of an SMP machine, or one that also hears
from the I/O thread, protects its own state with a lock, and calls nothing but its IrqLine and sinks under it.
"""

from __future__ import annotations

from pykvm.core.state import STATELESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from pykvm.core.outcome import Outcome
    from pykvm.core.state import Shape, State

    class Closable(Protocol):
        """A Device, or a VirtioDevice."""

        def close(self) -> None: ...


class Device:
    """Base class with the behaviour of an empty bus; any object with these methods will do."""

    name = "device"
    # What it saves, see core.state: a device with state of its own declares it. None: a tool, no part of the machine,
    # that no snapshot knows of.
    shape: Shape | None = STATELESS

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`."""
        return (1 << (size * 8)) - 1

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """Take `value`; an Outcome returned here ends the run with it."""
        return None

    def reset(self) -> None:
        """Return to the power-on state (machine reset)."""

    def hold(self) -> None:
        """Touch neither guest memory nor the state that `save` gives until `release`; both come from one thread."""

    def release(self) -> None:
        """Undo `hold`."""

    def check_snapshot(self, *, to_file: bool) -> None:
        """Raise SnapshotError when it cannot take part in a snapshot, in memory or for a file."""

    def save(self) -> State:
        """Its state as plain data; the vCPUs are paused."""
        return self.shape.take(self) if self.shape is not None else {}

    def restore(self, state: State) -> None:
        """Continue from what `save` gave, here or on another object; checked against `shape` already."""
        if self.shape is not None:
            self.shape.put(self, state)

    def close(self) -> None:
        """Release host resources (files, threads); called once, when the machine closes."""


class IrqLine:
    """One interrupt input of the machine (a GSI), as a device holds it.

    `set(level)` drives the line; only changes reach the interrupt controller. `pulse()` makes one edge. Safe to call
    from any thread that holds its device's lock (the device serialises its own line).
    """

    __slots__ = ("_drive", "gsi", "level")

    def __init__(self, gsi: int, drive: Callable[[int, bool], None]) -> None:
        self.gsi = gsi
        self.level = False
        self._drive = drive

    def set(self, level: bool) -> None:
        """Drive the line high or low."""
        if level is not self.level:
            self.level = level
            self._drive(self.gsi, level)

    def pulse(self) -> None:
        """One rising edge, for edge-triggered lines."""
        self.set(True)
        self.set(False)


class ClosedOnFailure:
    """`with ClosedOnFailure(devices): ...` closes those that are in the list by then, if the block raises."""

    def __init__(self, devices: Iterable[Closable]) -> None:
        self._devices = devices

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for device in self._devices:
                device.close()
