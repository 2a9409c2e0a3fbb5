"""Breakpoints, watchpoints and single steps of a machine. Layer: debug.

`Machine.breakpoint` and its like end here, and so do gdb's. A vCPU that hits one calls the owner on its own thread,
between two instructions; then it steps over the instruction and goes on.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.core.device import Device
from pykvm.core.exits import on_fatal
from pykvm.core.outcome import Outcome
from pykvm.debug.guestdebug import ACCESS, DR6_SLOTS, SLOTS, WRITE, DebugRegister, GuestDebug
from pykvm.debug.hostdebug import INT3, OUT, debug_support
from pykvm.debug.stepping import Stepper, check_step
from pykvm.debug.traps import Traps
from pykvm.errors import ConfigError, DebugUnsupported
from pykvm.x86 import layout
from pykvm.x86.paging import Walk, walk
from pykvm.x86.segments import CR0_PE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.traps import Site

    OnHit = Callable[[Vcpu, "Breakpoint"], Outcome | None]

ANSWER_S = 5.0  # for a running vCPU to take a change of its debug registers
DEBUG_EXCEPTION, BREAKPOINT_EXCEPTION = 1, 3
STAY = Outcome("STOPPED", detail="stay")  # an on_hit's answer: leave the vCPU there, it has been told to pause


class Breakpoint:
    """One of a machine's. `kind` is software, hardware or watch; `hits` counts."""

    __slots__ = ("_debugger", "address", "gpa", "hits", "kind", "name", "on_hit", "once", "register")

    def __init__(self, debugger: Debugger, address: int, kind: str, on_hit: OnHit | None, *, once: bool) -> None:
        self._debugger = debugger
        self.address = address
        self.kind = kind
        self.on_hit = on_hit
        self.once = once
        self.name = ""
        self.hits = 0
        self.gpa: int | None = None
        self.register: DebugRegister | None = None

    def remove(self) -> None:
        """Take it away; from any thread, again without effect."""
        self._debugger.remove(self)

    def __repr__(self) -> str:
        return f"<Breakpoint {self.kind} {self.address:#x}{f' {self.name}' if self.name else ''}, {self.hits} hits>"


class TrapPort(Device):
    """The port that a software breakpoint writes to where KVM does not intercept INT3."""

    name = "breakpoints"

    shape = None  # no part of the guest's machine

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """A vCPU has executed the trap."""
        return self._debugger.on_port()


