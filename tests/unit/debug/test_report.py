"""The crash report: what it says of known states, and that no state of a guest can break it."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.core.memory import GuestMemory
from pykvm.debug.bits import bitness, describe_mode, describe_segment, flag_names, privilege_level
from pykvm.debug.code import disassemble, read_linear
from pykvm.debug.decode import ExitFacts
from pykvm.debug.host import Backend
from pykvm.debug.report import CONSOLE_LINES, CrashReport, build_report, printable_tail
from pykvm.x86.segments import (
    CR0_PE,
    CR0_PG,
    CR4_OSFXSR,
    EFER_LMA,
    EFER_LME,
    GPR_NAMES,
    SEGMENT_NAMES,
    CpuState,
    DescriptorTable,
    Segment,
)
from pykvm.x86.states import long_mode, protected_flat, real_mode, reset_vector

MIB = 1 << 20
ENTRY = 0x100000
PVM = Backend("pvm", "kvm_pvm", "ring 0")
SVM = Backend("svm", "kvm_amd")
POPCNT = b"\xf3\x48\x0f\xb8\xc7"


@pytest.fixture
def memory() -> GuestMemory:
    """16 MiB of RAM at 0."""
    ram = GuestMemory()
    ram.add(0, 16 * MIB)
    return ram


def emulation(code: bytes) -> ExitFacts:
    """The exit of an instruction that KVM could not emulate, with the bytes that KVM fetched."""
    raw = bytes([len(code)]) + code.ljust(15, b"\0")
    words = [int.from_bytes(raw[at : at + 8], "little") for at in (0, 8)]
    return ExitFacts("INTERNAL_ERROR", suberror=1, data=[1, *words, 0x43])


def advice(report: CrashReport) -> str:
    """All advice in one line."""
    return " ".join(report.advice)


# -- what it says --------------------------------------------------------------------------------------------


def test_interpreted_ring_0_names_instruction_and_way_out(memory: GuestMemory) -> None:
    """Where KVM interprets ring 0, the report names the instruction and the places where it would run."""
    memory.write(ENTRY, POPCNT + b"\xf4")
    report = build_report("CRASH", emulation(POPCNT), long_mode(memory, ENTRY), memory, backend=PVM)
    assert report.code[0].text == "popcnt rax, rdi"
    assert report.code[1].text == "hlt"
    text = " ".join(report.text().split())
    for words in ("suberror 1 (KVM_INTERNAL_ERROR_EMULATION)", "`popcnt`", "kvm_pvm", "scripts/lab", "VT-x or AMD-V"):
        assert words in text


def test_ud2_is_called_a_trap(memory: GuestMemory) -> None:
    """ud2 in interpreted ring 0 is the kernel's own assertion, and the report says so."""
    memory.write(ENTRY, b"\x0f\x0b")
    report = build_report("CRASH", emulation(b"\x0f\x0b"), long_mode(memory, ENTRY), memory, backend=PVM)
    assert "`ud2` is a trap" in advice(report)
    assert "#UD" in advice(report)


def test_native_ring_0_points_at_the_operands(memory: GuestMemory) -> None:
    """On AMD-V or VT-x an emulation failure is about MMIO, and nobody is sent to another machine."""
    memory.write(ENTRY, POPCNT)
    report = build_report("CRASH", emulation(POPCNT), long_mode(memory, ENTRY), memory, backend=SVM)
    assert "MMIO" in advice(report)
    assert "scripts/lab" not in report.text()


def test_ring_3_is_not_blamed_on_the_interpreter(memory: GuestMemory) -> None:
    """Ring 3 runs natively everywhere: a failure there is not the host's interpreter."""
    state = long_mode(memory, ENTRY)
    state.ss.dpl = 3
    report = build_report("CRASH", emulation(POPCNT), state, memory, backend=PVM)
    assert report.cpl == 3
    assert "scripts/lab" not in report.text()


def test_real_mode_on_old_vmx(memory: GuestMemory) -> None:
    """VT-x without unrestricted guest interprets real mode only."""
    backend = Backend("vmx", "kvm_intel", "real mode")
    real = build_report("CRASH", emulation(b"\x0f\x01\xd0"), real_mode(0x1000, 0), memory, backend=backend)
    assert "interprets guest real mode" in advice(real)
    flat = build_report("CRASH", emulation(POPCNT), protected_flat(memory, ENTRY), memory, backend=backend)
    assert "interprets" not in advice(flat)


