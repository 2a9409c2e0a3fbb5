"""Breakpoints, watchpoints and single steps from Python, on whatever this host's KVM can do for them."""

from __future__ import annotations

from collections.abc import Iterator

import guests
import pytest
from realmode import BASE, HLT, SPIN, machine, mov_al, out_al, out_loop

from pykvm import ConfigError, DebugUnsupported, Device, Machine, Outcome, Vcpu
from pykvm._native import lib
from pykvm.debug.breakpoints import Breakpoint
from pykvm.debug.hostdebug import OUT, debug_support
from pykvm.x86.states import long_mode, protected_flat

RUN_S = 60
CODE32 = 0x20000
COUNTERS = 0x30000

KINDS = pytest.mark.parametrize("hardware", [False, True], ids=["software", "hardware"])


def need(hardware: bool) -> None:
    """Skip what this host's KVM cannot do; that it says so is a test of its own."""
    if hardware and not debug_support().breakpoints:
        pytest.skip("this KVM does not honour hardware breakpoints")


@KINDS
def test_a_hit_calls_and_the_guest_goes_on(hardware: bool) -> None:
    """The callback sees the registers before the instruction; every pass of a loop is a hit; nothing else changes."""
    need(hardware)
    seen: list[int] = []

    def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
        seen.append(vcpu.regs.rcx)

    # mov $5, %cx; 1: out %al, $0x40; loop 1b; hlt
    with machine(out_loop(0x40, 5) + HLT) as vm:
        point = vm.breakpoint(BASE + 3, on_hit, hardware=hardware)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert seen == [5, 4, 3, 2, 1]
        assert point.hits == 5
        assert vm.bus.ports.unmapped == {0x40: 5}


@KINDS
def test_an_outcome_ends_the_run_and_start_goes_on(hardware: bool) -> None:
    """Without a callback a hit ends the run before the instruction; starting again executes it."""
    need(hardware)
    with machine(mov_al(1) + mov_al(2) + HLT) as vm:
        vm.breakpoint(BASE + 2, hardware=hardware)
        outcome = vm.run(RUN_S)
        assert (outcome, outcome.detail) == (Outcome.STOPPED, f"breakpoint at {BASE + 2:#x}")
        assert (vm.vcpus[0].regs.rip, vm.vcpus[0].regs.rax & 0xFF) == (2, 1)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert vm.vcpus[0].regs.rax & 0xFF == 2


@KINDS
def test_removal(hardware: bool) -> None:
    """A removed breakpoint, by hand or because it is for once, leaves the guest's bytes as they were."""
    need(hardware)
    code = out_loop(0x40, 5) + HLT
    with machine(code) as vm:
        first = vm.breakpoint(BASE, hardware=hardware)
        first.remove()
        first.remove()
        once = vm.breakpoint(BASE + 3, lambda vcpu, point: None, hardware=hardware, once=True)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert (first.hits, once.hits) == (0, 1)
        assert vm.memory.read(BASE, len(code)) == code


def test_four_hardware_slots() -> None:
    """The fifth hardware breakpoint is refused; a removed one makes room."""
    need(True)
    with machine(HLT) as vm:
        points = [vm.breakpoint(BASE + at, hardware=True) for at in range(4)]
        with pytest.raises(DebugUnsupported, match="all four"):
            vm.breakpoint(BASE + 4, hardware=True)
        points[2].remove()
        vm.breakpoint(BASE + 4, hardware=True)


def test_unmapped_addresses() -> None:
    """Where nothing is mapped there is no place for a software breakpoint; a hardware one is taken instead."""
    with machine(HLT) as vm:
        vm.vcpus[0].load_state(long_mode(vm.memory, BASE))
        with pytest.raises(ConfigError, match="is not present"):
            vm.breakpoint(0xFFFF_FFFF_8100_0000, hardware=False)
        with pytest.raises(ConfigError, match="64-bit"):
            vm.breakpoint(1 << 64)
        if debug_support().breakpoints:
            assert vm.breakpoint(0xFFFF_FFFF_8100_0000).kind == "hardware"


def test_memory_reads_hide_software_breakpoints() -> None:
    """A debugger reads the guest's own bytes, and writes under the breakpoint without losing it."""
    code = mov_al(1) + mov_al(2) + HLT
    with machine(code) as vm:
        point = vm.breakpoint(BASE + 2, hardware=False)
        traps = vm.debugger.traps
        assert vm.memory.read(BASE, len(code)) != code
        assert traps.read(BASE, len(code)) == code
        traps.write(BASE, mov_al(1) + mov_al(7) + HLT)
        assert vm.run(RUN_S) == Outcome.STOPPED
        assert point.hits == 1
        assert vm.run(RUN_S) == Outcome.HALTED
        assert vm.vcpus[0].regs.rax & 0xFF == 7


