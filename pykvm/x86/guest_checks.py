"""Would hardware enter a guest in this state? The checks of VM entry on a CpuState. Layer: x86.

VT-x refuses an inconsistent state with KVM_EXIT_FAIL_ENTRY and does not say which field it is about; other
backends run it somehow. These are the rules of Intel SDM vol. 3C, "Checks on the Guest State Area" (27.3.1),
as far as a CpuState has the field:
- real mode is judged as with the "unrestricted guest" control (without it KVM emulates real mode), protected
  mode as without it, which is stricter: privilege levels of selectors count;
- what KVM_SET_SREGS itself refuses is added: CR0.NW without CD, CS.L outside IA-32e mode;
- CR0.NE and CR4.VMXE, which VMX operation wants set, are not asked for: KVM adds them by itself.
"""

from __future__ import annotations

from pykvm.x86.paging import MAX_PHYS_BITS, is_canonical
from pykvm.x86.segments import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_FIXED,
    RFLAGS_VM,
    TYPE_LDT,
    TYPE_TSS16_BUSY,
    TYPE_TSS_BUSY,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.x86.segments import CpuState, Segment

CR4_PCIDE, CR4_CET = 1 << 17, 1 << 23

_CR0_KNOWN = 0xE005_003F
# what the SDM defines (vol. 3A, 2.5): bits 0 to 14, 16 (FSGSBASE) to 25 (UINTR), 28 (LAM_SUP), 32 (FRED)
_CR4_KNOWN = 0x1_13FF_7FFF
# SCE, LME, LMA, NXE; and AMD's SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE (APM vol. 2, 3.1.7)
_EFER_KNOWN = 0x0000_0000_0036_FD01
_RFLAGS_RESERVED = (1 << 64) - (1 << 22) | 1 << 15 | 1 << 5 | 1 << 3
_CR3_LAM = 3 << 61


def check_guest_state(state: CpuState, *, phys_bits: int = MAX_PHYS_BITS) -> list[str]:
    """Every rule that `state` breaks, as a sentence that names the field; empty if it can be entered.

    `phys_bits` is the width of physical addresses (CPUID 0x80000008 EAX[7:0]).
    """
    return [
        *_control_registers(state, phys_bits),
        *(_virtual8086(state) if _is_v8086(state) else _segments(state)),
        *_system_segments(state),
        *_bases(state),
        *_tables(state),
        *_instruction_pointer_and_flags(state),
    ]


def _control_registers(state: CpuState, phys_bits: int) -> Iterator[str]:
    cr0, cr4, efer = state.cr0, state.cr4, state.efer
    for name, value, known in (
        ("CR0", cr0, _CR0_KNOWN),
        ("CR4", cr4, _CR4_KNOWN),
        ("EFER", efer, _EFER_KNOWN),
    ):
        if value & ~known:
            yield f"{name} has reserved bits {value & ~known:#x} set."
    if cr0 & CR0_PG and not cr0 & CR0_PE:
        yield "CR0.PG is 1 but CR0.PE is 0."
    if cr0 & CR0_NW and not cr0 & CR0_CD:
        yield "CR0.NW is 1 but CR0.CD is 0."
    if cr4 & CR4_CET and not cr0 & CR0_WP:
        yield "CR4.CET is 1 but CR0.WP is 0."
    if (state.cr3 & ~_CR3_LAM) >> phys_bits:
        yield f"CR3 is {state.cr3:#x}, but a physical address has {phys_bits} bits."
    if efer & EFER_LMA:
        if not cr0 & CR0_PG:
            yield "EFER.LMA is 1 but CR0.PG is 0."
        if not cr4 & CR4_PAE:
            yield "EFER.LMA is 1 but CR4.PAE is 0."
    elif cr4 & CR4_PCIDE:
        yield "CR4.PCIDE is 1 but EFER.LMA is 0."
    if cr0 & CR0_PG and bool(efer & EFER_LMA) != bool(efer & EFER_LME):
        yield "EFER.LMA differs from EFER.LME although CR0.PG is 1."


