"""The binding against the real KVM: a vCPU's ioctls, each with a look at its effect."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from realmode import BASE, CLI_HLT, HLT, SPIN, machine, mov_al, out_al

from pykvm import Device, KvmError, Machine, Outcome
from pykvm._native import ffi, lib
from pykvm.kvm.vcpu import SYNC_EVENTS, SYNC_REGS, SYNC_SREGS, VcpuFd
from pykvm.x86.states import long_mode

SYSENTER_CS, SYSENTER_ESP = 0x174, 0x175
KVMCLOCK_MSR = 0x4B564D01  # MSR_KVM_SYSTEM_TIME_NEW
NO_SUCH_MSR = 0x12345678
APIC_TPR = 0x80


@pytest.fixture(params=["none", "kernel"])
def vm(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine in real mode at a HLT with interrupts off."""
    with machine(CLI_HLT, irqchip=request.param) as machine_:
        yield machine_


@pytest.fixture
def vcpu(vm: Machine) -> VcpuFd:
    """Its vCPU's file descriptor."""
    return vm.vcpus[0].fd


def need(vm: Machine, name: str) -> int:
    """The value of a capability; skips the test where it is absent."""
    if not hasattr(lib, name):
        pytest.skip(f"the kernel header that pykvm was compiled with lacks {name}")
    value = vm.vm.check_extension(getattr(lib, name))
    if not value:
        pytest.skip(f"no {name} on this host")
    return value


def raw(struct: Any) -> bytes:
    """The bytes of a structure."""
    return bytes(ffi.buffer(struct))


# -- registers -------------------------------------------------------------------------------------------------


