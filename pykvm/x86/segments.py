"""Segments, descriptor tables and the register state that a boot protocol starts a CPU in. Layer: x86.

Everything here is plain data: `core.vcpu` turns a CpuState into KVM_SET_SREGS and KVM_SET_REGS, and
`x86.guest_checks` holds it against Intel SDM vol. 3C, 27.3.1 "Checks on the Guest State Area".
"""

from __future__ import annotations

# CR0 (SDM vol. 3A 2.5)
CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
CR0_WP, CR0_AM, CR0_NW, CR0_CD, CR0_PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31
# CR4
CR4_PSE, CR4_PAE, CR4_PGE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 4, 1 << 5, 1 << 7, 1 << 9, 1 << 10
CR4_LA57, CR4_VMXE = 1 << 12, 1 << 13
# IA32_EFER (SDM vol. 3A 2.2.1)
EFER_SCE, EFER_LME, EFER_LMA, EFER_NX = 1 << 0, 1 << 8, 1 << 10, 1 << 11
# RFLAGS
RFLAGS_FIXED, RFLAGS_TF, RFLAGS_IF, RFLAGS_VM = 1 << 1, 1 << 8, 1 << 9, 1 << 17

# Descriptor types (SDM vol. 3A 3.4.5.1 and 3.5), all accessed: VM entry wants the accessed bit set
TYPE_DATA_RW = 0x3
TYPE_CODE_RX = 0xB
TYPE_LDT = 0x2
TYPE_TSS16_BUSY = 0x3
TYPE_TSS_BUSY = 0xB


class Segment:
    """One segment register with its hidden part. `limit` is in bytes (already scaled by G)."""

    __slots__ = ("avl", "base", "db", "dpl", "g", "l", "limit", "present", "s", "selector", "type", "unusable")

    def __init__(
        self,
        *,
        base: int = 0,
        limit: int = 0xFFFF,
        selector: int = 0,
        type: int = TYPE_DATA_RW,
        s: int = 1,
        dpl: int = 0,
        present: int = 1,
        avl: int = 0,
        l: int = 0,  # noqa: E741 - the SDM's name
        db: int = 0,
        g: int = 0,
        unusable: int = 0,
    ) -> None:
        self.base = base
        self.limit = limit
        self.selector = selector
        self.type = type
        self.s = s
        self.dpl = dpl
        self.present = present
        self.avl = avl
        self.l = l
        self.db = db
        self.g = g
        self.unusable = unusable

    def descriptor(self) -> int:
        """The 8-byte GDT entry that loads this segment (SDM vol. 3A 3.4.5)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFFFFFF) << 16
            | access << 40
            | ((limit >> 16) & 0xF) << 48
            | flags << 52
            | ((self.base >> 24) & 0xFF) << 56
        )


class DescriptorTable:
    """GDTR or IDTR: linear base and limit (size - 1)."""

    __slots__ = ("base", "limit")

    def __init__(self, base: int = 0, limit: int = 0xFFFF) -> None:
        self.base = base
        self.limit = limit


SEGMENT_NAMES = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
GPR_NAMES = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip


class CpuState:
    """What a boot protocol promises the guest's first instruction: every field is read by `Vcpu.load_state`.

    `gprs` holds only the general registers that differ from zero; rip, rsp and rflags are in it too.
    """

    __slots__ = (*SEGMENT_NAMES, "cr0", "cr2", "cr3", "cr4", "efer", "gdt", "gprs", "idt")

    def __init__(self) -> None:
        self.cs = Segment(type=TYPE_CODE_RX)
        self.ds = Segment()
        self.es = Segment()
        self.fs = Segment()
        self.gs = Segment()
        self.ss = Segment()
        self.tr = Segment(type=TYPE_TSS_BUSY, s=0)
        self.ldt = Segment(type=TYPE_LDT, s=0)
        self.gdt = DescriptorTable()
        self.idt = DescriptorTable()
        self.cr0 = CR0_ET
        self.cr2 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.efer = 0
        self.gprs: dict[str, int] = {"rflags": RFLAGS_FIXED}

    @property
    def data_segments(self) -> tuple[Segment, ...]:
        """ds, es, fs, gs, ss."""
        return (self.ds, self.es, self.fs, self.gs, self.ss)