def _virtual8086(state: CpuState) -> Iterator[str]:
    for name in ("CS", "DS", "ES", "FS", "GS", "SS"):
        segment: Segment = getattr(state, name.lower())
        if segment.base != segment.selector << 4:
            yield f"{name} has base {segment.base:#x} in virtual-8086 mode, not its selector times 16."
        if segment.limit != 0xFFFF:
            yield f"{name} has limit {segment.limit:#x} in virtual-8086 mode, not 0xffff."
        others = (segment.avl, segment.l, segment.db, segment.g, segment.unusable)
        if (segment.type, segment.s, segment.dpl, segment.present) != (3, 1, 3, 1) or any(others):
            yield f"{name} has access rights other than 0xf3 in virtual-8086 mode."


def _segments(state: CpuState) -> Iterator[str]:
    yield from _code_segment(state)
    yield from _stack_segment(state)
    yield from _data_segments(state)


def _code_segment(state: CpuState) -> Iterator[str]:
    cs, ss = state.cs, state.ss
    if cs.type not in (3, 9, 11, 13, 15):
        yield f"CS has type {cs.type:#x}, not 3 (real mode only) or 9, 11, 13, 15 (accessed code)."
    elif cs.type == 3 and cs.dpl != 0:
        yield f"CS has type 3 but DPL {cs.dpl}, not 0."
    elif cs.type in (9, 11) and cs.dpl != ss.dpl:
        yield f"CS is non-conforming with DPL {cs.dpl} but SS has DPL {ss.dpl}."
    elif cs.type in (13, 15) and cs.dpl > ss.dpl:
        yield f"CS is conforming with DPL {cs.dpl}, above SS's DPL {ss.dpl}."
    if cs.l and not state.efer & EFER_LMA:
        yield "CS.L is 1 but EFER.LMA is 0."
    if cs.l and cs.db:
        yield "CS has both L and D/B set."
    yield from _common("CS", cs)


def _stack_segment(state: CpuState) -> Iterator[str]:
    cs, ss = state.cs, state.ss
    if not ss.unusable:
        if ss.type not in (3, 7):
            yield f"SS has type {ss.type:#x}, not 3 or 7 (accessed writable data)."
        yield from _common("SS", ss)
    if ss.dpl and (cs.type == 3 or not state.cr0 & CR0_PE):
        yield f"SS has DPL {ss.dpl}, not 0, in real mode or with CS of type 3."
    if _is_protected(state) and (cs.selector ^ ss.selector) & 3:
        yield f"SS has RPL {ss.selector & 3} but CS has RPL {cs.selector & 3}."
    if _is_protected(state) and not ss.unusable and ss.dpl != ss.selector & 3:
        yield f"SS has DPL {ss.dpl} but its selector has RPL {ss.selector & 3}."


def _data_segments(state: CpuState) -> Iterator[str]:
    for name in ("DS", "ES", "FS", "GS"):
        segment: Segment = getattr(state, name.lower())
        if segment.unusable:
            continue
        if not segment.type & 1:
            yield f"{name} has type {segment.type:#x}, which is not accessed."
        if segment.type & 8 and not segment.type & 2:
            yield f"{name} has type {segment.type:#x}, execute-only code."
        # types above 11 are conforming code, which any privilege may read
        if _is_protected(state) and segment.type <= 11 and segment.dpl < segment.selector & 3:
            yield f"{name} has DPL {segment.dpl}, below the RPL {segment.selector & 3} of its selector."
        yield from _common(name, segment)


def _system_segments(state: CpuState) -> Iterator[str]:
    tr, ldt = state.tr, state.ldt
    busy = (TYPE_TSS_BUSY,) if state.efer & EFER_LMA else (TYPE_TSS16_BUSY, TYPE_TSS_BUSY)
    if tr.unusable:
        yield "TR is marked unusable."
    if tr.type not in busy:
        yield f"TR has type {tr.type:#x}, not {' or '.join(map(str, busy))} (a busy TSS)."
    yield from _system("TR", tr)
    if not ldt.unusable:
        if ldt.type != TYPE_LDT:
            yield f"LDTR has type {ldt.type:#x}, not 2 (an LDT)."
        yield from _system("LDTR", ldt)


