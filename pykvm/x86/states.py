"""The register states in which boot protocols start the first CPU. Layer: x86.

Each constructor returns a CpuState that satisfies `x86.guest_checks`. Protected and long mode also write a
GDT at layout.BOOT_GDT whose descriptors are those of the loaded segments, so that a guest may reload its
selectors, and leave the IDT empty: an exception before the guest has its own is a triple fault, which is
reported at once.

Sources: Intel SDM vol. 3A, "Processor Management and Initialization" (state after reset) and 3.4.5
(descriptors); the boot protocol in Linux's Documentation/arch/x86/boot.rst (__BOOT_CS 0x10, __BOOT_DS 0x18).
"""

from __future__ import annotations

import struct

from pykvm.x86 import layout
from pykvm.x86.segments import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_FIXED,
    TYPE_CODE_RX,
    TYPE_DATA_RW,
    TYPE_LDT,
    TYPE_TSS_BUSY,
    CpuState,
    DescriptorTable,
    Segment,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.paging import Writable

BOOT_CS, BOOT_DS, BOOT_TSS = 0x10, 0x18, 0x20  # the TSS descriptor takes two entries in long mode

_FLAT_LIMIT = 0xFFFF_FFFF
_TSS_LIMIT = 0x67


def real_mode(cs: int, ip: int, *, ss: int | None = None, sp: int = 0) -> CpuState:
    """Real mode at `cs`:`ip`; the data segments equal CS, SS as well unless `ss` says otherwise."""
    state = CpuState()
    for segment in (state.cs, *state.data_segments):
        segment.selector, segment.base = cs, cs << 4
    if ss is not None:
        state.ss.selector, state.ss.base = ss, ss << 4
    state.gprs |= {"rip": ip, "rsp": sp}
    return state


def reset_vector() -> CpuState:
    """A CPU after RESET: CS base 0xffff0000, IP 0xfff0, caches off, family 6 in EDX."""
    state = CpuState()
    state.cs.selector, state.cs.base = 0xF000, 0xFFFF_0000
    state.cr0 = CR0_CD | CR0_NW | CR0_ET
    state.gprs |= {"rip": 0xFFF0, "rdx": 0x600}
    return state


def protected_flat(memory: Writable, entry: int, *, stack: int = layout.BOOT_STACK_TOP) -> CpuState:
    """32-bit protected mode, paging off, flat 4 GiB segments, interrupts off, EIP = `entry`."""
    state = _flat(entry, stack)
    state.cs.db = 1
    state.cr0 = CR0_PE | CR0_ET
    _write_gdt(memory, state)
    return state


def long_mode(memory: Writable, entry: int, *, stack: int = layout.BOOT_STACK_TOP) -> CpuState:
    """64-bit mode, the first 4 GiB mapped to themselves, interrupts off, RIP = `entry`; SSE is off."""
    from pykvm.x86.paging import build_identity_map  # real and protected mode do without

    state = _flat(entry, stack)
    state.cs.l = 1
    state.cr0 = CR0_PE | CR0_ET | CR0_PG
    state.cr3 = build_identity_map(memory)
    state.cr4 = CR4_PAE
    state.efer = EFER_LME | EFER_LMA
    _write_gdt(memory, state)
    return state


def _flat(entry: int, stack: int) -> CpuState:
    state = CpuState()
    state.cs = Segment(selector=BOOT_CS, type=TYPE_CODE_RX, limit=_FLAT_LIMIT, g=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(selector=BOOT_DS, type=TYPE_DATA_RW, limit=_FLAT_LIMIT, g=1, db=1))
    # both are null in every sense but TR's type: hardware wants a busy TSS there whatever the mode
    state.tr = Segment(selector=BOOT_TSS, type=TYPE_TSS_BUSY, s=0, limit=_TSS_LIMIT)
    state.ldt = Segment(type=TYPE_LDT, s=0, limit=0, present=0, unusable=1)
    state.idt = DescriptorTable(0, 0)
    state.gprs = {"rflags": RFLAGS_FIXED, "rip": entry, "rsp": stack}
    return state


def _write_gdt(memory: Writable, state: CpuState) -> None:
    # null, null, code, data, TSS (its upper half is 0: the base is below 4 GiB)
    table = (0, 0, state.cs.descriptor(), state.ds.descriptor(), state.tr.descriptor(), 0)
    memory.write(layout.BOOT_GDT, struct.pack("<6Q", *table))
    state.gdt = DescriptorTable(layout.BOOT_GDT, len(table) * 8 - 1)