def test_kvms_bytes_win_over_memory(memory: GuestMemory) -> None:
    """What KVM had fetched is disassembled even if memory now holds something else."""
    memory.write(ENTRY, b"\x90" * 16)
    report = build_report("CRASH", emulation(POPCNT), long_mode(memory, ENTRY), memory, backend=PVM)
    assert [each.mnemonic for each in report.code] == ["popcnt"]


def test_triple_fault_with_empty_idt(memory: GuestMemory) -> None:
    """A missing IDT is named, and the instruction that wanted it is shown."""
    memory.write(ENTRY, b"\xcc\xf4")
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), long_mode(memory, ENTRY), memory, backend=SVM)
    assert report.title == "vCPU 0: triple fault (KVM_EXIT_SHUTDOWN)"
    assert "IDT is empty" in advice(report)
    assert report.code[0].text == "int3"


def test_triple_fault_with_absent_gates(memory: GuestMemory) -> None:
    """Gates of the usual exceptions that are not present are listed, present ones are not."""
    memory.write(ENTRY, b"\xcc")
    state = long_mode(memory, ENTRY)
    state.idt = DescriptorTable(0x2000, 0xFFF)
    for vector in (6, 13):
        memory.write(0x2000 + vector * 16, struct.pack("<HHHH8x", 0, 0x10, 0x8E00, 0x10))
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), state, memory, backend=SVM)
    assert "no present gate for #DF double fault, #PF page fault." in advice(report)


def test_unmapped_rip_and_stack(memory: GuestMemory) -> None:
    """Instruction pointer, stack and IDT that the page tables do not map are named with the level that fails."""
    state = long_mode(memory, 0xFFFFFFFF80100000, stack=0xFFFF800000000000)
    state.idt = DescriptorTable(0xFFFF880000000000, 0xFFF)
    state.cr2 = 0xFFFFFFFF80100000
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), state, memory, backend=SVM)
    said = advice(report)
    assert "instruction pointer 0xffffffff80100000 is not present (PML4E)" in said
    assert "The stack below 0xffff800000000000" in said
    assert "The IDT at 0xffff880000000000 is not present" in said
    assert report.fault_walk is not None
    assert report.fault_walk.gpa is None
    assert "Page walk of CR2" in report.text()


def test_sse_without_osfxsr(memory: GuestMemory) -> None:
    """An SSE instruction with SSE turned off gets the compiler option that helps; turned on it does not."""
    memory.write(ENTRY, b"\x0f\x28\xc1\xf4")
    state = long_mode(memory, ENTRY)
    off = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), state, memory, backend=SVM)
    assert "`movaps` is an SSE instruction" in advice(off)
    assert "-mgeneral-regs-only" in advice(off)
    state.cr4 |= CR4_OSFXSR
    on = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), state, memory, backend=SVM)
    assert "SSE" not in advice(on)


def test_zero_filled_code(memory: GuestMemory) -> None:
    """Execution in zeroes is called that, and the zeroes are not listed as code."""
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), long_mode(memory, 0x300000), memory, backend=SVM)
    assert "zero-filled memory" in advice(report)
    assert len(report.code) == 1


def test_state_lost_by_amd(memory: GuestMemory) -> None:
    """A reset state after a triple fault on AMD-V is explained, with no conclusions drawn from it."""
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), reset_vector(), memory, backend=SVM)
    assert len(report.advice) == 1
    assert "AMD-V does not keep" in report.advice[0]
    assert "AMD-V" not in advice(build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), reset_vector(), memory))


def test_fail_entry_lists_broken_rules(memory: GuestMemory) -> None:
    """A refused VM entry names the rules of the SDM that the state breaks."""
    state = protected_flat(memory, ENTRY)
    state.gprs["rflags"] = 0
    facts = ExitFacts("FAIL_ENTRY", hardware_reason=0x80000021, cpu=1)
    report = build_report("CRASH", facts, state, memory, backend=Backend("vmx", "kvm_intel"))
    assert any("RFLAGS" in each for each in report.guest_checks)
    assert "This state cannot be entered" in report.text()
    state.gprs["rflags"] = 2
    clean = build_report("CRASH", facts, state, memory, backend=Backend("vmx", "kvm_intel"))
    assert not clean.guest_checks
    assert "obey the rules" in advice(clean)