def test_regs(vcpu: VcpuFd) -> None:
    """General registers come back as they were set."""
    regs = vcpu.get_regs()
    assert (regs.rip, regs.rsp) == (0, 0x800)
    for number, name in enumerate(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r15")):
        setattr(regs, name, 0x1111_2222_3333_0000 + number)
    regs.rflags = 0x246
    vcpu.set_regs(regs)
    assert raw(vcpu.get_regs()) == raw(regs)


def test_sregs(vcpu: VcpuFd) -> None:
    """Segments and control registers come back as they were set; what the CPU would refuse is refused."""
    sregs = vcpu.get_sregs()
    assert sregs.cs.base == BASE
    sregs.ds.base, sregs.ds.selector, sregs.cr3, sregs.gdt.base, sregs.gdt.limit = 0x5550, 0x555, 0x3000, 0x4000, 0x27
    vcpu.set_sregs(sregs)
    assert raw(vcpu.get_sregs()) == raw(sregs)
    sregs.cr0 |= 1 << 31  # paging without protection
    with pytest.raises(KvmError) as error:
        vcpu.set_sregs(sregs)
    assert (error.value.ioctl, error.value.errno) == ("KVM_SET_SREGS", errno.EINVAL)
    assert "CR0" in error.value.advice


def test_sregs2(vm: Machine, vcpu: VcpuFd) -> None:
    """The second form has the same registers and round-trips."""
    need(vm, "KVM_CAP_SREGS2")
    sregs = vcpu.get_sregs2()
    assert sregs.cs.base == vcpu.get_sregs().cs.base == BASE
    sregs.es.base, sregs.cr3 = 0x7770, 0x6000
    vcpu.set_sregs2(sregs)
    assert raw(vcpu.get_sregs2()) == raw(sregs)
    assert vcpu.get_sregs().cr3 == 0x6000


def test_fpu(vcpu: VcpuFd) -> None:
    """x87 and SSE registers come back as they were set; MXCSR has a field, but KVM leaves it alone."""
    fpu = vcpu.get_fpu()
    assert fpu.fcw in (0x37F, 0x40)  # FNINIT or RESET
    fpu.fcw = 0x27F
    ffi.memmove(fpu.xmm[3], b"sixteen bytes it", 16)
    vcpu.set_fpu(fpu)
    again = vcpu.get_fpu()
    assert (again.fcw, bytes(again.xmm[3])) == (0x27F, b"sixteen bytes it")


def test_xsave(vm: Machine, vcpu: VcpuFd) -> None:
    """The XSAVE area round-trips in both forms; its XMM registers are those of the FPU."""
    area = bytearray(vcpu.get_xsave())
    assert len(area) == 4096
    area[160:176] = b"0123456789abcdef"  # XMM0 in the FXSAVE layout, SDM vol. 1 10.5.1
    area[512] |= 3  # XSTATE_BV: neither x87 nor SSE is in its initial state
    vcpu.set_xsave(bytes(area))
    assert vcpu.get_xsave()[160:176] == b"0123456789abcdef"
    assert bytes(vcpu.get_fpu().xmm[0]) == b"0123456789abcdef"
    size = need(vm, "KVM_CAP_XSAVE2")
    large = vcpu.get_xsave(max(size, 4097))
    assert len(large) == max(size, 4097)
    assert large[160:176] == b"0123456789abcdef"


def test_xcrs(vm: Machine, vcpu: VcpuFd) -> None:
    """XCR0 can be set to what the CPU has, and to nothing without x87."""
    need(vm, "KVM_CAP_XCRS")
    assert vcpu.get_xcrs().keys() == {0}
    vcpu.set_xcrs({0: 3})
    assert vcpu.get_xcrs() == {0: 3}
    with pytest.raises(KvmError) as error:
        vcpu.set_xcrs({0: 2})
    assert error.value.ioctl == "KVM_SET_XCRS"
    assert vcpu.get_xcrs() == {0: 3}


def test_msrs(vcpu: VcpuFd) -> None:
    """MSRs round-trip; those that do not exist are left out when read and named when written, wherever they stand."""
    refused = vcpu.set_msrs({NO_SUCH_MSR: 1, SYSENTER_CS: 0x10, NO_SUCH_MSR + 1: 2, SYSENTER_ESP: 0x2000})
    assert refused == [NO_SUCH_MSR, NO_SUCH_MSR + 1]
    wanted = [NO_SUCH_MSR, SYSENTER_CS, NO_SUCH_MSR + 1, SYSENTER_ESP, NO_SUCH_MSR + 2]
    assert vcpu.get_msrs(wanted) == {SYSENTER_CS: 0x10, SYSENTER_ESP: 0x2000}
    assert vcpu.get_msrs([]) == {}
    assert vcpu.set_msrs({}) == []


def test_cpuid(vcpu: VcpuFd) -> None:
    """What is set is what the guest has; too many entries are refused with advice."""
    entries = [entry for entry in vcpu.get_cpuid2() if entry[0] != 0x80000002]
    vcpu.set_cpuid2([*entries, (0x80000002, 0, 0, *(int.from_bytes(b"pykv", "little"),) * 4)])
    found = {entry[0]: entry for entry in vcpu.get_cpuid2()}
    assert found[0x80000002][3:] == (int.from_bytes(b"pykv", "little"),) * 4
    with pytest.raises(KvmError) as error:
        vcpu.set_cpuid2([(0x40000100 + number, 0, 0, 0, 0, 0, 0) for number in range(1000)])
    assert (error.value.ioctl, error.value.errno) == ("KVM_SET_CPUID2", errno.E2BIG)
    assert error.value.advice


def test_debug_registers(vm: Machine, vcpu: VcpuFd) -> None:
    """DR0 to DR3 and DR7 come back as they were set."""
    need(vm, "KVM_CAP_DEBUGREGS")
    state = vcpu.get_debugregs()
    state.db[0], state.db[3], state.dr7 = 0x1234, 0x5678, 0x403
    vcpu.set_debugregs(state)
    again = vcpu.get_debugregs()
    assert (again.db[0], again.db[3], again.dr7) == (0x1234, 0x5678, 0x403)


# -- interrupts and events -------------------------------------------------------------------------------------


def test_lapic() -> None:
    """The local APIC's registers round-trip where KVM has one, and are refused where it has none."""
    with machine(HLT, irqchip="split") as vm:
        vcpu = vm.vcpus[0].fd
        registers = bytearray(vcpu.get_lapic())
        registers[APIC_TPR] = 0x40
        vcpu.set_lapic(bytes(registers))
        assert vcpu.get_lapic()[APIC_TPR] == 0x40
        assert vcpu.get_sregs().cr8 == 4
        with pytest.raises(ValueError, match="bytes"):
            vcpu.set_lapic(b"short")
    with machine(HLT, irqchip="none") as vm, pytest.raises(KvmError) as error:
        vm.vcpus[0].fd.get_lapic()
    assert (error.value.ioctl, error.value.errno) == ("KVM_GET_LAPIC", errno.EINVAL)


def test_mp_state() -> None:
    """The boot processor is runnable, the others wait for INIT; a halted one does not run."""
    with machine(mov_al(1) + HLT, irqchip="kernel", cpus=2, halt_detection=False) as vm:
        first, second = (vcpu.fd for vcpu in vm.vcpus)
        assert first.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE
        assert second.get_mp_state() == lib.KVM_MP_STATE_UNINITIALIZED
        first.set_mp_state(lib.KVM_MP_STATE_HALTED)
        assert first.get_mp_state() == lib.KVM_MP_STATE_HALTED
        assert vm.run(timeout=0.2).kind == "TIMEOUT"
        assert vm.vcpus[0].regs.rip == 0
        with pytest.raises(KvmError):
            first.set_mp_state(99)


def test_events(vcpu: VcpuFd) -> None:
    """Pending events round-trip."""
    events = vcpu.get_events()
    assert not events.nmi.pending and not events.nmi.masked
    events.nmi.masked, events.nmi.pending = 1, 1
    events.flags = lib.KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.set_events(events)
    again = vcpu.get_events()
    assert (again.nmi.masked, again.nmi.pending) == (1, 1)


def test_nmi() -> None:
    """KVM_NMI wakes a guest that halted with interrupts off: its handler at vector 2 runs."""
    with machine(CLI_HLT, irqchip="kernel", halt_detection=False) as vm:
        vm.memory.write(2 * 4, (0x3000).to_bytes(2, "little") + b"\0\0")
        vm.memory.write(0x3000, out_al(0x99) + SPIN)
        seen = threading.Event()

        class Bell(Device):
            name = "bell"

            def write(self, offset: int, size: int, value: int) -> None:
                seen.set()

        vm.attach(Bell(), ports=range(0x99, 0x9A))
        vm.start()
        assert vm.wait(timeout=0.1) is None
        vm.vcpus[0].post(vm.vcpus[0].fd.nmi)  # on its own thread: KVM_RUN holds the vCPU's lock
        assert seen.wait(30)


def test_interrupt() -> None:
    """KVM_INTERRUPT, for a VM without irqchip: a guest with interrupts on takes the vector."""
    # sti; nop; jmp .
    with machine(b"\xfb\x90" + SPIN) as vm:
        vm.memory.write(0x20 * 4, (0x3000).to_bytes(2, "little") + b"\0\0")
        vm.memory.write(0x3000, CLI_HLT)
        assert vm.run(timeout=0.1).kind == "TIMEOUT"
        vm.vcpus[0].fd.interrupt(0x20)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert vm.vcpus[0].regs.rip == 0x3002
    with machine(HLT, irqchip="kernel") as vm, pytest.raises(KvmError) as error:
        vm.vcpus[0].fd.interrupt(0x20)
    assert (error.value.ioctl, error.value.errno) == ("KVM_INTERRUPT", errno.ENXIO)


def test_single_step() -> None:
    """KVM_SET_GUEST_DEBUG with single stepping: an exit after each instruction."""
    with machine(mov_al(1) + mov_al(2) + mov_al(3) + HLT) as vm:
        need(vm, "KVM_CAP_SET_GUEST_DEBUG")
        pcs: list[int] = []
        vm.hooks.debug = lambda vcpu, arch: pcs.append(arch.pc)  # type: ignore[func-returns-value]
        vm.vcpus[0].fd.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert [pc - BASE for pc in pcs][:3] == [2, 4, 6]
        vm.vcpus[0].fd.set_guest_debug(0)


def test_hardware_breakpoint() -> None:
    """A breakpoint in a debug register stops before its instruction."""
    with machine(mov_al(1) + mov_al(2) + mov_al(3) + HLT) as vm:
        need(vm, "KVM_CAP_SET_GUEST_DEBUG")
        pcs: list[int] = []

        def stop(vcpu: object, arch: Any) -> Outcome:
            pcs.append(arch.pc)
            return Outcome("STOPPED")

        vm.hooks.debug = stop
        control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
        vm.vcpus[0].fd.set_guest_debug(control, [BASE + 4, 0, 0, 0, 0, 0, 0, 0x402])
        assert vm.run(timeout=30) == Outcome.STOPPED
        assert pcs == [BASE + 4]
        assert vm.vcpus[0].regs.rax & 0xFF == 2


# -- the rest --------------------------------------------------------------------------------------------------


def test_translate() -> None:
    """A linear address is walked through the guest's own page tables."""
    with machine(HLT) as vm:
        fd = vm.vcpus[0].fd
        assert fd.translate(0x1234) == 0x1234
        vm.vcpus[0].load_state(long_mode(vm.memory, 0x20000))
        assert fd.translate(0x20123) == 0x20123
        assert fd.translate(0x7FFF_0000_0000) is None


def test_tsc_khz(vm: Machine, vcpu: VcpuFd) -> None:
    """The guest's TSC runs at some hundred MHz at least, and can be set where the host can scale it."""
    khz = vcpu.get_tsc_khz()
    assert khz > 100_000
    need(vm, "KVM_CAP_TSC_CONTROL")
    vcpu.set_tsc_khz(khz // 2)
    assert vcpu.get_tsc_khz() == khz // 2


def test_signal_mask() -> None:
    """The mask of KVM_SET_SIGNAL_MASK is in force during KVM_RUN: a signal blocked outside ends the run."""
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with machine(SPIN) as vm:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            vm.vcpus[0].fd.set_signal_mask(bytes(8))
            assert vm.vcpus[0].run_once().reason == "INTR"
        assert signal.SIGUSR1 in signal.sigpending()
        assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGUSR1, previous)


def test_kvmclock_ctrl() -> None:
    """A guest with a kvmclock page is told there that it was paused; one without is refused."""
    with machine(HLT + HLT) as vm:
        need(vm, "KVM_CAP_KVMCLOCK_CTRL")
        fd = vm.vcpus[0].fd
        with pytest.raises(KvmError) as error:
            fd.kvmclock_ctrl()
        assert (error.value.ioctl, error.value.errno) == ("KVM_KVMCLOCK_CTRL", errno.EINVAL)
        assert fd.set_msrs({KVMCLOCK_MSR: 0x5000 | 1}) == []
        vm.run(timeout=30)
        flags = 0x5000 + 29  # pvclock_vcpu_time_info.flags
        assert not vm.memory[flags] & 2
        assert int.from_bytes(vm.memory.read(0x5000 + 16, 8), "little") > 0  # system_time
        fd.kvmclock_ctrl()
        vm.run(timeout=30)
        assert vm.memory[flags] & 2  # PVCLOCK_GUEST_STOPPED


def test_nested_state(vm: Machine, vcpu: VcpuFd) -> None:
    """The nested state of a guest that is no hypervisor round-trips."""
    size = need(vm, "KVM_CAP_NESTED_STATE")
    state = vcpu.get_nested_state(size)
    assert 0 < len(state) <= size
    vcpu.set_nested_state(state)
    assert vcpu.get_nested_state(size) == state


def test_enable_cap(vm: Machine, vcpu: VcpuFd) -> None:
    """A vCPU's capability is taken; a VM's is refused."""
    need(vm, "KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
    vcpu.enable_cap(lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    with pytest.raises(KvmError) as error:
        vcpu.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    assert (error.value.ioctl, error.value.errno) == ("KVM_ENABLE_CAP", errno.EINVAL)


def test_stats(vm: Machine, vcpu: VcpuFd) -> None:
    """The vCPU's binary statistics count its exits; a histogram is a list."""
    need(vm, "KVM_CAP_BINARY_STATS_FD")
    before = vcpu.stats()
    assert vm.run(timeout=30) == Outcome.HALTED
    after = vcpu.stats()
    assert before.keys() == after.keys()
    assert isinstance(after["exits"], int) and isinstance(before["exits"], int)
    assert after["exits"] > before["exits"]
    assert isinstance(after["halt_wait_hist"], list)


def test_attributes(vm: Machine, vcpu: VcpuFd) -> None:
    """The TSC offset, a vCPU's device attribute, round-trips."""
    need(vm, "KVM_CAP_VCPU_ATTRIBUTES")
    group, attribute = 0, 0  # KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET
    assert vcpu.has_attribute(group, attribute)
    assert not vcpu.has_attribute(77, 0)
    value = ffi.new("uint64_t *", 0xFFFF_0000_0000_0000)
    vcpu.set_attribute(group, attribute, value)
    value[0] = 1
    vcpu.get_attribute(group, attribute, value)
    if value[0] == 0:
        pytest.skip("this host's KVM does not offset the TSC")
    assert value[0] == 0xFFFF_0000_0000_0000


def test_sync_regs() -> None:
    """With kvm_valid_regs the registers are in kvm_run after an exit, and kvm_dirty_regs takes them back."""
    with machine(mov_al(0x5A) + HLT + out_al(0x40) + HLT) as vm:
        supported = need(vm, "KVM_CAP_SYNC_REGS")
        assert supported & (SYNC_REGS | SYNC_SREGS | SYNC_EVENTS) == SYNC_REGS | SYNC_SREGS | SYNC_EVENTS
        vcpu = vm.vcpus[0]
        vcpu.state.run.kvm_valid_regs = SYNC_REGS | SYNC_SREGS
        assert vcpu.run_once().reason == "HLT"
        shared = lib.pk_sync_regs(vcpu.state)
        assert (shared.regs.rax & 0xFF, shared.regs.rip, shared.sregs.cs.base) == (0x5A, 3, BASE)
        shared.regs.rax = 0x77
        vcpu.state.run.kvm_dirty_regs = SYNC_REGS
        assert vcpu.run_once().value == 0x77