class Debugger:
    """What is set in one machine, and what happens when it is hit."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.support = debug_support()
        self.traps = Traps(machine.memory, self.support.trap)
        self.slots: list[Breakpoint | None] = [None] * SLOTS
        flags = machine.vm.check_extension(lib.KVM_CAP_SET_GUEST_DEBUG2)
        block_irq = bool(flags & getattr(lib, "KVM_GUESTDBG_BLOCKIRQ", 0))
        self.guest_debug = [GuestDebug(vcpu, block_irq) for vcpu in machine.vcpus]
        self.stepper = Stepper(self)
        self._closed = False
        self._next_debug = machine.hooks.debug
        machine.hooks.debug = self.on_debug
        machine.hooks.internal_error = self.on_internal_error
        machine.on_reset.append(self._on_reset)
        machine.on_close.append(self._on_close)
        if self.support.trap is OUT:
            port = range(layout.PORT_DEBUG_TRAP, layout.PORT_DEBUG_TRAP + 1)
            machine.attach(TrapPort(self), ports=port)

    # -- setting ------------------------------------------------------------------------------------------------

    def resolve(self, where: int | str) -> int:
        """A linear address. Raises SymbolError, ConfigError."""
        address = self.machine.symbols.resolve(where) if isinstance(where, str) else where
        if not 0 <= address < 1 << 64:
            raise ConfigError("breakpoint", f"{address:#x} is not a 64-bit address")
        return address

    def add_breakpoint(
        self,
        where: int | str,
        on_hit: OnHit | None,
        *,
        hardware: bool | None = None,
        once: bool = False,
        vcpu: Vcpu | None = None,
    ) -> Breakpoint:
        """See Machine.breakpoint. `vcpu` is whose page tables place a software breakpoint (None: the first one's)."""
        address, vcpu = self.resolve(where), vcpu or self.machine.vcpus[0]
        found, real_mode = self._ask(vcpu, address)
        if hardware is None:
            hardware = found.gpa is None
        made = Breakpoint(self, address, "hardware" if hardware else "software", on_hit, once=once)
        made.name = where if isinstance(where, str) else ""
        if hardware:
            if not self.support.breakpoints:
                raise DebugUnsupported("this host's KVM does not honour hardware breakpoints")
            self._take_slot(made, DebugRegister(address))
        else:
            if found.gpa is None:
                raise ConfigError("breakpoint", f"{address:#x} {found.reason}")
            made.gpa = found.gpa
            self.traps.add(found.gpa, made, self.support.real_trap if real_mode else None)
            self.sync()
        return made

    def plant(self, address: int, gpa: int, on_hit: OnHit) -> Breakpoint:
        """A software breakpoint for one hit at a known place; many of them, then one `sync`.

        Raises GuestAddressError, DebugUnsupported.
        """
        made = Breakpoint(self, address, "software", on_hit, once=True)
        made.gpa = gpa
        self.traps.add(gpa, made)
        return made

    def add_watchpoint(self, where: int | str, on_hit: OnHit | None, *, length: int, write_only: bool) -> Breakpoint:
        """See Machine.watchpoint."""
        address = self.resolve(where)
        if length not in (1, 2, 4, 8) or address % length:
            raise ConfigError(
                "watchpoint", f"{length} bytes at {address:#x}: watch 1, 2, 4 or 8 bytes, aligned to that"
            )
        if not self.support.watchpoints:
            raise DebugUnsupported("this host's KVM does not honour watchpoints")
        made = Breakpoint(self, address, "watch", on_hit, once=False)
        made.name = where if isinstance(where, str) else ""
        self._take_slot(made, DebugRegister(address, WRITE if write_only else ACCESS, length))
        return made

    def _take_slot(self, made: Breakpoint, register: DebugRegister) -> None:
        if None not in self.slots:
            raise DebugUnsupported("all four hardware breakpoints are in use: remove one")
        made.register = register
        self.slots[self.slots.index(None)] = made
        self.sync()

    def remove(self, old: Breakpoint) -> None:
        """See Breakpoint.remove."""
        if self._closed:
            return
        if old.gpa is not None:
            self.traps.remove(old.gpa, old)
        elif old in self.slots:
            self.slots[self.slots.index(old)] = None
            self.sync()

    def sync(self) -> None:
        """Tell every vCPU's KVM side; from a vCPU's thread the others hear of it as soon as they look."""
        inside = any(vcpu.on_own_thread() for vcpu in self.machine.vcpus)
        for vcpu in self.machine.vcpus:
            if inside and not vcpu.on_own_thread() and vcpu.running:
                vcpu.post(lambda vcpu=vcpu: self.apply(vcpu))  # type: ignore[misc]
            else:
                vcpu.call(lambda vcpu=vcpu: self.apply(vcpu), ANSWER_S)  # type: ignore[misc]

    def apply(self, vcpu: Vcpu) -> None:
        """Tell KVM what `vcpu` is debugged with; on its thread, or while it is paused."""
        if not self._closed:
            slots = [None if slot is None else slot.register for slot in self.slots]
            self.guest_debug[vcpu.index].apply(slots, self.support.trap is INT3 and len(self.traps) > 0)

    # -- finding ------------------------------------------------------------------------------------------------

    def translate(self, vcpu: Vcpu, linear: int) -> Walk:
        """The walk of the page tables that the vCPU uses now."""
        sregs = vcpu.sregs
        return walk(self.machine.memory, linear, cr0=sregs.cr0, cr3=sregs.cr3, cr4=sregs.cr4, efer=sregs.efer)

    def _ask(self, vcpu: Vcpu, linear: int) -> tuple[Walk, bool]:
        """(`translate`, whether the vCPU is in real mode), on its own thread; DebugUnsupported where none would hit."""
        found: list[tuple[Walk, bool]] = []

        def look() -> None:
            sregs = vcpu.sregs
            if sregs.ss.dpl == 3 and not self.support.user_breakpoints:
                raise DebugUnsupported("this host's KVM has no breakpoints in ring 3: stop the vCPU in ring 0")
            found.append((self.translate(vcpu, linear), not sregs.cr0 & CR0_PE))

        vcpu.call(look, ANSWER_S)
        return found[0]

    def pc(self, vcpu: Vcpu) -> int:
        """The linear address of the next instruction."""
        sregs = vcpu.sregs
        linear: int = sregs.cs.base + vcpu.regs.rip
        return linear if sregs.cs.l else linear & 0xFFFF_FFFF

    def site(self, vcpu: Vcpu, pc: int) -> Site | None:
        """The software breakpoint at `pc`."""
        gpa = self.translate(vcpu, pc).gpa if len(self.traps) else None
        return None if gpa is None else self.traps.at(gpa)

    def site_around(self, vcpu: Vcpu, pc: int) -> Site | None:
        """The software breakpoint whose second byte is at `pc`."""
        if len(self.support.trap.code) == 1 or not len(self.traps):
            return None
        return self.site(vcpu, pc - 1)

    def slots_at(self, pc: int) -> list[int]:
        """The hardware breakpoints at `pc`."""
        return [
            index
            for index, slot in enumerate(self.slots)
            if slot is not None and slot.kind == "hardware" and slot.address == pc
        ]

    def at(self, vcpu: Vcpu, pc: int) -> list[Breakpoint]:
        """Every breakpoint on the instruction at `pc`."""
        site = self.site(vcpu, pc)
        found = list(site.owners) if site is not None else []
        return found + [slot for index in self.slots_at(pc) if (slot := self.slots[index]) is not None]

    # -- hits, on the vCPU's thread -----------------------------------------------------------------------------

    def on_debug(self, vcpu: Vcpu, arch: CData) -> Outcome | None:
        """KVM_EXIT_DEBUG."""
        if arch.exception == BREAKPOINT_EXCEPTION:
            here = self.at(vcpu, arch.pc)
            return self._hit(vcpu, here) if here else self._not_ours(vcpu, arch)
        watched = self._watched(arch.dr6)
        here = self.at(vcpu, arch.pc) if self.slots_at(arch.pc) else []
        if watched or here:
            return self._hit(vcpu, watched + here)
        return self._not_ours(vcpu, arch)

    def _watched(self, dr6: int) -> list[Breakpoint]:
        hit = [slot for index, slot in enumerate(self.slots) if dr6 & DR6_SLOTS & 1 << index]
        return [slot for slot in hit if slot is not None and slot.kind == "watch"]

    def _not_ours(self, vcpu: Vcpu, arch: CData) -> Outcome | None:
        if self._next_debug is not None:
            return self._next_debug(vcpu, arch)
        software = arch.exception == BREAKPOINT_EXCEPTION
        control = lib.KVM_GUESTDBG_INJECT_BP if software else lib.KVM_GUESTDBG_INJECT_DB
        self.guest_debug[vcpu.index].inject(control)
        return None

    def on_internal_error(self, vcpu: Vcpu, key: int) -> Outcome | None:
        """KVM_EXIT_INTERNAL_ERROR: the trap of a host whose emulator does not know INT3."""
        if vcpu.state.run.internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION and len(self.traps):
            here = self.at(vcpu, self.pc(vcpu))
            if here:
                return self._hit(vcpu, here)
        return on_fatal(vcpu, key)

    def on_port(self) -> Outcome | None:
        """The trap by port I/O was executed, or the guest has written to that port itself."""
        vcpu = self._vcpu_at_port()
        if vcpu is None:
            return None
        vcpu.settle()
        size = len(OUT.code)
        here = self.at(vcpu, self.pc(vcpu) - size)
        if not here:
            return None
        vcpu.regs.rip -= size
        return self._hit(vcpu, here)

    def _vcpu_at_port(self) -> Vcpu | None:
        mine = [vcpu for vcpu in self.machine.vcpus if vcpu.on_own_thread()]
        for vcpu in mine or [vcpu for vcpu in self.machine.vcpus if not vcpu.running]:  # the latter: run_once, step
            run = vcpu.state.run
            if run.exit_reason == lib.KVM_EXIT_IO and run.io.port == layout.PORT_DEBUG_TRAP:
                return vcpu
        return None

    def _hit(self, vcpu: Vcpu, here: list[Breakpoint]) -> Outcome | None:
        """Call the owners, all of them; then over the instruction, unless one ends the run or wants to stay."""
        outcome: Outcome | None = None
        pc = self.pc(vcpu)
        for each in here:
            each.hits += 1
            if each.once:
                each.remove()
            ended = self._report(vcpu, each)
            if outcome is None or outcome is STAY:
                outcome = ended or outcome
        if outcome is STAY:
            return None
        if outcome is not None:
            vcpu.before_run = lambda vcpu: self.stepper.over(vcpu, pc)  # whoever resumes wants to get on
            return outcome
        return self.stepper.over(vcpu, pc)

    def _report(self, vcpu: Vcpu, each: Breakpoint) -> Outcome | None:
        if each.on_hit is not None:
            return each.on_hit(vcpu, each)
        word = "watchpoint" if each.kind == "watch" else "breakpoint"
        return Outcome("STOPPED", vcpu=vcpu.index, detail=f"{word} at {each.name or hex(each.address)}")

    # -- stepping -----------------------------------------------------------------------------------------------

    def step(self, vcpu: Vcpu) -> Outcome | None:
        """See Vcpu.step."""
        outcome = self.stepper.step(vcpu)
        if outcome is None and vcpu.before_run is None:
            vcpu.before_run = self.stepper.out
        return outcome

    def check_step(self, vcpu: Vcpu) -> None:
        """Raises DebugUnsupported where the vCPU cannot be stepped."""
        check_step(vcpu, self.support.step, self.support.user_step)

    def stepped(self, vcpu: Vcpu) -> Outcome | None:
        """KVM_EXIT_DEBUG at the end of a step: watchpoints that the instruction touched, or the guest's own INT3."""
        arch = vcpu.state.run.debug.arch
        if arch.exception == BREAKPOINT_EXCEPTION:
            return self._not_ours(vcpu, arch)
        watched = self._watched(arch.dr6)
        return self._hit(vcpu, watched) if watched else None

    # -- the machine's life -------------------------------------------------------------------------------------

    def _on_reset(self) -> None:
        """New vCPUs, and a loader that has written over memory."""
        for debug in self.guest_debug:
            debug.forget()
        for vcpu in self.machine.vcpus:
            vcpu.before_run = None
            self.apply(vcpu)
        self.traps.plant_all()

    def _on_close(self) -> None:
        self._closed = True