def test_title_from_a_device(memory: GuestMemory) -> None:
    """A device that ended the guest gives the title; the exit's name stays."""
    report = build_report("CRASH", ExitFacts("IO"), long_mode(memory, ENTRY), memory, title="guest panicked (pvpanic)")
    assert report.title == "vCPU 0: guest panicked (pvpanic) (KVM_EXIT_IO)"


def test_stack_words_have_the_stacks_size(memory: GuestMemory) -> None:
    """Words are 8 bytes in 64-bit mode, 4 with a 32-bit and 2 with a 16-bit stack segment, from SS:SP upwards."""
    memory.write(0x7FF0, bytes(range(1, 33)))
    long = build_report("CRASH", ExitFacts("NOTIFY"), long_mode(memory, ENTRY, stack=0x7FF0), memory)
    assert long.stack[0] == 0x0807060504030201
    flat = build_report("CRASH", ExitFacts("NOTIFY"), protected_flat(memory, ENTRY, stack=0x7FF0), memory)
    assert flat.stack[:2] == [0x04030201, 0x08070605]
    real = build_report("CRASH", ExitFacts("NOTIFY"), real_mode(0x700, 0, ss=0x700, sp=0xFF0), memory)
    assert real.stack[:2] == [0x0201, 0x0403]
    assert real.stack_address == 0x7FF0


def test_code_ends_at_the_end_of_memory(memory: GuestMemory) -> None:
    """An instruction that the end of RAM cuts off is shown as far as it goes."""
    memory.write(16 * MIB - 3, b"\x90\x48\xb8")
    report = build_report("CRASH", ExitFacts("NOTIFY"), long_mode(memory, 16 * MIB - 3), memory)
    assert [each.text for each in report.code] == ["nop", "(bad: its end cannot be read)"]
    outside = build_report("CRASH", ExitFacts("NOTIFY"), long_mode(memory, 16 * MIB), memory)
    assert outside.code == []
    assert "no memory" in advice(outside)


def test_code_crosses_pages_that_lie_apart(memory: GuestMemory) -> None:
    """Linear pages are translated one by one: neighbours in linear memory need not be neighbours in physical."""
    state = _paged(memory, {0: 0x200000, 1: 0x400000})
    memory.write(0x200FFE, b"\x48\x8b")
    memory.write(0x400000, b"\x07\xf4")
    state.gprs["rip"] = 0xFFE
    report = build_report("CRASH", ExitFacts("NOTIFY"), state, memory)
    assert [each.text for each in report.code] == ["mov rax, [rdi]", "hlt"]
    assert read_linear(memory, state, 0xFFE, 4) == b"\x48\x8b\x07\xf4"


def _paged(memory: GuestMemory, pages: dict[int, int]) -> CpuState:
    """64-bit mode with 4 KiB pages: linear page number -> physical address, all in the first 2 MiB."""
    state = long_mode(memory, 0)
    for table, entry in ((0x600000, 0x601003), (0x601000, 0x602003), (0x602000, 0x603003)):
        memory.write_uint(table, 8, entry)
    for page, physical in pages.items():
        memory.write_uint(0x603000 + page * 8, 8, physical | 3)
    state.cr3 = 0x600000
    return state


def test_console_is_bounded_and_printable() -> None:
    """Only the last lines are kept, and no escape sequence of the guest's gets through."""
    noise = b"".join(b"line %d\r\n" % n for n in range(100)) + b"\x1b[2J\x07\xff\tend"
    rows = printable_tail(noise)
    assert len(rows) == CONSOLE_LINES
    assert rows[-1] == "\\x1b[2J\\x07\\xff       end"
    assert rows[-2] == "line 99"
    assert len(printable_tail(b"x" * 100_000)[0]) == 160
    assert printable_tail(b"") == []
    assert printable_tail(b"\n\n") == []


