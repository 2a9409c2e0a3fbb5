"""Register values in words: flags, control registers, segments. Layer: debug, plain data in, text out.

Sources: Intel SDM vol. 1 3.4.3 (EFLAGS), vol. 3A 2.5 (control registers) and 3.4.5, 3.5 (descriptors);
AMD APM vol. 2 3.1.7 (EFER).
"""

from __future__ import annotations

from pykvm.x86.segments import CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, RFLAGS_VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.segments import CpuState, Segment

# Names by bit from 0 upwards; `.` has no name (RFLAGS bits 12 and 13 are IOPL).
_RFLAGS = "CF . PF . AF . ZF SF TF IF DF OF . . NT . RF VM AC VIF VIP ID"
_CR0 = "PE MP EM TS ET NE . . . . . . . . . . WP . AM . . . . . . . . . . NW CD PG"
_CR4 = (
    "VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP LA57 VMXE SMXE . FSGSBASE PCIDE OSXSAVE KL "
    "SMEP SMAP PKE CET PKS UINTR . . LAM_SUP . . . FRED"
)
_EFER = "SCE . . . . . . . LME . LMA NXE SVME LMSLE FFXSR TCE . MCOMMIT INTWB . UAIE AIBRSE"
_NAMES = {"cr0": _CR0.split(), "cr4": _CR4.split(), "efer": _EFER.split(), "rflags": _RFLAGS.split()}

_SYSTEM_TYPES = {
    1: "TSS16 available", 2: "LDT", 3: "TSS16 busy", 4: "call gate 16", 5: "task gate", 6: "interrupt gate 16",
    7: "trap gate 16", 9: "TSS available", 11: "TSS busy", 12: "call gate", 14: "interrupt gate",
    15: "trap gate",
}  # fmt: skip


def flag_names(register: str, value: int) -> list[str]:
    """The names of the bits set in `value`; `register` is cr0, cr4, efer or rflags.

    Bits without a name are summed up as "reserved 0x...", except bit 1 of RFLAGS, which is always set.
    """
    names = _NAMES[register]
    found = [name for bit, name in enumerate(names) if value >> bit & 1 and name != "."]
    reserved = value & ~sum(1 << bit for bit, name in enumerate(names) if name != ".")
    if register == "rflags":
        reserved &= ~0x3002
        if value >> 12 & 3:
            found.append(f"IOPL={value >> 12 & 3}")
    return [*found, f"reserved {reserved:#x}"] if reserved else found


def privilege_level(state: CpuState) -> int:
    """The current privilege level as KVM has it: SS.DPL, 0 in real mode, 3 in virtual-8086 mode."""
    if not state.cr0 & CR0_PE:
        return 0
    return 3 if is_v8086(state) else state.ss.dpl & 3


def is_v8086(state: CpuState) -> bool:
    """Virtual-8086 mode."""
    return bool(state.gprs.get("rflags", 0) & RFLAGS_VM and state.cr0 & CR0_PE and not state.efer & EFER_LMA)


def bitness(state: CpuState) -> int:
    """Size of an address and operand by default in the code segment: 16, 32 or 64 bits."""
    if not state.cr0 & CR0_PE or is_v8086(state):
        return 16
    if state.efer & EFER_LMA and state.cs.l:
        return 64
    return 32 if state.cs.db else 16


def describe_mode(state: CpuState) -> str:
    """The CPU's mode in words: "64-bit mode, 4-level paging", "real mode", ..."""
    if not state.cr0 & CR0_PE:
        return "real mode"
    if state.efer & EFER_LMA:
        mode = "64-bit mode" if state.cs.l else f"{bitness(state)}-bit compatibility mode"
        return f"{mode}, {'5' if state.cr4 & CR4_LA57 else '4'}-level paging"
    mode = "virtual-8086 mode" if is_v8086(state) else f"{bitness(state)}-bit protected mode"
    if not state.cr0 & CR0_PG:
        return f"{mode}, paging off"
    return f"{mode}, {'PAE' if state.cr4 & CR4_PAE else '32-bit'} paging"


def describe_segment(segment: Segment) -> str:
    """Type and attributes of a segment's hidden part: "code64 r-x dpl 0 accessed"."""
    if segment.unusable:
        return "unusable"
    if segment.s:
        words = [_code(segment) if segment.type & 8 else _data(segment)]
        words += ["accessed"] if segment.type & 1 else []
    else:
        words = [_SYSTEM_TYPES.get(segment.type, f"system type {segment.type}")]
    words.insert(1, f"dpl {segment.dpl}")
    if not segment.present:
        words.append("not present")
    return " ".join(words)


def _code(segment: Segment) -> str:
    size = "64" if segment.l else "32" if segment.db else "16"
    return f"code{size} {'r' if segment.type & 2 else '-'}-x{' conforming' if segment.type & 4 else ''}"


def _data(segment: Segment) -> str:
    size = "32" if segment.db else "16"
    return f"data{size} {'rw-' if segment.type & 2 else 'r--'}{' expand-down' if segment.type & 4 else ''}"