def test_breakpoints_survive_a_reset() -> None:
    """After a reset, with vCPUs and image new, a breakpoint hits as before."""
    with guests.pc("hello64.elf") as pc:
        point = pc.breakpoint("_start")
        assert (point.address, point.name) == (0x100000, "_start")
        for hits in (1, 2):
            assert pc.run(RUN_S) == Outcome.STOPPED
            assert point.hits == hits
            pc.reset()


@pytest.fixture
def smp() -> Iterator[Machine]:
    """Two vCPUs in 32-bit protected mode, each of which counts to 40 at its own place and halts."""
    # 1: inc dword [esi]; loop 1b; cli; hlt
    with Machine(memory="1M", cpus=2) as vm:
        vm.memory.write(CODE32, b"\xff\x06\xe2\xfc\xfa\xf4")
        for vcpu in vm.vcpus:
            state = protected_flat(vm.memory, CODE32)
            state.gprs |= {"rcx": 40, "rsi": COUNTERS + 0x100 * vcpu.index}
            vcpu.load_state(state)
            vcpu.fd.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)
        yield vm


@KINDS
def test_no_vcpu_runs_through(smp: Machine, hardware: bool) -> None:
    """While one vCPU steps over a breakpoint the other one does not miss it: all 80 passes are hits."""
    need(hardware)
    hits = [0, 0]

    def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
        hits[vcpu.index] += 1

    smp.breakpoint(CODE32, on_hit, hardware=hardware)
    assert smp.run(RUN_S) == Outcome.HALTED
    assert hits == [40, 40]
    assert [smp.memory.read_u32(COUNTERS + 0x100 * each) for each in (0, 1)] == [40, 40]


def test_a_breakpoint_set_while_the_guest_runs() -> None:
    """A running machine takes breakpoints, and one that is hit can set others."""
    with machine(SPIN + HLT) as vm:
        vm.start()

        def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
            vcpu.regs.rip += len(SPIN)
            vm.breakpoint(BASE + len(SPIN), hardware=False)

        vm.breakpoint(BASE, on_hit, hardware=False)
        outcome = vm.wait(RUN_S)
        assert outcome == Outcome.STOPPED
        assert outcome.detail == f"breakpoint at {BASE + 2:#x}"


def test_step() -> None:
    """A step executes one instruction, its port access and a breakpoint on it included."""
    code = mov_al(1) + out_al(0x40) + mov_al(2) + HLT
    with machine(code) as vm:
        vm.breakpoint(BASE + 2, hardware=False)
        vcpu = vm.vcpus[0]
        at = []
        for _ in range(3):
            assert vcpu.step() is None
            at.append(vcpu.regs.rip)
        assert at == [2, 4, 6]
        assert vm.bus.ports.unmapped == {0x40: 1}
        vm.start()
        vm.wait(RUN_S)
        assert vcpu.regs.rip == 7


def test_what_a_step_ends_is_told() -> None:
    """A step onto what ends the guest gives the Outcome: here a jump to where no memory is."""
    # jmp 0xf000:0xfff0 with an empty 64 KiB machine: then a fetch from nowhere
    with machine(b"\xea\xf0\xff\x00\xf0", memory="64K") as vm:
        vcpu = vm.vcpus[0]
        assert vcpu.step() is None
        outcome = vcpu.step()
        assert outcome is not None
        assert outcome.kind == "CRASH"


def test_ring3_steps_where_the_host_can() -> None:
    """In ring 3 a step either works or is refused in words; the guest never sees it."""
    with guests.pc("ring3.elf", "count=1000000") as pc:
        pc.start()
        pc.wait(0.3)
        pc.pause()
        vcpu = pc.vcpus[0]
        if vcpu.sregs.cs.dpl != 3:
            pytest.skip("did not reach ring 3 in time")
        before = vcpu.regs.rip
        if debug_support().user_step:
            vcpu.step()
            assert vcpu.regs.rip != before
        else:
            with pytest.raises(DebugUnsupported, match="ring 3"):
                vcpu.step()
            assert vcpu.regs.rip == before
        if not debug_support().user_breakpoints:
            with pytest.raises(DebugUnsupported, match="ring 3"):
                pc.breakpoint(before)
        assert pc.run(0.1).kind == "TIMEOUT"


