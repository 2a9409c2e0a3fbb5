"""`Machine.call`: a function of the guest, called from the host as a C compiler would. Layer: live objects.

The guest is stopped at some instruction; the call happens as if an interrupt came there: on the same stack below what
is in use, with every register put back afterwards. The function returns to a place that is mapped and executable, where
a breakpoint tells: where the guest stands. On hosts whose breakpoints are longer than the shortest instruction that may
hide what a branch goes to, so there it is the function's own first instruction. When the function itself runs through
that place (the guest stood in its `print`, or it is recursive), the stack pointer is another one, and it goes on.
"""

from __future__ import annotations

from contextlib import suppress

from pykvm._native import lib
from pykvm.core.outcome import Outcome
from pykvm.debug.bits import bitness, privilege_level
from pykvm.debug.code import linear_rip
from pykvm.errors import CallError, ConfigError, DebugUnsupported, KvmError, MachineStateError
from pykvm.testing.callframe import Frame
from pykvm.testing.waiting import run_while_waiting
from pykvm.x86.segments import RFLAGS_IF, RFLAGS_TF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.breakpoints import Breakpoint
    from pykvm.testing.callframe import Argument
    from pykvm.x86.segments import CpuState

RFLAGS_DF = 1 << 10  # clear on entry of a function, by the ABI
RETURNS = {f"{sign}{bits}": (sign == "i", bits) for sign in "ui" for bits in (8, 16, 32, 64)}
RETURNS |= {"bool": (False, 8), "void": (False, 0)}


class _Saved:
    """What the call changes on vCPU 0, to be put back: registers, FPU and vector state, events, whether it halts."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        fd = vcpu.fd
        self._vcpu, self._fd = vcpu, fd
        self._regs, self._sregs, self._events = fd.get_regs(), fd.get_sregs(), fd.get_events()
        self._xsave = fd.get_xsave(machine.vm.check_extension(lib.KVM_CAP_XSAVE2))
        self._mp_state = fd.get_mp_state() if machine.config.irqchip != "none" else None
        self._before_run, vcpu.before_run = vcpu.before_run, None  # a debugger's step over where the guest stands

    def make_runnable(self) -> None:
        """Out of HLT, and with no event half delivered: that one belongs to the place where the guest stands."""
        events = self._fd.get_events()
        for kind in (events.exception, events.interrupt, events.nmi):
            kind.injected = 0
        events.exception.pending = events.interrupt.shadow = 0
        self._fd.set_events(events)
        if self._mp_state is not None:
            self._fd.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)

    def restore(self) -> None:
        """Put everything back."""
        self._fd.set_sregs(self._sregs)
        self._fd.set_regs(self._regs)
        self._fd.set_xsave(self._xsave)
        self._fd.set_events(self._events)
        # The interrupt that a HLT waits for may have come during the call: wake it, as kernels expect at any time.
        if self._mp_state is not None and not self._regs.rflags & RFLAGS_IF:
            self._fd.set_mp_state(self._mp_state)
        self._vcpu.before_run = self._before_run


def call(
    machine: Machine,
    function: int | str,
    arguments: Sequence[Argument],
    returns: str | None,
    stack: int | None,
    timeout: float | None,
) -> int:
    """See Driving.call."""
    if returns is not None and returns not in RETURNS:
        raise ConfigError("returns", f"{returns!r} is none of {', '.join(RETURNS)}")
    if machine.running:
        raise MachineStateError("the machine is running: pause() it before call()")
    vcpu = machine.vcpus[0]
    state = vcpu.capture_state()
    _check_mode(machine, state)
    address = machine.debugger.resolve(function)
    place = linear_rip(state) if len(machine.debugger.support.trap.code) == 1 else address
    frame = Frame(machine.memory, state, stack, place - (state.cs.base if bitness(state) == 32 else 0))
    frame.push(arguments)
    name = function if isinstance(function, str) else machine.symbols.describe(address)
    saved = _Saved(machine, vcpu)
    try:
        saved.make_runnable()
        flags = state.gprs["rflags"] & ~(RFLAGS_TF | RFLAGS_DF)
        vcpu.regs.update(rip=address, rsp=frame.rsp, rflags=flags, **frame.registers)
        low, high = _run(machine, name, place, frame.returned_rsp, timeout)
    except BaseException:
        # How it failed matters more than that a vCPU that crashed need not take everything back. One that does not stop
        # must not be touched at all: its ioctls would wait for ever.
        if not vcpu.running:
            with suppress(KvmError):
                saved.restore()
        raise
    saved.restore()
    frame.copy_back()
    return _value(low, high, returns, frame.word)


def _check_mode(machine: Machine, state: CpuState) -> None:
    if bitness(state) == 16:
        raise MachineStateError("call() needs a guest in 32-bit or 64-bit mode; this one is in 16-bit mode")
    if privilege_level(state) == 3 and not machine.debugger.support.user_breakpoints:
        raise DebugUnsupported("call() while the guest is in ring 3: this host's KVM has no breakpoints there")


def _run(machine: Machine, name: str, return_address: int, returned_rsp: int, timeout: float | None) -> tuple[int, int]:
    """Run until the function has returned: its RAX and RDX. Raises CallError."""
    result: list[tuple[int, int]] = []

    def on_hit(vcpu: Vcpu, breakpoint: Breakpoint) -> Outcome | None:
        regs = vcpu.regs
        if vcpu.index or regs.rsp != returned_rsp:
            return None  # somebody else is there, or the function itself passes by
        result.append((regs.rax, regs.rdx))
        return Outcome("STOPPED", vcpu=0, detail=f"{name}() returned")

    breakpoint = machine.breakpoint(return_address, on_hit)
    try:
        outcome = run_while_waiting(machine, lambda: bool(result), timeout)
        if not result:
            raise _failure(machine, name, outcome, timeout)
    finally:
        breakpoint.remove()
    return result[0]


def _failure(machine: Machine, name: str, outcome: Outcome | None, timeout: float | None) -> CallError:
    where = machine.symbols.locate(linear_rip(machine.vcpus[0].capture_state()))
    if outcome is None:
        what = f"has not returned after {timeout:g} s; vCPU 0 is at {where}"
    else:
        what = f"ended the guest with {outcome} at {where}"
        if outcome.report is not None:
            what += f": {outcome.report.title}"
    return CallError(name, what, outcome, machine.console.talk.tail())


def _value(low: int, high: int, returns: str | None, word: int) -> int:
    signed, bits = RETURNS[returns] if returns is not None else (False, 8 * word)
    value = low if word == 8 else (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
    value &= (1 << bits) - 1
    if returns == "bool":
        return bool(value)
    return value - (1 << bits) if signed and value >> (bits - 1) else value
