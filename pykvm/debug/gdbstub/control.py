"""Stopping and resuming a machine for gdb, and gdb's breakpoints. Layer: debug.

The server's thread calls; hits, finished steps and crashes come from vCPU threads, which queue a Stop, ask themselves
to pause, and wake the server.
"""

from __future__ import annotations

from collections import deque

from pykvm.debug.breakpoints import STAY
from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.breakpoints import Breakpoint
    from pykvm.snapshot.state import Snapshot

SIGINT, SIGILL, SIGTRAP, SIGSEGV = 2, 4, 5, 11  # gdb's numbers are those of Linux here

# What a vCPU is to do: go on, or step as long as it is within a range of addresses; STEP is once
CONTINUE = None
STEP = range(0)
SOFTWARE, HARDWARE, WRITE, READ, ACCESS = range(5)  # the Z packet's types
_REASONS = {SOFTWARE: "swbreak", HARDWARE: "hwbreak", WRITE: "watch", READ: "rwatch", ACCESS: "awatch"}


class Stop:
    """Why the machine stopped: gdb's signal, the vCPU, and `reason`, a `name:value;` of the stop reply or nothing."""

    __slots__ = ("reason", "signal", "vcpu")

    def __init__(self, vcpu: Vcpu, signal: int, reason: str = "") -> None:
        self.vcpu = vcpu
        self.signal = signal
        self.reason = reason


class Control:
    """One machine, as gdb drives it. `attached` says whether there is a gdb; without one nothing is kept for it."""

    def __init__(self, machine: Machine, wake: Callable[[], object]) -> None:
        self.machine = machine
        self.debugger = machine.debugger
        self.attached = False
        self.stops: deque[Stop] = deque()
        self.crash: Outcome | None = None
        self.snapshots: dict[str, Snapshot] = {}  # of `monitor snapshot`
        self._wake = wake
        self._points: dict[tuple[int, int, int], list[Breakpoint]] = {}
        machine.keep_crash = self._keep_crash
        machine.on_end.append(wake)

    # -- the server's thread ------------------------------------------------------------------------------------

    def attach(self) -> None:
        """A gdb has come: stop the machine for it."""
        self.attached = True
        self.stop()
        self.stops.clear()

    def detach(self, *, resume: bool) -> None:
        """gdb has gone: its breakpoints go, and the machine goes on or stays as it is."""
        self.attached = False
        for points in self._points.values():
            for point in points:
                point.remove()
        self._points.clear()
        if resume:
            self.resume({vcpu.index: CONTINUE for vcpu in self.machine.vcpus})

    def stop(self) -> None:
        """Stop every vCPU and wait until all have."""
        self.machine.hold()

    def resume(self, actions: Mapping[int, range | None]) -> None:
        """Let vCPUs step or go on, those without an action stay. Raises DebugUnsupported when a step is impossible."""
        vcpus = [self.machine.vcpus[index] for index in actions]
        stepping = [(vcpu, within) for vcpu in vcpus if (within := actions[vcpu.index]) is not None]
        for vcpu, _ in stepping:
            self.debugger.check_step(vcpu)
        self.stops.clear()
        for vcpu in vcpus:
            vcpu.before_run = vcpu.before_run or self.debugger.stepper.out
        for vcpu, within in stepping:
            vcpu.before_run = self._stepper(within)
        if self.crash is not None:
            crash, self.crash = self.crash, None
            self.machine.finish(crash)
        if len(vcpus) == len(self.machine.vcpus):
            self.machine.release()
        else:
            self.machine.hold(vcpus)

    def insert(self, kind: int, address: int, length: int, vcpu: Vcpu) -> None:
        """A Z packet. Raises PykvmError when it cannot be done; then nothing is set."""
        key = (kind, address, length)
        if key in self._points:
            return
        made: list[Breakpoint] = []
        try:
            if kind in (SOFTWARE, HARDWARE):
                hardware = True if kind == HARDWARE else None
                made.append(self.debugger.add_breakpoint(address, self._on_hit(kind), hardware=hardware, vcpu=vcpu))
            else:
                for start, size in aligned_pieces(address, length):
                    on_hit = self._on_hit(kind, address)
                    made.append(self.debugger.add_watchpoint(start, on_hit, length=size, write_only=kind == WRITE))
        except BaseException:
            for point in made:
                point.remove()
            raise
        self._points[key] = made

    def remove(self, kind: int, address: int, length: int) -> None:
        """A z packet; one that is not set is as good as removed."""
        for point in self._points.pop((kind, address, length), ()):
            point.remove()

    # -- vCPU threads -------------------------------------------------------------------------------------------

    def _on_hit(self, kind: int, watched: int | None = None) -> Callable[[Vcpu, Breakpoint], Outcome | None]:
        reason = f"{_REASONS[kind]}:{'' if watched is None else f'{watched:x}'};"

        def on_hit(vcpu: Vcpu, point: Breakpoint) -> Outcome | None:
            self._report(Stop(vcpu, SIGTRAP, reason))
            return STAY

        return on_hit

    def _stepper(self, within: range) -> Callable[[Vcpu], Outcome | None]:
        """Steps until the vCPU leaves the range, comes to a breakpoint, or has something else to report."""

        def step(vcpu: Vcpu) -> Outcome | None:
            stops = len(self.stops)
            while True:
                outcome = self.debugger.stepper.step(vcpu)
                if outcome is not None or vcpu.before_run is not None:  # ended, or called away before it could step
                    return outcome
                pc = self.debugger.pc(vcpu)
                if pc not in within or len(self.stops) != stops or self.debugger.at(vcpu, pc):
                    self._report(Stop(vcpu, SIGTRAP))
                    return None

        return step

    def _report(self, stop: Stop) -> None:
        self.stops.append(stop)
        stop.vcpu.pause()
        self._wake()

    def _keep_crash(self, vcpu: Vcpu, outcome: Outcome) -> bool:
        """Show gdb a guest that cannot go on, instead of ending the run; it ends when gdb wants to go on."""
        if not self.attached or self.crash is not None:
            return False
        self.crash = outcome
        self.stops.append(Stop(vcpu, SIGSEGV if outcome.kind == "TRIPLE_FAULT" else SIGILL))
        self._wake()
        return True


def aligned_pieces(address: int, length: int) -> list[tuple[int, int]]:
    """[address, address + length) as (start, size) that debug registers can watch. Raises UsageError above four."""
    pieces: list[tuple[int, int]] = []
    end = address + length
    while address < end and len(pieces) <= 4:
        size = next(size for size in (8, 4, 2, 1) if address % size == 0 and address + size <= end)
        pieces.append((address, size))
        address += size
    if not 0 < len(pieces) <= 4:
        raise UsageError(f"{length} bytes do not fit the four debug registers")
    return pieces
