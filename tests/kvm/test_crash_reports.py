"""Crash reports of real guests."""

from __future__ import annotations

import json

import pytest

from pykvm.core.device import Device
from pykvm.core.machine import Machine
from pykvm.core.outcome import Outcome
from pykvm.debug.advice import is_reset_state
from pykvm.debug.host import detect_backend
from pykvm.debug.report import CrashReport
from pykvm.debug.stats import collect_stats
from pykvm.x86.states import long_mode

ENTRY = 0x20000
PORT = 0x505


class Panic(Device):
    """Ends the guest as pvpanic does."""

    def write(self, offset: int, size: int, value: int) -> Outcome:
        """Any write is a crash."""
        return Outcome("CRASH", detail="the device says no")


def crash(code: str, **options: object) -> tuple[Outcome, CrashReport]:
    """Run 64-bit code (hexadecimal) to its bad end."""
    with Machine(memory="1M", irqchip="none", **options) as machine:
        machine.attach(Panic(), ports=range(PORT, PORT + 1))
        machine.console.write(b"last words\r\n")
        machine.memory.write(ENTRY, bytes.fromhex(code))
        machine.vcpus[0].load_state(long_mode(machine.memory, ENTRY))
        outcome = machine.run(timeout=10)
        assert isinstance(outcome.report, CrashReport)
        json.dumps(outcome.report.as_dict())
        return outcome, outcome.report


def test_triple_fault() -> None:
    """A page fault without an IDT: the report shows the instruction and the empty IDT, or says why it cannot."""
    # mov rax, 0x4000000000; mov rax, [rax]
    outcome, report = crash("48b80000000040000000 488b00")
    assert outcome.kind == "TRIPLE_FAULT"
    assert report.reason.name == "KVM_EXIT_SHUTDOWN"
    assert report.console == ["last words"]
    assert report.exits == {"SHUTDOWN": 1}
    if detect_backend().name == "svm" and is_reset_state(report.state):
        assert "AMD-V does not keep" in report.text()
    else:
        assert report.code[0].text == "mov rax, [rax]"
        assert report.state.gprs["rax"] == 0x40_0000_0000
        assert "IDT is empty" in report.text()


def test_device_ends_the_guest() -> None:
    """A device's Outcome gives the title, and the registers are those of the guest."""
    # mov eax, 0x1234; mov dx, PORT; out dx, al; hlt
    outcome, report = crash("b834120000 66ba0505 ee f4")
    assert outcome.kind == "CRASH"
    assert report.title == "vCPU 0: the device says no (KVM_EXIT_IO)"
    assert report.state.gprs["rax"] == 0x1234
    assert report.exits == {"IO": 1}


def test_interpreter_names_the_instruction() -> None:
    """Where KVM interprets ring 0, an instruction that it lacks is named, with the way out."""
    backend = detect_backend()
    if backend.interpreted != "ring 0":
        pytest.skip(f"{backend.module} runs ring 0 natively")
    # popcnt rbx, rax
    outcome, report = crash("f3480fb8d8 f4")
    assert outcome.kind == "CRASH"
    assert report.reason.instruction.startswith(bytes.fromhex("f3480fb8d8"))
    assert report.code[0].text == "popcnt rbx, rax"
    assert "`popcnt`" in report.text()
    assert "scripts/lab" in report.text()


def test_statistics() -> None:
    """With stats on, exits are counted by reason and port, and the time in and out of the guest adds up."""
    with Machine(memory="1M", irqchip="none", stats=True) as machine:
        # mov ecx, 100; mov dx, 0x99; 1: out dx, al; dec ecx; jnz 1b; in al, dx; hlt
        machine.memory.write(ENTRY, bytes.fromhex("b964000000 66ba9900 ee ffc9 75fb ec f4"))
        machine.vcpus[0].load_state(long_mode(machine.memory, ENTRY))
        assert machine.run(timeout=10) == Outcome.HALTED
        stats = collect_stats(machine)
    assert stats.reasons == {"IO": 101, "HLT": 1}
    assert stats.ports == {0x99: (1, 100)}
    assert stats.mmio == {}
    assert stats.guest_ns > 0
    assert stats.outside_ns > 0
    assert "0x99" in stats.text()