def _system(name: str, segment: Segment) -> Iterator[str]:
    if segment.selector & 4:
        yield f"{name} has a selector with TI set."
    if segment.s:
        yield f"{name} has S = 1, not a system descriptor."
    if not segment.present:
        yield f"{name} is not present."
    yield from _fields(name, segment)


def _common(name: str, segment: Segment) -> Iterator[str]:
    if not segment.s:
        yield f"{name} has S = 0, a system descriptor."
    if not segment.present:
        yield f"{name} is not present."
    yield from _fields(name, segment)


def _fields(name: str, segment: Segment) -> Iterator[str]:
    if segment.limit & 0xFFF != 0xFFF and segment.g:
        yield f"{name} has limit {segment.limit:#x} and G = 1, so bits 11:0 must be ones."
    if segment.limit >> 20 and not segment.g:
        yield f"{name} has limit {segment.limit:#x} and G = 0, which reaches 1 MiB at most."
    if segment.limit >> 32:
        yield f"{name} has a limit of more than 32 bits."
    for field, value, top in (("selector", segment.selector, 0xFFFF), ("type", segment.type, 15)):
        if not 0 <= value <= top:
            yield f"{name} has an impossible {field} {value:#x}."
    if not 0 <= segment.dpl <= 3:
        yield f"{name} has an impossible DPL {segment.dpl}."


def _bases(state: CpuState) -> Iterator[str]:
    for name, segment in (("FS", state.fs), ("GS", state.gs), ("TR", state.tr), ("LDTR", state.ldt)):
        if not (name == "LDTR" and segment.unusable) and not is_canonical(segment.base, _linear_bits(state)):
            yield f"{name} has base {segment.base:#x}, which is not canonical."
    for name, segment in (("CS", state.cs), ("SS", state.ss), ("DS", state.ds), ("ES", state.es)):
        if not (name != "CS" and segment.unusable) and segment.base >> 32:
            yield f"{name} has base {segment.base:#x}, above 4 GiB."


def _tables(state: CpuState) -> Iterator[str]:
    for name, table in (("GDTR", state.gdt), ("IDTR", state.idt)):
        if not is_canonical(table.base, _linear_bits(state)):
            yield f"{name} has base {table.base:#x}, which is not canonical."
        if table.limit >> 16:
            yield f"{name} has limit {table.limit:#x}, more than 16 bits."


def _instruction_pointer_and_flags(state: CpuState) -> Iterator[str]:
    rip, rflags = state.gprs.get("rip", 0), state.gprs.get("rflags", RFLAGS_FIXED)
    if not (state.efer & EFER_LMA and state.cs.l):
        if rip >> 32:
            yield f"RIP is {rip:#x}, above 4 GiB outside 64-bit mode."
    elif not is_canonical(rip, _linear_bits(state)):
        yield f"RIP is {rip:#x}, which is not canonical."
    if rflags & _RFLAGS_RESERVED:
        yield f"RFLAGS has reserved bits {rflags & _RFLAGS_RESERVED:#x} set."
    if not rflags & RFLAGS_FIXED:
        yield "RFLAGS has bit 1 clear, which is always set."
    if rflags & RFLAGS_VM and (state.efer & EFER_LMA or not state.cr0 & CR0_PE):
        yield "RFLAGS.VM is 1 in IA-32e or real mode."


def _is_v8086(state: CpuState) -> bool:
    return bool(state.gprs.get("rflags", RFLAGS_FIXED) & RFLAGS_VM)


def _is_protected(state: CpuState) -> bool:
    return bool(state.cr0 & CR0_PE)


def _linear_bits(state: CpuState) -> int:
    return 57 if state.cr4 & CR4_LA57 else 48
