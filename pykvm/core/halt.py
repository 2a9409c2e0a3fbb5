"""Finds a guest that can never wake again. Layer: core.

With an in-kernel local APIC, HLT blocks inside KVM and KVM_RUN never returns, also when interrupts are off. From time
to time (0.5 ms after the start, then ever more rarely, at least twice a second) the I/O thread asks vCPU 0, which
costs one kick. Only if that one is halted for good are all vCPUs stopped together and examined; if none can wake, the
run ends with HALTED, otherwise they go on.

A vCPU can never wake when it is halted with RFLAGS.IF = 0 and no event is pending, or when it waits for an INIT or SIPI
that no other vCPU is left to send. Only the host could still inject an NMI: whoever does that turns `halt_detection`
off.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.core.outcome import Outcome
from pykvm.x86.segments import RFLAGS_IF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.iothread import Timer
    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu

FIRST_CHECK_S = 0.0005
LONGEST_GAP_S = 0.4


def can_never_wake(vcpu: Vcpu) -> bool:
    """Whether only another vCPU could wake this one, as things stand. Call on its thread, or while it is paused."""
    state = vcpu.fd.get_mp_state()
    if state in (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED):
        return True
    if state != lib.KVM_MP_STATE_HALTED or vcpu.fd.get_regs().rflags & RFLAGS_IF:
        return False
    events = vcpu.fd.get_events()
    return not (events.nmi.pending or events.nmi.injected or events.smi.pending or events.exception.pending)


class HaltWatch:
    """The timer and the two steps of the check, for one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._timer: Timer | None = None
        self._gap = FIRST_CHECK_S

    def start(self) -> None:
        """Begin to look, often at first."""
        self.stop()
        self._gap = FIRST_CHECK_S
        self._arm()

    def stop(self) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self._machine.io.call_later(self._gap, self._ask_first)
        self._gap = min(self._gap * 2, LONGEST_GAP_S)

    def _ask_first(self) -> None:
        first = self._machine.vcpus[0]
        if self._machine.running:
            if not self._machine.held:
                first.post(lambda: self._machine.io.call_soon(self._check_all) if can_never_wake(first) else None)
            self._arm()

    def _check_all(self) -> None:
        machine = self._machine
        if not machine.try_control():
            return  # somebody else is pausing or closing: the timer comes again
        try:
            if machine.held:
                return  # whom a debugger has stopped, it may wake
            machine.freeze()
            if machine.running and all(can_never_wake(vcpu) for vcpu in machine.vcpus):
                machine.finish(Outcome("HALTED", vcpu=0, detail="all vCPUs halted with interrupts off"))
            machine.thaw()
        finally:
            machine.release_control()
