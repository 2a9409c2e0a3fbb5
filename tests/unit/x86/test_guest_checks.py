"""Every rule of VM entry that `check_guest_state` knows is broken once, from a state that breaks none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import RFLAGS_VM, CpuState, Segment
from pykvm.x86.states import long_mode, protected_flat, real_mode, reset_vector


class Memory:
    """Takes the GDT and the page tables and forgets them."""

    def write(self, gpa: int, data: bytes) -> None:
        """Accept anything."""


def change(path: str, value: int) -> Callable[[CpuState], None]:
    """A mutation: `path` is "cr0" or "cs.type"; gprs are set as "gprs.rip"."""

    def apply(state: CpuState) -> None:
        owner, _, field = path.partition(".")
        if owner == "gprs":
            state.gprs[field] = value
        elif field:
            setattr(getattr(state, owner), field, value)
        else:
            setattr(state, owner, value)

    return apply


def also(*changes: Callable[[CpuState], None]) -> Callable[[CpuState], None]:
    """Several mutations as one."""

    def apply(state: CpuState) -> None:
        for each in changes:
            each(state)

    return apply


LONG, PROTECTED, REAL = "long", "protected", "real"
V8086 = "virtual-8086"


def make(mode: str) -> CpuState:
    if mode == LONG:
        return long_mode(Memory(), 0x100000)
    if mode == PROTECTED:
        return protected_flat(Memory(), 0x100000)
    if mode == REAL:
        return real_mode(0x1000, 0)
    state = protected_flat(Memory(), 0x100)
    state.gprs["rflags"] |= RFLAGS_VM
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(selector=0x1234, base=0x12340, limit=0xFFFF, type=3, dpl=3))
    return state


@pytest.mark.parametrize("mode", [LONG, PROTECTED, REAL, V8086])
def test_good_states_pass(mode: str) -> None:
    """The states that the mutations below start from break no rule."""
    assert check_guest_state(make(mode)) == []


def test_a_cpu_after_reset_passes() -> None:
    """CR0.CD and CR0.NW together, as RESET leaves them, are legal."""
    assert check_guest_state(reset_vector()) == []


CASES = [
    (LONG, change("cr0", 1 << 31 | 1 << 4), "CR0.PG is 1 but CR0.PE is 0."),
    (REAL, change("cr0", 1 << 29), "CR0.NW is 1 but CR0.CD is 0."),
    (REAL, change("cr0", 1 << 6), "CR0 has reserved bits 0x40 set."),
    (REAL, change("cr0", 1 << 40), "CR0 has reserved bits 0x10000000000 set."),
    (REAL, change("cr4", 1 << 15), "CR4 has reserved bits 0x8000 set."),
    (REAL, change("cr4", 1 << 23), "CR4.CET is 1 but CR0.WP is 0."),
    (REAL, change("cr4", 1 << 17), "CR4.PCIDE is 1 but EFER.LMA is 0."),
    (REAL, change("efer", 2), "EFER has reserved bits 0x2 set."),
    (REAL, change("cr3", 1 << 52), "CR3 is 0x10000000000000, but a physical address has 52 bits."),
    (LONG, change("cr0", 0x11), "EFER.LMA is 1 but CR0.PG is 0."),
    (LONG, change("cr4", 0), "EFER.LMA is 1 but CR4.PAE is 0."),
    (LONG, change("efer", 1 << 10), "EFER.LMA differs from EFER.LME although CR0.PG is 1."),
    (PROTECTED, change("cs.type", 0xA),
        "CS has type 0xa, not 3 (real mode only) or 9, 11, 13, 15 (accessed code)."),
    (PROTECTED, change("cs.dpl", 3), "CS is non-conforming with DPL 3 but SS has DPL 0."),
    (PROTECTED, also(change("cs.type", 15), change("cs.dpl", 1)),
        "CS is conforming with DPL 1, above SS's DPL 0."),
    (REAL, also(change("cs.type", 3), change("cs.dpl", 3)), "CS has type 3 but DPL 3, not 0."),
    (PROTECTED, change("cs.l", 1), "CS.L is 1 but EFER.LMA is 0."),
    (LONG, change("cs.db", 1), "CS has both L and D/B set."),
    (REAL, change("cs.s", 0), "CS has S = 0, a system descriptor."),
    (REAL, change("cs.present", 0), "CS is not present."),
    (PROTECTED, change("ss.type", 1), "SS has type 0x1, not 3 or 7 (accessed writable data)."),
    (PROTECTED, change("ss.present", 0), "SS is not present."),
    (REAL, change("ss.dpl", 3), "SS has DPL 3, not 0, in real mode or with CS of type 3."),
    (PROTECTED, change("ss.selector", 0x1B), "SS has RPL 3 but CS has RPL 0."),
    (PROTECTED, change("ss.dpl", 3), "SS has DPL 3 but its selector has RPL 0."),
    (PROTECTED, change("ds.type", 2), "DS has type 0x2, which is not accessed."),
    (PROTECTED, change("es.type", 9), "ES has type 0x9, execute-only code."),
    (PROTECTED, change("fs.selector", 0x1B), "FS has DPL 0, below the RPL 3 of its selector."),
    (PROTECTED, change("gs.s", 0), "GS has S = 0, a system descriptor."),
    (PROTECTED, change("ds.present", 0), "DS is not present."),
    (PROTECTED, change("ds.g", 0), "DS has limit 0xffffffff and G = 0, which reaches 1 MiB at most."),
    (PROTECTED, change("ds.limit", 0xFFFF0000),
        "DS has limit 0xffff0000 and G = 1, so bits 11:0 must be ones."),
    (PROTECTED, change("ds.limit", 1 << 33 | 0xFFF), "DS has a limit of more than 32 bits."),
    (PROTECTED, change("ds.selector", 0x10018), "DS has an impossible selector 0x10018."),
    (PROTECTED, change("ds.dpl", 4), "DS has an impossible DPL 4."),
    (REAL, change("tr.unusable", 1), "TR is marked unusable."),
    (REAL, change("tr.type", 9), "TR has type 0x9, not 3 or 11 (a busy TSS)."),
    (LONG, change("tr.type", 3), "TR has type 0x3, not 11 (a busy TSS)."),
    (REAL, change("tr.selector", 4), "TR has a selector with TI set."),
    (REAL, change("tr.s", 1), "TR has S = 1, not a system descriptor."),
    (REAL, change("tr.present", 0), "TR is not present."),
    (REAL, change("ldt.type", 3), "LDTR has type 0x3, not 2 (an LDT)."),
    (REAL, change("ldt.selector", 4), "LDTR has a selector with TI set."),
    (REAL, change("ldt.present", 0), "LDTR is not present."),
    (LONG, change("fs.base", 1 << 47), "FS has base 0x800000000000, which is not canonical."),
    (LONG, change("tr.base", 1 << 47), "TR has base 0x800000000000, which is not canonical."),
    (REAL, change("ldt.base", 1 << 47), "LDTR has base 0x800000000000, which is not canonical."),
    (LONG, change("cs.base", 1 << 32), "CS has base 0x100000000, above 4 GiB."),
    (LONG, change("es.base", 1 << 32), "ES has base 0x100000000, above 4 GiB."),
    (LONG, change("gdt.base", 1 << 47), "GDTR has base 0x800000000000, which is not canonical."),
    (LONG, change("idt.limit", 0x10000), "IDTR has limit 0x10000, more than 16 bits."),
    (PROTECTED, change("gprs.rip", 1 << 32), "RIP is 0x100000000, above 4 GiB outside 64-bit mode."),
    (LONG, change("gprs.rip", 1 << 47), "RIP is 0x800000000000, which is not canonical."),
    (REAL, change("gprs.rflags", 0xA), "RFLAGS has reserved bits 0x8 set."),
    (REAL, change("gprs.rflags", 1 << 22 | 2), "RFLAGS has reserved bits 0x400000 set."),
    (REAL, change("gprs.rflags", 0), "RFLAGS has bit 1 clear, which is always set."),
    (V8086, change("cr0", 0x10), "RFLAGS.VM is 1 in IA-32e or real mode."),
    (V8086, change("ss.base", 0), "SS has base 0x0 in virtual-8086 mode, not its selector times 16."),
    (V8086, change("ds.limit", 0xFFF), "DS has limit 0xfff in virtual-8086 mode, not 0xffff."),
    (V8086, change("cs.type", 11), "CS has access rights other than 0xf3 in virtual-8086 mode."),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "mutate", "message"), CASES, ids=[case[2] for case in CASES])
def test_each_broken_rule_is_named(mode: str, mutate: Callable[[CpuState], None], message: str) -> None:
    """The rule's own sentence is among the messages, and every message is a sentence."""
    state = make(mode)
    mutate(state)
    messages = check_guest_state(state)
    assert message in messages
    assert all(each.endswith(".") for each in messages)


@pytest.mark.parametrize("name", ["ds", "es", "fs", "gs", "ss", "ldt"])
def test_unusable_segments_are_not_looked_at(name: str) -> None:
    """A segment marked unusable may hold anything but a wrong privilege level."""
    state = make(PROTECTED)
    segment = getattr(state, name)
    segment.unusable, segment.type, segment.s, segment.present = 1, 0, 0, 0
    assert check_guest_state(state) == []


def test_wider_addresses_come_with_la57() -> None:
    """With CR4.LA57 a 57-bit base is canonical."""
    state = make(LONG)
    state.fs.base = 1 << 47
    state.cr4 |= 1 << 12
    assert check_guest_state(state) == []


def test_physical_address_width_is_the_callers() -> None:
    """A CR3 above the CPU's own width is named; LAM's bits in it are not an address."""
    state = make(LONG)
    state.cr3 |= 3 << 61
    assert check_guest_state(state) == []
    state.cr3 |= 1 << 40
    assert check_guest_state(state, phys_bits=40) != []