def test_text_is_narrow_and_complete(memory: GuestMemory) -> None:
    """The text has every section and no line over 100 columns, also with the longest instruction."""
    memory.write(ENTRY, bytes.fromhex("2e67f04881841180000000000000010000") + b"\xf4" * 8)
    report = build_report(
        "CRASH", ExitFacts("INTERNAL_ERROR", suberror=4, data=[1] * 16), long_mode(memory, ENTRY), memory,
        console="ä€\U0001f600".encode() * 200, exits={f"REASON{n}": n for n in range(40)}, backend=SVM,
    )  # fmt: skip
    lines = report.text().splitlines()
    assert max(map(len, lines)) <= 100
    for title in ("Registers", "Segments", "Code (64-bit", "Page walk of", "Stack", "Console, last lines", "Exits"):
        assert any(line.startswith(title) for line in lines), title
    assert str(report) == report.text()


def test_dict_is_json(memory: GuestMemory) -> None:
    """as_dict() survives JSON and has the registers, the code and the walk in it."""
    memory.write(ENTRY, POPCNT)
    report = build_report("CRASH", emulation(POPCNT), long_mode(memory, ENTRY), memory, vcpu=3, exits={"IO": 7})
    data = json.loads(json.dumps(report.as_dict()))
    assert data["vcpu"] == 3
    assert data["registers"]["rip"] == hex(ENTRY)
    assert data["code"][0] == {"address": hex(ENTRY), "bytes": POPCNT.hex(), "text": "popcnt rax, rdi"}
    assert data["walk"]["gpa"] == hex(ENTRY)
    assert [level["name"] for level in data["walk"]["levels"]] == ["PML4E", "PDPTE", "PDE"]
    assert data["exits"] == {"IO": 7}
    assert data["segments"]["cs"]["attributes"] == "code64 r-x dpl 0 accessed"


# -- registers in words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("register", "value", "names"),
    [
        ("rflags", 0x246, ["PF", "ZF", "IF"]),
        ("rflags", 0x3002, ["IOPL=3"]),
        ("cr0", 0x80050033, ["PE", "MP", "ET", "NE", "WP", "AM", "PG"]),
        ("cr4", 0x1006B0, ["PSE", "PAE", "PGE", "OSFXSR", "OSXMMEXCPT", "SMEP"]),
        ("cr4", 1 << 12 | 1 << 32, ["LA57", "FRED"]),
        ("efer", 0xD01, ["SCE", "LME", "LMA", "NXE"]),
        ("efer", 1 << 63 | 1, ["SCE", "reserved 0x8000000000000000"]),
    ],
)
def test_flag_names(register: str, value: int, names: list[str]) -> None:
    """Bits have the manual's names, bits without one are summed up."""
    assert flag_names(register, value) == names


def test_modes(memory: GuestMemory) -> None:
    """Mode, code size and privilege level of each of the CPU's modes."""
    real, flat, long = real_mode(0, 0), protected_flat(memory, 0), long_mode(memory, 0)
    compat = long_mode(memory, 0)
    compat.cs.l, compat.cs.db = 0, 1
    v8086 = protected_flat(memory, 0)
    v8086.gprs["rflags"] |= 1 << 17
    table = [(real, "real mode", 16, 0), (flat, "32-bit protected mode, paging off", 32, 0),
             (long, "64-bit mode, 4-level paging", 64, 0), (v8086, "virtual-8086 mode, paging off", 16, 3),
             (compat, "32-bit compatibility mode, 4-level paging", 32, 0)]  # fmt: skip
    for state, mode, bits, cpl in table:
        assert (describe_mode(state), bitness(state), privilege_level(state)) == (mode, bits, cpl)


def test_segment_words() -> None:
    """Hidden parts of segments in words, system types and expand-down among them."""
    assert describe_segment(Segment(type=0xB, l=1)) == "code64 r-x dpl 0 accessed"
    assert describe_segment(Segment(type=0x6, dpl=3, present=0)) == "data16 rw- expand-down dpl 3 not present"
    assert describe_segment(Segment(type=0xB, s=0)) == "TSS busy dpl 0"
    assert describe_segment(Segment(unusable=1)) == "unusable"


# -- hostile states ------------------------------------------------------------------------------------------

