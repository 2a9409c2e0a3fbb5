"""The crash report: everything about the guest's last state that a kernel author asks for. Layer: debug.

`build_report` takes plain data and guest memory, so it works on a live machine, on a snapshot and in a unit test.
The guest's state is hostile or broken by definition: every read is bounded and checked, nothing raises. The report
is data (attributes, `as_dict()`) and text (`text()`, see pykvm.debug.render).
"""

from __future__ import annotations

from pykvm.debug.advice import advise
from pykvm.debug.bits import bitness, describe_mode, describe_segment, flag_names, privilege_level
from pykvm.debug.code import disassemble, linear_rip, read_linear, stack_pointer, translate
from pykvm.debug.decode import decode
from pykvm.debug.host import Backend
from pykvm.x86.segments import CR0_PG, GPR_NAMES, SEGMENT_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvm.debug.code import Instruction, Memory
    from pykvm.debug.decode import ExitFacts, Reason
    from pykvm.x86.paging import Walk
    from pykvm.x86.segments import CpuState

CODE_INSTRUCTIONS = 6  # the faulting one and a few after it
CODE_BYTES = CODE_INSTRUCTIONS * 15
STACK_WORDS = {8: 16, 4: 32, 2: 32}  # word size -> how many
CONSOLE_LINES = 12
CONSOLE_BYTES = 8192
CONSOLE_WIDTH = 160


