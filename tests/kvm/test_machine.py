"""The machine's life: outcomes, pause and resume, timeouts, reset, close."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
from realmode import (
    BASE,
    CLI_HLT,
    HLT,
    SPIN,
    STI_HLT,
    in_al,
    machine,
    mov_al,
    out_al,
    out_loop,
)

from pykvm import ConfigError, Device, DeviceError, Machine, MachineStateError, Outcome


class Recorder(Device):
    """Remembers writes and answers reads from a list."""

    name = "recorder"

    def __init__(self, answers: list[int] | None = None) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.answers = answers or []

    def read(self, offset: int, size: int) -> int:
        return self.answers.pop(0)

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        self.writes.append((offset, size, value))
        return None


class Stopper(Device):
    """Ends the run with DEBUG_EXIT."""

    name = "stopper"

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        return Outcome("DEBUG_EXIT", value)


@pytest.mark.parametrize("irqchip", ["none", "kernel", "split"])
def test_halt_with_interrupts_off_is_halted(irqchip: str) -> None:
    """A guest that halts for good ends HALTED within a second, whoever emulates the local APIC."""
    with machine(CLI_HLT, irqchip=irqchip) as vm:
        assert vm.run(timeout=10) == Outcome.HALTED
        assert vm.vcpus[0].regs.rip == 2


def test_halt_with_interrupts_on_is_no_end() -> None:
    """A guest that waits for an interrupt is not taken for dead."""
    with machine(STI_HLT + SPIN, irqchip="kernel") as vm:
        assert vm.run(timeout=1.2).kind == "TIMEOUT"


def test_halt_of_one_cpu_of_several() -> None:
    """Application processors that never got their SIPI cannot wake the halted boot processor."""
    with machine(CLI_HLT, irqchip="kernel", cpus=4) as vm:
        assert vm.run(timeout=10) == Outcome.HALTED


def test_halt_detection_can_be_turned_off() -> None:
    """With halt_detection off the host may still wake the guest by an NMI."""
    with machine(CLI_HLT, irqchip="kernel", halt_detection=False) as vm:
        assert vm.run(timeout=0.5).kind == "TIMEOUT"


def test_port_write_reaches_the_device() -> None:
    """A device sees the offset into its range, the size and the value."""
    recorder = Recorder()
    with machine(mov_al(0x5A) + out_al(0x43) + HLT) as vm:
        vm.attach(recorder, ports=range(0x40, 0x48))
        assert vm.run(timeout=5) == Outcome.HALTED
    assert recorder.writes == [(3, 1, 0x5A)]


def test_port_read_is_masked_to_its_size() -> None:
    """What a device returns beyond the access size does not reach the guest."""
    with machine(in_al(0x40) + HLT) as vm:
        vm.attach(Recorder([0x1FF]), ports=range(0x40, 0x41))
        vm.run(timeout=5)
        assert vm.vcpus[0].regs.rax & 0xFFFF == 0xFF


def test_negative_answers_are_masked_too() -> None:
    """A device may return -1 for all ones."""
    with machine(in_al(0x40) * 2 + HLT) as vm:
        vm.attach(Recorder([-1, -1]), ports=range(0x40, 0x41))
        vm.run(timeout=5)
        assert vm.vcpus[0].regs.rax & 0xFF == 0xFF


def test_unmapped_port_reads_all_ones_and_is_counted() -> None:
    """Where no device is, reads give ones and every access is counted."""
    with machine(in_al(0x99) * 3 + HLT) as vm:
        vm.run(timeout=5)
        assert vm.vcpus[0].regs.rax & 0xFF == 0xFF
        assert vm.bus.ports.unmapped[0x99] == 3


def test_string_output_arrives_in_order() -> None:
    """REP OUTSB is one exit with many elements; the device gets each."""
    recorder = Recorder()
    code = b"\xfc\xbe\x20\x00\xb9\x05\x00\xba\x40\x00\xf3\x6e\xf4".ljust(0x20, b"\x90") + b"hello"
    with machine(code) as vm:
        state = vm.vcpus[0].capture_state()
        state.ds.base, state.ds.selector = BASE, BASE >> 4
        vm.vcpus[0].load_state(state)
        vm.attach(recorder, ports=range(0x40, 0x41))
        assert vm.run(timeout=5) == Outcome.HALTED
    assert bytes(value for _, _, value in recorder.writes) == b"hello"


def test_mmio_outside_memory_reaches_the_device() -> None:
    """An access beyond the slots goes to the MMIO bus."""
    recorder = Recorder([0x1234])
    # mov $0x2000, %ax; mov %ax, %ds; mov 0x10, %ax; mov %ax, 0x12; hlt  (DS base 0x20000 is past 64 KiB of RAM)
    code = b"\xb8\x00\x20\x8e\xd8\xa1\x10\x00\xa3\x12\x00\xf4"
    with machine(code, memory="64K") as vm:
        vm.attach(recorder, mmio=range(0x20000, 0x21000))
        assert vm.run(timeout=5) == Outcome.HALTED
    assert recorder.writes == [(0x12, 2, 0x1234)]


def test_a_device_ends_the_run() -> None:
    """An Outcome that a device returns ends the run, and the registers are those after the instruction."""
    with machine(mov_al(7) + out_al(0xF4) + HLT) as vm:
        vm.attach(Stopper(), ports=range(0xF4, 0xF5))
        outcome = vm.run(timeout=5)
        assert (outcome.kind, outcome.code, outcome.exit_status) == ("DEBUG_EXIT", 7, 15)
        assert vm.vcpus[0].regs.rip == 4


def test_a_device_that_raises_surfaces_in_the_caller() -> None:
    """An exception in a user's device stops the machine and keeps its traceback."""

    class Broken(Device):
        name = "broken"

        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError("mine")

    with machine(out_al(0x40) + SPIN) as vm:
        vm.attach(Broken(), ports=range(0x40, 0x41))
        with pytest.raises(DeviceError, match="broken") as caught:
            vm.run(timeout=5)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.value.__cause__.__traceback__ is not None
        assert not vm.running