u64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 0xFFF, 0x1000, MIB - 1, MIB, 2**32 - 1, 2**47, 2**64 - 1])
segments = st.builds(
    Segment, base=u64, limit=st.integers(0, 2**32 - 1), selector=st.integers(0, 0xFFFF), type=st.integers(0, 255),
    s=st.integers(0, 1), dpl=st.integers(0, 255), present=st.integers(0, 1), l=st.integers(0, 1),
    db=st.integers(0, 1), g=st.integers(0, 1), unusable=st.integers(0, 1),
)  # fmt: skip
MODES = [0, CR0_PE, CR0_PE | CR0_PG]


@st.composite
def states(draw: st.DrawFn) -> CpuState:
    """Any register state, biased towards ones in which paging is on."""
    state = CpuState()
    for name in SEGMENT_NAMES:
        setattr(state, name, draw(segments))
    state.gprs = {name: draw(u64) for name in draw(st.sets(st.sampled_from(GPR_NAMES)))}
    state.cr0 = draw(st.sampled_from(MODES) | u64)
    state.cr2, state.cr3, state.cr4 = draw(u64), draw(u64), draw(u64 | st.sampled_from([0, 0x20, 0x1020, 0x10]))
    state.efer = draw(st.sampled_from([0, EFER_LME | EFER_LMA]) | u64)
    state.gdt = DescriptorTable(draw(u64), draw(st.integers(0, 0xFFFF)))
    state.idt = DescriptorTable(draw(u64), draw(st.integers(0, 0xFFFF)))
    return state


facts = st.builds(
    ExitFacts, st.sampled_from(["INTERNAL_ERROR", "FAIL_ENTRY", "SHUTDOWN", "IO"]), suberror=st.integers(0, 5),
    data=st.lists(u64, max_size=18), hardware_reason=u64,
)  # fmt: skip
backends = st.sampled_from([None, PVM, SVM, Backend("vmx", "kvm_intel", "real mode")])


@settings(max_examples=150, deadline=None)
@given(state=states(), exit_facts=facts, backend=backends, fill=st.binary(max_size=64), console=st.binary(max_size=200))
def test_any_state_gives_a_report(
    state: CpuState, exit_facts: ExitFacts, backend: Backend | None, fill: bytes, console: bytes
) -> None:
    """Whatever the registers and the memory hold: text within 100 columns and JSON, never an exception."""
    memory = GuestMemory()
    memory.add(0, MIB)
    memory.add(1 << 32, 0x1000)
    for gpa in (0, 0x1000, 0x2000, MIB - 0x1000):
        memory.write(gpa, (fill * 4096)[:4096])
    for kind in ("CRASH", "TRIPLE_FAULT"):
        report = build_report(kind, exit_facts, state, memory, console=console, backend=backend, exits={"IO": 1})
        assert all(len(line) <= 100 and line.isprintable() for line in report.text().splitlines())
        json.dumps(report.as_dict())
    memory.close()


LONG = EFER_LME | EFER_LMA


@pytest.mark.parametrize(
    ("cr4", "efer", "entry", "levels"),
    [(0x20, LONG, "<Q", 4), (0x1020, LONG, "<Q", 5), (0x20, 0, "<Q", 3), (0, 0, "<I", 2)],
)
def test_cyclic_page_tables(cr4: int, efer: int, entry: str, levels: int) -> None:
    """Tables that point at themselves end the walk after the mode's levels, and the report has them."""
    memory = GuestMemory()
    memory.add(0, MIB)
    state = long_mode(memory, 0x1234)
    memory.write(0x1000, (struct.pack(entry, 0x1001) * 1024)[:4096])
    state.cr3, state.cr4, state.efer = 0x1000, cr4, efer
    state.cs.l, state.cs.db = (1, 0) if efer else (0, 1)
    report = build_report("TRIPLE_FAULT", ExitFacts("SHUTDOWN"), state, memory)
    assert len(report.walk.levels) == levels
    assert report.walk.gpa == 0x1234
    assert report.text()


@given(st.binary(max_size=90), st.sampled_from([16, 32, 64]), u64)
def test_any_bytes_disassemble(code: bytes, bits: int, ip: int) -> None:
    """Random bytes give at most the wanted count of instructions, whose bytes follow one another in the input."""
    found = disassemble(code, bits, ip, 6)
    assert len(found) <= 6
    decoded = b"".join(each.raw for each in found if each.valid)
    assert code.startswith(decoded)
    assert all(each.text for each in found)