class CrashReport:
    """A guest's end.

    kind          TRIPLE_FAULT or CRASH
    vcpu          index of the vCPU that ended it
    reason        what the exit said, decoded (Reason)
    state         its registers (CpuState)
    mode, bits, cpl   the CPU's mode in words, the code size (16, 32, 64), the privilege level
    rip           linear address of the instruction
    code          instructions from RIP on (Instruction); empty if nothing can be read there
    walk          the page walk of RIP; fault_walk that of CR2, None where CR2 says nothing
    stack_address, stack_word_size, stack   the words from the stack pointer up, as far as they can be read
    console       the last lines that the guest printed, made printable
    exits         exits by reason name
    guest_checks  for a refused VM entry: which rules the state breaks
    advice        what to make of it, in sentences
    """

    __slots__ = (
        "advice", "bits", "code", "console", "cpl", "exits", "fault_walk", "guest_checks", "kind", "mode", "reason",
        "rip", "stack", "stack_address", "stack_word_size", "state", "vcpu", "walk",
    )  # fmt: skip

    def __init__(self, kind: str, vcpu: int, reason: Reason, state: CpuState) -> None:
        self.kind = kind
        self.vcpu = vcpu
        self.reason = reason
        self.state = state
        self.mode = describe_mode(state)
        self.bits = bitness(state)
        self.cpl = privilege_level(state)
        self.rip = linear_rip(state)
        self.code: list[Instruction] = []
        self.walk: Walk
        self.fault_walk: Walk | None = None
        self.stack_address, self.stack_word_size = stack_pointer(state)
        self.stack: list[int] = []
        self.console: list[str] = []
        self.exits: dict[str, int] = {}
        self.guest_checks: list[str] = []
        self.advice: list[str] = []

    @property
    def title(self) -> str:
        """One line: who, what, and KVM's name for it."""
        return f"vCPU {self.vcpu}: {self.reason.title} ({self.reason.name})"

    def text(self) -> str:
        """The report for people, at most 100 columns wide."""
        from pykvm.debug.render import render

        return render(self)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<CrashReport {self.title}>"

    def as_dict(self) -> dict[str, object]:
        """The report for programs, ready for JSON; addresses and registers are hexadecimal strings."""
        state = self.state
        return {
            "kind": self.kind,
            "vcpu": self.vcpu,
            "title": self.title,
            "reason": {
                "name": self.reason.name,
                "title": self.reason.title,
                "details": list(self.reason.details),
                "instruction": self.reason.instruction.hex(),
            },
            "advice": list(self.advice),
            "guest_checks": list(self.guest_checks),
            "mode": self.mode,
            "bits": self.bits,
            "cpl": self.cpl,
            "registers": {name: hex(state.gprs.get(name, 0)) for name in GPR_NAMES},
            "rflags": flag_names("rflags", state.gprs.get("rflags", 0)),
            "control": {name: hex(getattr(state, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")},
            "segments": {name: _segment_dict(state, name) for name in SEGMENT_NAMES},
            "tables": {
                name: {"base": hex(getattr(state, name).base), "limit": hex(getattr(state, name).limit)}
                for name in ("gdt", "idt")
            },
            "rip_linear": hex(self.rip),
            "code": [{"address": hex(each.address), "bytes": each.raw.hex(), "text": each.text} for each in self.code],
            "walk": _walk_dict(self.walk),
            "fault_walk": _walk_dict(self.fault_walk) if self.fault_walk else None,
            "stack": {
                "address": hex(self.stack_address),
                "word_size": self.stack_word_size,
                "words": [hex(word) for word in self.stack],
            },
            "console": list(self.console),
            "exits": dict(self.exits),
        }


def build_report(
    kind: str,
    facts: ExitFacts,
    state: CpuState,
    memory: Memory,
    *,
    vcpu: int = 0,
    title: str = "",
    console: bytes = b"",
    exits: Mapping[str, int] | None = None,
    backend: Backend | None = None,
    phys_bits: int = 52,
) -> CrashReport:
    """The report on a vCPU that is stopped.

    kind       TRIPLE_FAULT or CRASH
    facts      the exit that ended it
    state      its registers, rip and rflags among state.gprs
    memory     guest physical memory (GuestMemory)
    title      what ended the guest when the exit itself does not say it (a pvpanic write)
    console    the bytes that the guest printed last; the end of it is shown
    exits      exits by reason name without KVM_EXIT_
    backend    from debug.host.detect_backend(); None: unknown
    phys_bits  the guest's physical address width (CPUID 0x80000008 EAX[7:0])
    """
    backend = backend or Backend("", "")
    reason = decode(facts, backend=backend.name)
    if title:
        reason.title = title
    report = CrashReport(kind, vcpu, reason, state)
    report.walk = translate(memory, state, report.rip)
    if state.cr0 & CR0_PG and state.cr2:
        report.fault_walk = translate(memory, state, state.cr2)
    code = read_linear(memory, state, report.rip, CODE_BYTES)
    if not code.startswith(reason.instruction):
        code = reason.instruction  # what KVM fetched is what failed, whatever is there now
    report.code = disassemble(code, report.bits, state.gprs.get("rip", 0), CODE_INSTRUCTIONS)
    report.stack = _stack_words(report, memory)
    report.console = printable_tail(console)
    report.exits = dict(exits or {})
    if facts.reason == "FAIL_ENTRY":
        from pykvm.x86.guest_checks import check_guest_state

        report.guest_checks = check_guest_state(state, phys_bits=phys_bits)
    report.advice = advise(report, memory, backend)
    return report


def _stack_words(report: CrashReport, memory: Memory) -> list[int]:
    size = report.stack_word_size
    raw = read_linear(memory, report.state, report.stack_address, STACK_WORDS[size] * size)
    return [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw) - size + 1, size)]


def printable_tail(console: bytes, lines: int = CONSOLE_LINES) -> list[str]:
    """The last `lines` lines as printable text: control characters escaped, long lines cut.

    The guest chose these bytes: escape sequences must not reach the terminal that shows the report.
    """
    text = console[-CONSOLE_BYTES:].decode("utf-8", "backslashreplace")
    rows = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")[-lines:]
    return [_printable(row.rstrip("\r")) for row in rows] if any(rows) else []


def _printable(row: str) -> str:
    safe = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in row.expandtabs())
    return safe if len(safe) <= CONSOLE_WIDTH else safe[: CONSOLE_WIDTH - 3] + "..."


def _segment_dict(state: CpuState, name: str) -> dict[str, object]:
    segment = getattr(state, name)
    return {
        "selector": hex(segment.selector),
        "base": hex(segment.base),
        "limit": hex(segment.limit),
        "attributes": describe_segment(segment),
    }


def _walk_dict(walk: Walk) -> dict[str, object]:
    return {
        "linear": hex(walk.linear),
        "mode": walk.mode,
        "gpa": None if walk.gpa is None else hex(walk.gpa),
        "reason": walk.reason,
        "page_size": walk.page_size,
        "writable": walk.writable,
        "user": walk.user,
        "executable": walk.executable,
        "levels": [
            {"name": each.name, "gpa": hex(each.gpa), "value": hex(each.value), "flags": each.flags}
            for each in walk.levels
        ],
    }
