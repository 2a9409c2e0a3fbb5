"""`Machine.run_until`: a guest runs up to a text, a port write or an instruction. Layer: live objects.

A condition that the guest meets by an exit (a port write, a breakpoint) stops it right there; console output is seen a
moment later. Every vCPU is paused then.
"""

from __future__ import annotations

from pykvm.core.device import Device
from pykvm.core.outcome import Outcome
from pykvm.errors import ConfigError, ExpectError
from pykvm.testing.waiting import run_while_waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable

    from pykvm.core.bus import Region
    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.breakpoints import Breakpoint
    from pykvm.testing.talk import Pattern


class Reached:
    """Which condition of `run_until` was met. `condition` is console, rip or port_write.

    match    console: the re.Match
    value    port_write: what was written, of `size` bytes
    vcpu     rip: the index of the vCPU that is there
    """

    __slots__ = ("condition", "match", "size", "value", "vcpu")

    def __init__(
        self,
        condition: str,
        *,
        match: re.Match[str] | None = None,
        value: int | None = None,
        size: int | None = None,
        vcpu: int | None = None,
    ) -> None:
        self.condition = condition
        self.match = match
        self.value = value
        self.size = size
        self.vcpu = vcpu

    def __repr__(self) -> str:
        facts = {"match": self.match and self.match[0], "value": self.value, "vcpu": self.vcpu}
        return f"<Reached {self.condition}" + "".join(f" {k}={v!r}" for k, v in facts.items() if v is not None) + ">"


class _PortWatch(Device):
    """Stands before a device and sees what is written to one of its ports."""

    def __init__(self, behind: Device | None, offset: int, on_write: Callable[[int, int], Outcome | None]) -> None:
        self.name = "port watch"
        self.behind = behind
        self._offset = offset
        self._on_write = on_write

    def read(self, offset: int, size: int) -> int:
        return self.behind.read(offset, size) if self.behind is not None else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        outcome = self.behind.write(offset, size, value) if self.behind is not None else None
        reached = self._on_write(size, value) if offset == self._offset else None
        return outcome or reached


class _Conditions:
    """What to wait for, put up and taken down again on a paused machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reached: Reached | None = None
        self.patterns: list[re.Pattern[str]] = []
        self.names: list[str] = []
        self._region: Region | None = None
        self._watch: _PortWatch | None = None
        self._breakpoint: Breakpoint | None = None

    def meet(self, reached: Reached) -> Outcome:
        """On a vCPU's thread: the first condition that is met counts; the Outcome ends the run."""
        self.reached = self.reached or reached
        return Outcome("STOPPED", detail=f"run_until: {reached.condition}")

    def done(self) -> bool:
        """Whether one has been met; looks at the console."""
        if self.reached is None and self.patterns:
            match = self.machine.console.talk.seek(self.patterns)
            if match is not None:
                self.reached = Reached("console", match=match)
        return self.reached is not None

    # -- ports --------------------------------------------------------------------------------------------------

    def watch_port(self, port: int, value: int | None) -> None:
        """Meet the condition when the guest writes (this value) to the port."""

        def on_write(size: int, written: int) -> Outcome | None:
            if value is not None and written != value:
                return None
            return self.meet(Reached("port_write", value=written, size=size))

        bus = self.machine.bus
        self._region = bus.ports.find(port, 1)
        if self._region is None:
            self._watch = _PortWatch(None, 0, on_write)
            bus.attach(self._watch, range(port, port + 1), None, "port watch")
        else:
            self._watch = _PortWatch(self._region.device, port - self._region.base, on_write)
            self._region.device = self._watch
            bus.routes.clear()
        # C would answer some writes before the bus sees them; the guest notices nothing when it does not
        self.machine.actions.suspended = True
        self.names.append(f"a write to port {port:#x}" + (f" of {value:#x}" if value is not None else ""))

    def _unwatch_port(self) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self.machine.actions.suspended = False
        if self._region is None:
            self.machine.detach(watch)
        else:
            assert watch.behind is not None
            self._region.device = watch.behind
            self.machine.bus.routes.clear()

    # -- instructions -------------------------------------------------------------------------------------------

    def break_at(self, where: int | str) -> None:
        """Meet the condition when a vCPU is about to execute this address."""

        def on_hit(vcpu: Vcpu, breakpoint: Breakpoint) -> Outcome:
            return self.meet(Reached("rip", vcpu=vcpu.index))

        self._breakpoint = self.machine.breakpoint(where, on_hit)
        self.names.append(f"the instruction at {where if isinstance(where, str) else hex(where)}")

    def take_down(self) -> None:
        """Leave the machine as it was."""
        self._unwatch_port()
        if self._breakpoint is not None:
            self._breakpoint.remove()


def run_until(
    machine: Machine,
    console: Pattern | None,
    rip: int | str | None,
    port_write: int | tuple[int, int] | None,
    timeout: float | None,
) -> Reached:
    """See Driving.run_until."""
    if console is None and rip is None and port_write is None:
        raise ConfigError("run_until", "say what to wait for: console=, rip= or port_write=")
    if machine.running:
        machine.pause()
    conditions = _Conditions(machine)
    try:
        if console is not None:
            conditions.patterns = machine.console.talk.compile_pattern_list(console)
            conditions.names += [f"the text {pattern.pattern!r}" for pattern in conditions.patterns]
        if port_write is not None:
            port, value = port_write if isinstance(port_write, tuple) else (port_write, None)
            conditions.watch_port(_checked_port(port), value)
        if rip is not None:
            conditions.break_at(rip)
        outcome = None if conditions.done() else run_while_waiting(machine, conditions.done, timeout)
        conditions.done()  # the text may have come with the guest's end
    finally:
        conditions.take_down()
    if conditions.reached is None:
        what = f"ended with {outcome}" if outcome is not None else f"ran for {timeout} s"
        names = " or ".join(conditions.names)
        raise ExpectError(f"the guest {what} and did not come to {names}", outcome, machine.console.talk.tail())
    return conditions.reached


def _checked_port(port: int) -> int:
    if not 0 <= port <= 0xFFFF:
        raise ConfigError("port_write", f"{port:#x} is no port: they go from 0 to 0xffff")
    return port
