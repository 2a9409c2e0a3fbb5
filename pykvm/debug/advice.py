"""What a crash most likely means, and what to do next. Layer: debug, part of the crash report.

Each rule looks at the finished parts of a report and gives a sentence, or nothing. They state what the state
shows; none is a guess that the state does not carry.
"""

from __future__ import annotations

from pykvm.debug.code import MAX_INSTRUCTION, read_linear, translate
from pykvm.debug.decode import EXCEPTIONS
from pykvm.x86.segments import CR0_EM, CR0_PE, CR0_PG, CR4_OSFXSR, EFER_LMA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.debug.code import Memory
    from pykvm.debug.host import Backend
    from pykvm.debug.report import CrashReport
    from pykvm.x86.segments import CpuState

CR4_OSXSAVE = 1 << 18
_GATE_PRESENT = 0x80  # bit 47 of a gate
_SSE = ("SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2")
_TRAPS = {"ud2": "#UD", "ud0": "#UD", "ud1": "#UD", "int3": "#BP"}

WHERE_IT_RUNS = (
    "Run it where ring 0 is native: in the AMD-V lab (`scripts/lab pykvm start ...`), or on a machine with VT-x "
    "or AMD-V."
)

# KVM must reset a vCPU whose VMCB is undefined after a SHUTDOWN intercept (AMD APM vol. 2 15.14.3)
LOST_STATE = (
    "The registers are those after INIT: AMD-V does not keep a CPU's state over a triple fault. Memory and "
    "console still show how far the guest came; an IDT with a handler that prints tells more."
)


def advise(report: CrashReport, memory: Memory, backend: Backend) -> list[str]:
    """Sentences about `report`, most telling first."""
    if report.kind == "TRIPLE_FAULT" and backend.name == "svm" and is_reset_state(report.state):
        return [LOST_STATE]
    found: list[str] = []
    if report.reason.emulation:
        found += _emulation(report, backend)
    if report.reason.name == "KVM_EXIT_FAIL_ENTRY":
        found += _fail_entry(report)
    found += _instruction_pointer(report, memory)
    if report.kind == "TRIPLE_FAULT":
        found += _triple_fault(report, memory)
    return found


def is_reset_state(state: CpuState) -> bool:
    """Whether the registers are those after RESET or INIT: nothing of the guest's is left in them."""
    return state.cs.base == 0xFFFF_0000 and state.gprs.get("rip", 0) == 0xFFF0 and not state.cr0 & CR0_PE


def _emulation(report: CrashReport, backend: Backend) -> Iterator[str]:
    instruction = report.code[0] if report.code else None
    name = f"`{instruction.mnemonic}`" if instruction and instruction.valid else "this instruction"
    if _is_interpreted(report, backend):
        yield (
            f"KVM interprets guest {backend.interpreted} on this host ({backend.module}), and its interpreter "
            f"does not know {name}: no virtual machine monitor can run this kernel here. {WHERE_IT_RUNS}"
        )
        if instruction and instruction.mnemonic in _TRAPS:
            yield (
                f"{name} is a trap that a kernel executes on purpose (a failed assertion, a compiler's "
                f"unreachable code): a CPU would raise {_TRAPS[instruction.mnemonic]} instead."
            )
        return
    yield (
        f"KVM emulates an instruction when it reaches memory that is not RAM (MMIO, read-only memory) or when "
        f"the code itself does: look at the operands of {name}, and at where it was fetched from."
    )


def _is_interpreted(report: CrashReport, backend: Backend) -> bool:
    if backend.interpreted == "ring 0":
        return report.cpl == 0
    return backend.interpreted == "real mode" and not report.state.cr0 & CR0_PE


def _fail_entry(report: CrashReport) -> Iterator[str]:
    if report.guest_checks:
        yield "The register state breaks the rules of VM entry that are listed below: correct it before running."
    else:
        yield (
            "The registers obey the rules of VM entry that can be checked from here (segments, control "
            "registers, RFLAGS): look at MSRs, pending events and debug registers."
        )


def _instruction_pointer(report: CrashReport, memory: Memory) -> Iterator[str]:
    walk, code = report.walk, report.code
    if walk.gpa is None:
        yield f"The instruction pointer {report.rip:#x} {walk.reason}."
    elif not code:
        yield f"The instruction pointer leads to guest physical {walk.gpa:#x}, where there is no memory."
    elif report.state.cr0 & CR0_PG and not walk.executable:
        yield f"The page of the instruction pointer {report.rip:#x} is marked no-execute."
    elif not any(read_linear(memory, report.state, report.rip, MAX_INSTRUCTION)) and not report.reason.instruction:
        yield f"The instruction pointer {report.rip:#x} is in zero-filled memory: the guest jumped into nothing."
    elif not code[0].valid:
        yield f"The bytes at {report.rip:#x} are no valid {report.bits}-bit instruction."
    else:
        yield from _vector_instruction(report)


def _vector_instruction(report: CrashReport) -> Iterator[str]:
    state, needed = report.state, report.code[0].features
    if any(each in _SSE for each in needed) and (not state.cr4 & CR4_OSFXSR or state.cr0 & CR0_EM):
        yield (
            f"`{report.code[0].mnemonic}` is an SSE instruction, but SSE is off (CR4.OSFXSR is "
            f"{int(bool(state.cr4 & CR4_OSFXSR))}, CR0.EM is {int(bool(state.cr0 & CR0_EM))}): turn it on, or "
            "compile the kernel with -mgeneral-regs-only."
        )
    elif any(each.startswith("AVX") for each in needed) and not state.cr4 & CR4_OSXSAVE:
        yield f"`{report.code[0].mnemonic}` needs AVX, but CR4.OSXSAVE is 0."


def _triple_fault(report: CrashReport, memory: Memory) -> Iterator[str]:
    state = report.state
    if state.cr0 & CR0_PE:
        yield from _interrupt_table(report, memory)
    if state.cr0 & CR0_PG:
        # a push goes below the stack pointer
        top = (report.stack_address - report.stack_word_size) & ((1 << 64) - 1)
        walk = translate(memory, state, top)
        if walk.gpa is None:
            yield f"The stack below {report.stack_address:#x} {walk.reason}: no exception can be delivered."


def _interrupt_table(report: CrashReport, memory: Memory) -> Iterator[str]:
    state = report.state
    size = 16 if state.efer & EFER_LMA else 8  # of a gate: SDM vol. 3A 6.14.1 and 6.11
    vectors = (state.idt.limit + 1) // size
    if not vectors:
        yield f"The IDT is empty (limit {state.idt.limit:#x}): the first exception becomes a triple fault."
        return
    walk = translate(memory, state, state.idt.base)
    if walk.gpa is None:
        yield f"The IDT at {state.idt.base:#x} {walk.reason}."
        return
    table = read_linear(memory, state, state.idt.base, min(vectors, len(EXCEPTIONS)) * size)
    usual = (6, 8, 13, 14)  # #UD, #DF, #GP, #PF
    absent = [n for n in usual if len(table) < (n + 1) * size or not table[n * size + 5] & _GATE_PRESENT]
    if absent:
        yield f"The IDT has no present gate for {', '.join(EXCEPTIONS[n] for n in absent)}."
