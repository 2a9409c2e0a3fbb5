"""`Machine.trace`: exits and memory accesses shown to Python as they happen."""

from __future__ import annotations

import guests
import pytest
from realmode import BASE, HLT, SPIN, in_al, machine, mov_al, out_al, out_loop

from pykvm import ConfigError, Exit, Outcome, Vcpu

RUN_S = 60
DATA = BASE + 0x800  # within the page of the code's segment, DS:0x800
# mov $0x3000, %ax; mov %ax, %ds
DS_3000 = b"\xb8\x00\x30\x8e\xd8"
STORE, LOAD = b"\xa2\x10\x00", b"\xa0\x10\x00"  # mov %al, 0x10; mov 0x10, %al


def test_exits_with_their_values() -> None:
    """Writes, reads and the end are events, in order, with port and value."""
    with machine(mov_al(5) + out_al(0x40) + in_al(0x41) + HLT) as vm, vm.trace() as trace:
        assert vm.run(RUN_S) == Outcome.HALTED
        events = [event for _, event in trace.events]
    assert [(each.reason, each.port, each.write, each.value) for each in events] == [
        ("IO", 0x40, True, 5),
        ("IO", 0x41, False, 0xFF),
        ("HLT", None, None, None),
    ]
    assert events[-1].outcome == Outcome.HALTED


def test_a_callback_and_chosen_reasons() -> None:
    """The callback gets the vCPU and only the reasons that were asked for."""
    seen: list[tuple[int, str]] = []

    def on_event(vcpu: Vcpu, event: Exit) -> None:
        seen.append((vcpu.index, event.reason))

    with machine(out_loop(0x40, 3) + HLT) as vm, vm.trace(on_event, exits=["HLT"]):
        vm.run(RUN_S)
    assert seen == [(0, "HLT")]


def test_what_c_would_answer_is_seen_as_well() -> None:
    """A console's bytes are events while the trace is on, and the console has them too."""
    with guests.pc("hello64.elf") as pc, pc.trace() as trace:
        pc.run(RUN_S)
        written = bytes(event.value or 0 for _, event in trace.events if event.port == 0x3F8 and event.write)
        assert written == b"Hello from long mode\r\n"
        assert guests.text(pc) == "Hello from long mode\n"


def test_a_trace_of_a_running_machine() -> None:
    """A trace begins and ends while the guest runs."""
    # 1: out %al, $0x40; jmp 1b
    with machine(out_al(0x40) + b"\xeb\xfc") as vm:
        vm.start()
        with vm.trace() as trace:
            while len(trace.events) < 10:
                assert vm.wait(0.01) is None
        vm.pause()
        count = len(trace.events)
        assert vm.run(0.05).kind == "TIMEOUT"
        assert len(trace.events) == count


@pytest.mark.parametrize("irqchip", ["none", "kernel"])
def test_memory_accesses(irqchip: str) -> None:
    """Loads and stores of a range are events with address, size and value; memory behaves as before."""
    code = DS_3000 + mov_al(0x77) + STORE + mov_al(0) + LOAD + b"\xa2\x80\x00" + b"\xfa" + HLT
    with machine(code, irqchip=irqchip) as vm:
        watched = range(0x30010, 0x30014)
        with vm.trace(exits=False, memory=watched) as trace:
            assert vm.run(RUN_S) == Outcome.HALTED
            events = [event for _, event in trace.events]
            assert vm.vcpus[0].regs.rax & 0xFF == 0x77
        assert [(each.reason, each.address, each.size, each.write, each.value) for each in events] == [
            ("MEMORY", 0x30010, 1, True, 0x77),
            ("MEMORY", 0x30010, 1, False, 0x77),
        ]
        assert vm.memory[0x30080] == 0x77  # the same page, but not watched
        assert not vm.bus.mmio.unmapped


def test_several_ranges_and_the_end_of_the_trace() -> None:
    """Holes in one slot are independent; after the trace the guest has its memory without exits."""
    code = DS_3000 + mov_al(1) + STORE + b"\x8c\xd8\x05\x00\x02\x8e\xd8" + mov_al(2) + STORE + HLT  # then DS 0x3200
    with machine(code) as vm:
        with vm.trace(exits=False, memory=[range(0x30010, 0x30011), range(0x32010, 0x32011)]) as trace:
            vm.run(RUN_S)
            assert [event.address for _, event in trace.events] == [0x30010, 0x32010]
        from realmode import real_mode

        vm.vcpus[0].load_state(real_mode(BASE >> 4, 0, sp=0x800))
        vm.run(RUN_S)
        assert len(trace.events) == 2
        assert (vm.memory[0x30010], vm.memory[0x32010]) == (1, 2)


def test_memory_that_cannot_be_traced() -> None:
    """Ranges outside RAM, empty ones, and two traces of one page are refused; nothing is left behind."""
    with machine(SPIN) as vm:
        for bad in (range(0), range(0x200000, 0x200001), range(0xFFFFF, 0x100001), range(0, 10, 2)):
            with pytest.raises(ConfigError, match="no range of guest RAM"):
                vm.trace(memory=bad)
        with vm.trace(memory=range(0x30000, 0x30004)), pytest.raises(ConfigError, match="overlaps"):
            vm.trace(memory=[range(0x40000, 0x40001), range(0x30008, 0x30009)])
        vm.trace(memory=range(0x40000, 0x40001)).stop()
        assert not vm.bus.mmio.regions


def test_a_trace_survives_a_reset() -> None:
    """After a reset accesses are still seen."""
    with guests.pc("touch.elf", "mib=1 start=16") as pc:
        with pc.trace(exits=False, memory=range(16 << 20, (16 << 20) + 8)) as trace:
            for passes in (1, 2):
                assert pc.run(RUN_S) == Outcome("DEBUG_EXIT", 0)
                assert len(trace.events) == passes
                pc.reset()
        trace.stop()
