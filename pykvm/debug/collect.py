"""Takes the facts of a crash from a live machine. Layer: debug.

Runs on the crashed vCPU's own thread (or while it is paused), before the machine is stopped.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.debug.decode import ExitFacts
from pykvm.debug.host import detect_backend
from pykvm.debug.report import CONSOLE_BYTES, CrashReport, build_report
from pykvm.kvm.exits import reason_name
from pykvm.x86.cpuid import CpuidEntry, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu


def collect_report(machine: Machine, vcpu: Vcpu, outcome: Outcome) -> CrashReport:
    """The report on `vcpu`, which has just ended the run with `outcome` (TRIPLE_FAULT or CRASH)."""
    facts = exit_facts(vcpu.state.run)
    damaged = outcome.detail == machine.memory.damage()
    if damaged and facts.reason == "UNKNOWN":  # what KVM_RUN leaves there when it fails
        facts = ExitFacts("KVM_RUN: EFAULT")
    counts: dict[str, int] = {}
    for each in machine.vcpus:
        for reason, count in each.exit_counts().items():
            name = reason_name(reason)
            counts[name] = counts.get(name, 0) + count
    # an ordinary exit that ended the run did so by what a device made of it: the device says what
    told = damaged or facts.reason in ("IO", "MMIO")
    return build_report(
        outcome.kind,
        facts,
        vcpu.capture_state(),
        machine.memory,
        vcpu=vcpu.index,
        title=outcome.detail if told else "",
        console=machine.console.data[-CONSOLE_BYTES:],
        exits=counts,
        backend=detect_backend(),
        phys_bits=_phys_bits(vcpu) if facts.reason == "FAIL_ENTRY" else 52,
    )


def exit_facts(run: CData) -> ExitFacts:
    """What struct kvm_run says about its last exit."""
    reason, facts = run.exit_reason, ExitFacts(reason_name(run.exit_reason))
    if reason == lib.KVM_EXIT_INTERNAL_ERROR:
        facts.suberror = run.internal.suberror
        count = min(run.internal.ndata, len(run.internal.data))
        facts.data = tuple(run.internal.data[i] for i in range(count))
    elif reason == lib.KVM_EXIT_FAIL_ENTRY:
        facts.hardware_reason = run.fail_entry.hardware_entry_failure_reason
        facts.cpu = run.fail_entry.cpu
    elif reason == lib.KVM_EXIT_UNKNOWN:
        facts.hardware_reason = run.hw.hardware_exit_reason
    elif reason == lib.KVM_EXIT_EXCEPTION:
        facts.vector, facts.error_code = run.ex.exception, run.ex.error_code
    elif reason == lib.KVM_EXIT_SYSTEM_EVENT:
        facts.event = run.system_event.type
    elif facts.reason == "MEMORY_FAULT":  # Linux 6.8: the header may be older
        fault = run.memory_fault
        facts.gpa, facts.size, facts.flags = fault.gpa, fault.size, fault.flags
    return facts


def _phys_bits(vcpu: Vcpu) -> int:
    entry = find([CpuidEntry(*each) for each in vcpu.fd.get_cpuid2()], 0x80000008)
    return (entry.eax & 0xFF if entry is not None else 0) or 52
