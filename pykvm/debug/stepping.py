"""Executing one instruction, and getting over a breakpoint without missing it. Layer: debug.

While a vCPU executes the instruction under a software breakpoint, the breakpoint is not in memory: another vCPU would
run through. So the others are parked, outside the guest, for that one instruction.
"""

from __future__ import annotations

import errno
import threading

from pykvm._native import ffi, lib
from pykvm.errors import DebugUnsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.breakpoints import Debugger
    from pykvm.debug.traps import Site

LONGEST_WAY_OUT = 16  # steps; a guest that jumps about inside of two bytes has to live with what it gets
LOOK_AGAIN_S = 0.01  # whether a vCPU that was asked to park has left the guest for another reason


class Parking:
    """At most one vCPU runs while it holds this; the others wait for it on their own threads."""

    def __init__(self, vcpus: Sequence[Vcpu]) -> None:
        self._vcpus = vcpus
        self._changed = threading.Condition()  # guards the rest
        self._owner: Vcpu | None = None
        self._parked: set[int] = set()

    def enter(self, vcpu: Vcpu) -> None:
        """Wait until `vcpu` is the only one that can be in the guest."""
        with self._changed:
            self._wait_for_others(vcpu)
            self._owner = vcpu
        asked: set[int] = set()
        with self._changed:
            while any(self._is_loose(other, asked) for other in self._vcpus if other is not vcpu):
                self._changed.wait(LOOK_AGAIN_S)

    def _is_loose(self, other: Vcpu, asked: set[int]) -> bool:
        if not other.running or other.index in self._parked:
            return False
        if other.index not in asked:
            asked.add(other.index)
            other.post(lambda: self._park(other))
        return True

    def leave(self) -> None:
        """Let the others go on."""
        with self._changed:
            self._owner = None
            self._changed.notify_all()

    def _park(self, vcpu: Vcpu) -> None:
        with self._changed:
            self._wait_for_others(vcpu)

    def _wait_for_others(self, vcpu: Vcpu) -> None:
        self._parked.add(vcpu.index)
        self._changed.notify_all()
        while self._owner is not None and self._owner is not vcpu:
            self._changed.wait()
        self._parked.discard(vcpu.index)


class Stepper:
    """Single steps of one machine's vCPUs. Every method runs on the vCPU's thread, or while it is paused."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self._parking = Parking(debugger.machine.vcpus)

    def over(self, vcpu: Vcpu, pc: int) -> Outcome | None:
        """Execute the instruction at `pc`, if the vCPU is still there and a breakpoint is too."""
        if self._debugger.pc(vcpu) != pc or not self._debugger.at(vcpu, pc):
            return None
        outcome = self.step(vcpu)
        return outcome if outcome is not None or vcpu.before_run is not None else self.out(vcpu)

    def out(self, vcpu: Vcpu) -> Outcome | None:
        """Step until the vCPU is not within the bytes of a breakpoint: a trap may be longer than its instruction."""
        for _ in range(LONGEST_WAY_OUT):
            if self._debugger.site_around(vcpu, self._debugger.pc(vcpu)) is None:
                break
            outcome = self.step(vcpu)
            if outcome is not None or vcpu.before_run is not None:
                return outcome
        return None

    def step(self, vcpu: Vcpu) -> Outcome | None:
        """Execute one instruction, whatever breakpoints are on it.

        A vCPU that is called away before it has done so makes up for it when it next enters the guest.
        """
        return self._step(vcpu, out_of_trap=False)

    def _step(self, vcpu: Vcpu, *, out_of_trap: bool) -> Outcome | None:
        debugger = self._debugger
        pc = debugger.pc(vcpu)
        site = debugger.site(vcpu, pc) or debugger.site_around(vcpu, pc)
        debug = debugger.guest_debug[vcpu.index]
        debug.suspended = frozenset(debugger.slots_at(pc))
        if site is not None:
            self._parking.enter(vcpu)
            debugger.traps.lift(site)
        try:
            done, outcome = self._one(vcpu)
            # a trap of several bytes may hide the next instruction, too
            while out_of_trap and site is not None and done and outcome is None and self._inside(vcpu, pc, site):
                done, outcome = self._one(vcpu)
        finally:
            if site is not None:
                debugger.traps.plant(site)
                self._parking.leave()
            debug.suspended = frozenset()
            debugger.apply(vcpu)
        if not done:
            vcpu.before_run = lambda vcpu: self.over(vcpu, pc)
        return outcome

    def _inside(self, vcpu: Vcpu, start: int, site: Site) -> bool:
        return start < self._debugger.pc(vcpu) < start + len(site.code)

    def _one(self, vcpu: Vcpu) -> tuple[bool, Outcome | None]:
        """(whether the instruction was executed, what ended the run)."""
        debugger, state = self._debugger, vcpu.state
        debugger.check_step(vcpu)
        debug = debugger.guest_debug[vcpu.index]
        debug.stepping = True
        debugger.apply(vcpu)
        table, state.table = state.table, ffi.NULL  # C would go on after the accesses that it answers
        rip, run = vcpu.regs.rip, lib.pk_run
        try:
            while True:
                key = run(state)
                if key == lib.KVM_EXIT_DEBUG:
                    return True, debugger.stepped(vcpu)
                if key != -errno.EINTR:
                    if (outcome := vcpu.dispatch(key)) is not None:
                        return True, outcome
                    run = lib.pk_settle  # KVM's emulator does not stop after an access that left KVM
                elif run is lib.pk_settle:
                    if vcpu.regs.rip != rip:
                        return True, None
                    run = lib.pk_run  # a string instruction goes on
                elif vcpu.on_own_thread() and vcpu.called_away():
                    return False, None
        finally:
            state.table = table
            debug.stepping = False


def check_step(vcpu: Vcpu, step: bool, user_step: bool) -> None:
    """Raises DebugUnsupported when KVM would not come back after one instruction of this vCPU."""
    ring = vcpu.sregs.ss.dpl
    if not (user_step if ring == 3 else step):
        raise DebugUnsupported(f"this host's KVM cannot single-step ring {ring}")
