"""Hooks of the machine's owner: MSRs, coalesced writes, actions, interrupts without an irqchip."""

from __future__ import annotations

import os

import pytest
from realmode import BASE, HLT, SPIN, STI_HLT, machine, mov_al, out_al, out_loop

from pykvm import Device, Exit, MissingCapability, Outcome, Vcpu
from pykvm._native import lib
from pykvm.core.exits import HANDLERS, NOT_ON_X86, TABLE
from pykvm.kvm.exits import reason_names
from pykvm.x86.cpuid import CpuidEntry, put

# mov $0x12345678, %ecx (32-bit operand in real mode)
SELECT_MSR = b"\x66\xb9\x78\x56\x34\x12"
RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"


class Log(Device):
    """Remembers (offset, value) of each write."""

    name = "log"

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, value))


def test_every_exit_reason_is_in_the_table() -> None:
    """Each KVM_EXIT_* of the installed header has a handler or is known to be another architecture's."""
    for number, name in reason_names().items():
        assert (number in TABLE) != (name in NOT_ON_X86), name
    assert len(TABLE) <= len(HANDLERS)


def test_unhandled_msrs_reach_the_hooks() -> None:
    """RDMSR and WRMSR of an unknown MSR are answered by the owner."""
    written: list[tuple[int, int]] = []

    def write(vcpu: Vcpu, index: int, value: int) -> bool:
        written.append((index, value))
        return True

    with machine(SELECT_MSR + RDMSR + WRMSR + HLT) as vm:
        vm.on_msr(read=lambda vcpu, index: index + 1, write=write)
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.vcpus[0].regs.rax == 0x12345679
    assert written == [(0x12345678, 0x12345679)]


def test_cpuid_hook_changes_entries() -> None:
    """The owner may set CPUID entries that no feature name covers; the guest reads them."""

    def brand(entries: list[CpuidEntry], index: int) -> None:
        put(entries, CpuidEntry(0x40000000, eax=0x40000000, ebx=0x6B6B6B00 + index))

    # mov $0x40000000, %eax; cpuid; hlt
    with machine(b"\x66\xb8\x00\x00\x00\x40\x0f\xa2\xf4", cpuid=brand) as vm:
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.vcpus[0].regs.rbx == 0x6B6B6B00


def test_msr_hook_may_refuse() -> None:
    """None from the read hook is a #GP in the guest: here, through the real-mode vector table, a jump to HLT."""
    with machine(SELECT_MSR + RDMSR + SPIN) as vm:
        vm.memory.write(13 * 4, (0x3000).to_bytes(2, "little") + b"\0\0")
        vm.memory.write(0x3000, HLT)
        vm.on_msr(read=lambda vcpu, index: None)
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.vcpus[0].regs.rip == 0x3001


def test_hypercalls_reach_the_hook() -> None:
    """VMMCALL (VMCALL on Intel) is answered by the owner where KVM can intercept it, and refused by name where not."""
    calls: list[tuple[int, int]] = []

    def hook(vcpu: Vcpu, number: int, arguments: tuple[int, ...]) -> int:
        calls.append((number, arguments[0]))
        return 0x4242

    # mov $7, %eax; mov $9, %ebx; vmmcall; hlt: KVM patches the opcode to the host's
    with machine(b"\x66\xb8\x07\0\0\0\x66\xbb\x09\0\0\0\x0f\x01\xd9\xf4") as vm:
        if not vm.vm.check_extension(lib.KVM_CAP_XEN_HVM) & lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL:
            with pytest.raises(MissingCapability, match="KVM_CAP_XEN_HVM"):
                vm.on_hypercall(hook)
            return
        vm.on_hypercall(hook)
        assert vm.run(timeout=10) == Outcome.HALTED
        assert vm.vcpus[0].regs.rax == 0x4242
    assert calls == [(7, 9)]


def test_coalesced_writes_come_before_the_next_exit() -> None:
    """Writes to a coalesced range reach the device in order, before any other exit is handled."""
    order: list[str] = []

    class Tagged(Device):
        def __init__(self, tag: str) -> None:
            self.tag = self.name = tag

        def write(self, offset: int, size: int, value: int) -> None:
            order.append(f"{self.tag}{value}")

    with machine(mov_al(1) + out_al(0x50) + mov_al(2) + out_al(0x50) + mov_al(3) + out_al(0x60) + HLT) as vm:
        if not vm.vm.check_extension(lib.KVM_CAP_COALESCED_PIO):
            pytest.skip("no KVM_CAP_COALESCED_PIO")
        vm.attach(Tagged("batched"), ports=range(0x50, 0x51))
        vm.attach(Tagged("direct"), ports=range(0x60, 0x61))
        vm.coalesce(ports=range(0x50, 0x51))
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.vcpus[0].exit_counts()[lib.KVM_EXIT_IO] == 1
    assert order == ["batched1", "batched2", "direct3"]