def test_timeout_pauses_and_run_goes_on() -> None:
    """After TIMEOUT the machine is paused; another run continues where it was."""
    recorder = Recorder()
    # 1: out; then spin until memory[0x80] is set: cmpb $0, 0x80; je .-5
    code = out_al(0x40) + b"\x80\x3e\x80\x00\x00\x74\xf9" + out_al(0x41) + HLT
    with machine(code) as vm:
        vm.attach(recorder, ports=range(0x40, 0x42))
        state = vm.vcpus[0].capture_state()
        state.ds.base, state.ds.selector = BASE, BASE >> 4
        vm.vcpus[0].load_state(state)
        for _ in range(100):  # a slow machine may not have come to the first instruction yet
            assert vm.run(timeout=0.3).kind == "TIMEOUT"
            if recorder.writes:
                break
        assert [offset for offset, _, _ in recorder.writes] == [0]
        vm.memory[BASE + 0x80] = 1
        assert vm.run(timeout=5) == Outcome.HALTED
        assert [offset for offset, _, _ in recorder.writes] == [0, 1]


def test_registers_are_refused_while_running() -> None:
    """Registers of a running vCPU would be a lie: the error says to pause."""
    with machine(SPIN) as vm:
        vm.start()
        with pytest.raises(MachineStateError, match="pause"):
            _ = vm.vcpus[0].regs
        vm.pause()
        assert vm.vcpus[0].regs.rip == 0


def test_registers_are_writable_while_paused() -> None:
    """Assigning a register changes where the guest goes on."""
    with machine(SPIN + HLT) as vm:
        vm.start()
        vm.pause()
        vm.vcpus[0].regs.rip += 2
        vm.vcpus[0].regs.update(rax=0xDEAD, rbx=0xBEEF)
        assert vm.run(timeout=5) == Outcome.HALTED
        assert (vm.vcpus[0].regs.rax, vm.vcpus[0].regs.rbx) == (0xDEAD, 0xBEEF)


def test_stop_from_another_thread_ends_wait() -> None:
    """stop() ends a wait() in progress with STOPPED."""
    with machine(SPIN) as vm:
        vm.start()
        threading.Timer(0.1, vm.stop).start()
        assert vm.wait(timeout=10) == Outcome.STOPPED


def test_stop_from_a_device() -> None:
    """A device may stop its own machine without dead-locking."""
    with machine(out_al(0x40) + SPIN) as vm:

        class Ender(Device):
            name = "ender"

            def write(self, offset: int, size: int, value: int) -> None:
                vm.stop()

        vm.attach(Ender(), ports=range(0x40, 0x41))
        assert vm.run(timeout=10) == Outcome.STOPPED


@pytest.mark.parametrize("irqchip", ["none", "kernel"])
def test_close_from_every_state(irqchip: str) -> None:
    """close() works on a new, running, paused, halted and ended machine, and twice."""
    for prepare in (
        lambda vm: None,
        lambda vm: vm.start(),
        lambda vm: (vm.start(), vm.pause()),
        lambda vm: vm.run(timeout=0.05),
    ):
        for code in (SPIN, CLI_HLT, STI_HLT):
            vm = machine(code, irqchip=irqchip)
            prepare(vm)
            started = time.monotonic()
            vm.close()
            vm.close()
            assert time.monotonic() - started < 5
            with pytest.raises(MachineStateError):
                vm.start()


