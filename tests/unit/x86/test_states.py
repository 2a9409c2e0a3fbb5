"""The states that boot protocols start a CPU in."""

from __future__ import annotations

import struct

import pytest

from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, CpuState, Segment
from pykvm.x86.states import BOOT_CS, BOOT_DS, BOOT_TSS, long_mode, protected_flat, real_mode, reset_vector


class Memory(dict[int, bytes]):
    """Records what was written where."""

    def write(self, gpa: int, data: bytes) -> None:
        self[gpa] = bytes(data)


def all_states() -> list[tuple[str, CpuState]]:
    memory = Memory()
    return [
        ("real", real_mode(0x1000, 0, sp=0x8000)),
        ("real with an odd selector", real_mode(0x1003, 0x10, ss=0)),
        ("reset", reset_vector()),
        ("protected", protected_flat(memory, 0x100000)),
        ("long", long_mode(memory, 0x100000)),
    ]


@pytest.mark.parametrize(("name", "state"), all_states())
def test_hardware_would_enter_every_state(name: str, state: CpuState) -> None:
    """No constructor makes a state that VM entry refuses."""
    assert check_guest_state(state) == [], name


def test_real_mode_segments_follow_cs() -> None:
    """Bases are selector times 16, SS differs only when asked, the rest of the state is that of a reset."""
    state = real_mode(0x1000, 0x20, ss=0, sp=0x8000)
    assert [each.base for each in (state.cs, *state.data_segments)] == [0x10000] * 5 + [0]
    assert state.gprs == {"rflags": 2, "rip": 0x20, "rsp": 0x8000}
    assert not state.cr0 & (CR0_PE | CR0_PG)


def test_reset_vector_is_16_bytes_below_4_gib() -> None:
    """The first fetch is at 0xfffffff0, in real mode."""
    state = reset_vector()
    assert state.cs.base + state.gprs["rip"] == layout.RESET_VECTOR
    assert (state.cs.selector, state.cr0 & CR0_PE) == (0xF000, 0)


@pytest.mark.parametrize(("make", "wide"), [(protected_flat, False), (long_mode, True)])
def test_the_gdt_in_memory_has_the_loaded_segments(make: object, wide: bool) -> None:
    """Reloading 0x10 and 0x18 gives the segments that the CPU already has."""
    memory = Memory()
    state: CpuState = make(memory, 0x123456)  # type: ignore[operator]
    table = struct.unpack("<6Q", memory[layout.BOOT_GDT])
    assert (state.gdt.base, state.gdt.limit) == (layout.BOOT_GDT, len(table) * 8 - 1)
    assert (state.cs.selector, state.ss.selector, state.tr.selector) == (BOOT_CS, BOOT_DS, BOOT_TSS)
    assert table[BOOT_CS // 8] == (0x00AF9B000000FFFF if wide else 0x00CF9B000000FFFF)
    assert table[BOOT_DS // 8] == 0x00CF93000000FFFF
    assert table[BOOT_TSS // 8] == 0x00008B0000000067
    assert (table[0], table[1], table[5]) == (0, 0, 0)


def test_protected_mode_is_flat_without_paging() -> None:
    """32-bit code, base 0, limit 4 GiB, interrupts and paging off."""
    state = protected_flat(Memory(), 0x123456, stack=0x7000)
    for segment in (state.cs, *state.data_segments):
        assert (segment.base, segment.limit, segment.g, segment.db) == (0, 0xFFFFFFFF, 1, 1)
    assert state.cr0 & (CR0_PE | CR0_PG) == CR0_PE
    assert state.gprs == {"rflags": 2, "rip": 0x123456, "rsp": 0x7000}


def test_long_mode_has_paging_and_64_bit_code() -> None:
    """EFER.LMA, PAE and paging are on, CS.L is set, CR3 holds the identity map."""
    memory = Memory()
    state = long_mode(memory, 0x123456)
    assert (state.cs.l, state.cs.db) == (1, 0)
    assert state.cr0 & (CR0_PE | CR0_PG) == CR0_PE | CR0_PG
    assert (state.cr4, state.efer, state.cr3) == (CR4_PAE, EFER_LMA | EFER_LME, layout.BOOT_PML4)
    assert layout.BOOT_PML4 in memory


def test_an_exception_without_an_idt_cannot_be_delivered() -> None:
    """Protected and long mode start with an empty IDT: a fault becomes a triple fault, not wild code."""
    assert {each.idt.limit for _, each in all_states() if each.cr0 & CR0_PE} == {0}


def test_descriptor_packs_every_field() -> None:
    """Segment.descriptor puts base, limit and access rights where SDM vol. 3A 3.4.5 has them."""
    segment = Segment(base=0x12345678, limit=0xABCDEFFF, type=0xA, dpl=3, avl=1, l=1, db=0, g=1)
    assert segment.descriptor() == 0x12BAFA345678BCDE