def test_watchpoints() -> None:
    """A write to a watched address is reported after it where this host can; elsewhere the request is refused."""
    # mov %al, 0x800 (DS:); mov 0x800, %al; hlt
    with machine(b"\xa2\x00\x08\xa0\x00\x08" + HLT) as vm:
        watched = BASE + 0x800
        with pytest.raises(ConfigError, match="aligned"):
            vm.watchpoint(watched + 1, length=4)
        if not debug_support().watchpoints:
            with pytest.raises(DebugUnsupported, match="watchpoints"):
                vm.watchpoint(watched)
            return
        at: list[int] = []

        def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
            at.append(vcpu.regs.rip)

        vm.watchpoint(watched, on_hit)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert at == [3]


def test_a_failing_callback_is_reported() -> None:
    """What a callback raises reaches the caller of run as the cause of a DeviceError."""
    from pykvm import DeviceError

    def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
        raise ZeroDivisionError

    with machine(HLT) as vm:
        vm.breakpoint(BASE, on_hit)
        with pytest.raises(DeviceError) as caught:
            vm.run(RUN_S)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Pretended:
    """What kvm_run says of a #DB by a watchpoint in slot 0 (SDM vol. 3B 17.2.3): for hosts that never say it."""

    exception, pc, dr6, dr7 = 1, BASE, 0xFFFF0FF1, 0x400


def test_a_watchpoint_that_kvm_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A #DB with the slot's bit in DR6 is a hit of that watchpoint, and one without is the guest's own."""
    with machine(HLT) as vm:
        monkeypatch.setattr(vm.debugger.support, "watchpoints", True)
        seen: list[str] = []
        watch = vm.watchpoint(0x10800, lambda vcpu, point: seen.append(point.kind), length=8, write_only=False)
        second = vm.watchpoint(0x10900)
        vcpu = vm.vcpus[0]
        assert vm.debugger.on_debug(vcpu, Pretended) is None
        assert (seen, watch.hits, second.hits) == (["watch"], 1, 0)
        watch.remove()
        monkeypatch.setattr(Pretended, "dr6", 0xFFFF0FF2)
        outcome = vm.debugger.on_debug(vcpu, Pretended)
        assert outcome is not None
        assert outcome.detail == "watchpoint at 0x10900"


def test_an_int3_of_the_guests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where KVM intercepts INT3, one that is no breakpoint is given back: the guest's handler runs."""
    if debug_support().trap is OUT:
        pytest.skip("this KVM does not intercept INT3")
    monkeypatch.setattr(Pretended, "exception", 3)
    monkeypatch.setattr(Pretended, "pc", BASE + 2)

    class Trigger(Device):
        def write(self, offset: int, size: int, value: int) -> Outcome | None:
            return vm.debugger.on_debug(vm.vcpus[0], Pretended)

    with machine(out_al(0x40) + HLT) as vm:
        vm.attach(Trigger(), ports=range(0x40, 0x41))
        vm.memory.write(3 * 4, (0x3000).to_bytes(2, "little") + b"\0\0")
        vm.memory.write(0x3000, mov_al(9) + HLT)
        vm.breakpoint(0x5000, hardware=False)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert (vm.vcpus[0].regs.rip, vm.vcpus[0].regs.rax & 0xFF) == (0x3003, 9)


def test_a_trap_longer_than_its_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two-byte breakpoints on one-byte instructions the guest still executes its own bytes only."""
    monkeypatch.setattr(debug_support(), "trap", OUT)
    monkeypatch.setattr(debug_support(), "real_trap", OUT)
    # inc %ax; inc %cx; hlt
    with machine(b"\x40\x41" + HLT) as vm:
        point = vm.breakpoint(BASE, lambda vcpu, point: None, hardware=False)
        assert vm.run(RUN_S) == Outcome.HALTED
        assert (point.hits, vm.vcpus[0].regs.rax, vm.vcpus[0].regs.rcx) == (1, 1, 1)
    with machine(b"\x40\x41" + HLT) as vm:
        vm.breakpoint(BASE, hardware=False)
        assert vm.vcpus[0].step() is None
        assert vm.vcpus[0].regs.rip == 1
        assert vm.run(RUN_S) == Outcome.HALTED
        assert (vm.vcpus[0].regs.rip, vm.vcpus[0].regs.rcx) == (3, 1)