def test_append_action_keeps_every_byte_in_order() -> None:
    """Bytes of an APPEND range arrive complete and in order, also when the ring fills up many times."""
    # mov $0, %al; mov $N, %cx; 1: out %al, $0x40; inc %al; loop 1b; hlt
    code = b"\xb0\x00\xb9\x88\x13\xe6\x40\xfe\xc0\xe2\xfa\xf4"
    received = bytearray()
    with machine(code) as vm:
        from pykvm.core.actions import Ring

        ring = Ring(64)

        class Sink(Device):
            name = "sink"

            def write(self, offset: int, size: int, value: int) -> None:
                received.extend(ring.drain())
                received.append(value)

        vm.attach(Sink(), ports=range(0x40, 0x41))
        vm.actions.append(0x40, ring=ring)
        assert vm.run(timeout=20) == Outcome.HALTED
        received.extend(ring.drain())
        ring.close()
    assert bytes(received) == bytes(i & 0xFF for i in range(5000))


def test_ring_wakes_the_io_side_once() -> None:
    """The ring's eventfd is signalled when it stops being empty, not for every byte."""
    with machine(out_loop(0x40, 100) + HLT) as vm:
        _, ring = vm.actions.append(0x40)
        vm.run(timeout=5)
        assert os.eventfd_read(ring.eventfd) == 1
        assert len(ring.drain()) == ring.appended == 100


def test_constant_action_answers_reads() -> None:
    """A CONSTANT action gives its value without Python; disabled, the device is asked."""
    # in $0x40, %al; hlt
    with machine(b"\xe4\x40\xf4\xe4\x40\xf4") as vm:

        class Other(Device):
            name = "other"

            def read(self, offset: int, size: int) -> int:
                return 0x22

        vm.attach(Other(), ports=range(0x40, 0x41))
        action = vm.actions.constant(range(0x40, 0x41), 0x11)
        vm.run(timeout=5)
        assert vm.vcpus[0].regs.rax & 0xFF == 0x11
        action.enabled = False
        vm.run(timeout=5)
        assert vm.vcpus[0].regs.rax & 0xFF == 0x22


def test_devices_raise_interrupts() -> None:
    """An IrqLine pulse wakes a guest that halted with interrupts on and runs its handler."""
    log = Log()
    # handler at 0x3000: out %al, $0x90; cli; hlt
    with machine(STI_HLT + SPIN, irqchip="kernel") as vm:
        vm.attach(log, ports=range(0x90, 0x91))
        vm.memory.write(0x3000, out_al(0x90) + b"\xfa\xf4")
        vm.memory.write(
            4 * 4, (0x3000).to_bytes(2, "little") + b"\0\0"
        )  # IRQ 4 at vector 4: the PIC is not initialised
        line = vm.irq_line(4)
        vm.start()
        vm.io.call_later(0.2, line.pulse)
        assert vm.wait(timeout=10) == Outcome.HALTED
    assert len(log.writes) == 1


def test_detach_gives_the_addresses_back() -> None:
    """A detached device hears nothing more, also where its port was cached."""
    log = Log()
    with machine(out_al(0x40) + HLT + out_al(0x40) + HLT) as vm:
        vm.attach(log, ports=range(0x40, 0x41))
        vm.run(timeout=5)
        vm.detach(log)
        vm.run(timeout=5)
        assert len(log.writes) == 1
        assert vm.bus.ports.unmapped == {0x40: 1}


def test_statistics_count_addresses() -> None:
    """With stats on, accesses are counted by port, and the time in the guest is measured."""
    with machine(out_loop(0x40, 50) + out_loop(0x41, 7) + HLT, stats=True) as vm:
        vm.run(timeout=5)
        state = vm.vcpus[0].state
        used = {
            state.stats[i].address: state.stats[i].writes for i in range(lib.PK_STAT_SLOTS) if state.stats[i].writes
        }
        assert used == {0x40: 50, 0x41: 7}
        assert state.guest_ns > 0


def test_exit_has_a_repr() -> None:
    """An Exit names its port, so that a failing test shows it."""
    with machine(out_al(0x40) + HLT) as vm:
        seen = vm.vcpus[0].run_once()
        assert isinstance(seen, Exit)
        assert "0x40" in repr(seen)


def test_missing_ioctls_are_named() -> None:
    """An ioctl that the kernel header lacks is a MissingCapability with its name, not an AttributeError."""
    with machine(HLT) as vm, pytest.raises(MissingCapability, match="KVM_NOT_THERE"):
        vm.vm.ioctl("KVM_NOT_THERE")


def test_memory_added_later_is_seen() -> None:
    """A slot added to a live machine is memory to the guest."""
    # mov $0x3000, %ax; mov %ax, %ds; movb $0x5a, 0; hlt
    with machine(b"\xb8\x00\x30\x8e\xd8\xc6\x06\x00\x00\x5a\xf4", memory="64K") as vm:
        vm.add_memory(0x30000, 0x1000, name="extra")
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.memory[0x30000] == 0x5A
        assert vm.memory[BASE] == 0xB8


def test_writes_to_rom_go_to_the_bus() -> None:
    """A read-only slot reads as memory; the guest's writes are MMIO exits and change nothing."""
    log = Log()
    with machine(b"\xb8\x00\x30\x8e\xd8\xc6\x06\x00\x00\x5a\xa0\x00\x00\xf4", memory="64K") as vm:
        vm.add_memory(0x30000, 0x1000, name="rom", readonly=True)
        vm.memory[0x30000] = 0x77
        vm.attach(log, mmio=range(0x30000, 0x31000))
        assert vm.run(timeout=5) == Outcome.HALTED
        assert log.writes == [(0, 0x5A)]
        assert vm.vcpus[0].regs.rax & 0xFF == 0x77