def test_wait_without_start_says_so() -> None:
    """wait() on a machine that nobody started would last for ever."""
    with machine(HLT) as vm, pytest.raises(MachineStateError, match="start"):
        vm.wait()


def test_reset_starts_over() -> None:
    """reset() gives fresh vCPUs over the same memory; hooks put the boot state back."""
    with machine(mov_al(1) + HLT) as vm:
        first = vm.vcpus[0].capture_state()
        vm.on_reset.append(lambda: vm.vcpus[0].load_state(first))
        assert vm.run(timeout=5) == Outcome.HALTED
        vm.memory[0x2000] = 0x77
        vm.reset()
        assert vm.vcpus[0].regs.rip == 0
        assert vm.run(timeout=5) == Outcome.HALTED
        assert vm.memory[0x2000] == 0x77


def test_run_once_steps_through_exits() -> None:
    """Without threads, run_once handles one exit on the caller's thread and says what it was."""
    with machine(mov_al(3) + out_al(0x40) + in_al(0x41) + HLT) as vm:
        recorder = Recorder([0x99])
        vm.attach(recorder, ports=range(0x40, 0x42))
        vcpu = vm.vcpus[0]
        first = vcpu.run_once()
        assert (first.reason, first.port, first.size, first.write, first.value) == ("IO", 0x40, 1, True, 3)
        assert vcpu.regs.rip == 4
        second = vcpu.run_once()
        assert (second.port, second.write, second.value) == (0x41, False, 0x99)
        assert vcpu.regs.rax & 0xFF == 0x99
        last = vcpu.run_once()
        assert last.reason == "HLT" and last.outcome == Outcome.HALTED


def test_a_forked_child_is_told() -> None:
    """After os.fork the machine is the parent's: the child gets an error that says so."""
    with machine(CLI_HLT) as vm:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child() -> None:
            try:
                vm.start()
                queue.put("started")
            except MachineStateError as error:
                queue.put(str(error))

        process = context.Process(target=child)
        process.start()
        process.join(10)
        assert "fork" in queue.get()
        assert vm.run(timeout=5) == Outcome.HALTED


def test_more_than_one_cpu_needs_an_irqchip() -> None:
    """SIPI goes through the local APIC, so SMP without one is refused with the option's name."""
    with pytest.raises(ConfigError, match="irqchip"):
        Machine(memory="1M", cpus=2, irqchip="none")


def test_many_exits_with_and_without_c_actions() -> None:
    """A COUNT action answers in C what otherwise reaches Python; the guest does the same either way."""
    for in_c in (False, True):
        recorder = Recorder()
        with machine(out_loop(0x40, 1000) + HLT) as vm:
            vm.attach(recorder, ports=range(0x40, 0x41))
            action = vm.actions.count(range(0x40, 0x41)) if in_c else None
            assert vm.run(timeout=20) == Outcome.HALTED
            assert len(recorder.writes) == (0 if in_c else 1000)
            assert action is None or action.hits == 1000


def test_a_late_message_does_not_end_the_thread() -> None:
    """What was asked of a vCPU that a reset has replaced meanwhile is dropped; its thread runs on."""

    def late() -> None:
        raise MachineStateError("the file descriptor is closed")

    with machine(HLT * 2) as vm:  # what is behind them is no program
        assert vm.run(timeout=5) == Outcome.HALTED
        vm.vcpus[0].post(late)
        assert vm.run(timeout=5) == Outcome.HALTED


@pytest.mark.parametrize("long", [True, False])
def test_a_long_pause_is_told_to_the_guest(monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Who has kvmclock finds in it that it was stopped (PVCLOCK_GUEST_STOPPED), unless that was but for a moment."""
    monkeypatch.setattr("pykvm.core.machine.FORGIVEN_S", 0.0 if long else 3600.0)
    kvmclock_msr, flags, stopped = 0x4B564D01, 29, 1 << 1  # MSR_KVM_SYSTEM_TIME_NEW, struct pvclock_vcpu_time_info
    with machine(SPIN) as vm:
        vm.vcpus[0].fd.set_msrs({kvmclock_msr: 0x2000 | 1})
        assert vm.run(timeout=0.02).kind == "TIMEOUT"
        assert vm.memory[0x2000] == 2 and not vm.memory[0x2000 + flags] & stopped  # an even version: it is written
        assert vm.run(timeout=0.02).kind == "TIMEOUT"
        assert bool(vm.memory[0x2000 + flags] & stopped) is long
