"""Machine.linear: guest memory through the guest's own page tables."""

from __future__ import annotations

from collections.abc import Iterator

import cguest
import pytest

from pykvm import GuestAddressError, Pc, SymbolError
from pykvm.errors import LinearAddressError
from pykvm.x86.paging import PTE_P, PTE_RW

SOURCE = """
char text[32] = "by its name";
volatile u32 number = 0x12345678;
void kmain(void) { for (;;) outb(0x80, 1); }
"""
FAR = 0xFFFF_8000_0000_0000  # where nothing is mapped by the loader's tables
TABLES, FRAMES = 0x600000, (0x700000, 0x740000)


@pytest.fixture
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pc]:
    """SOURCE, running in long mode, and two far pages in front of frames that are not neighbours."""
    with Pc(cguest.build(tmp_path_factory.mktemp("linear"), SOURCE), memory="16M") as vm:
        vm.run_until(port_write=0x80)
        entries = [TABLES, TABLES + 0x1000, TABLES + 0x2000]
        vm.memory.write_uint(vm.vcpus[0].sregs.cr3 + 256 * 8, 8, entries[0] | PTE_P | PTE_RW)
        vm.memory.write_uint(entries[0], 8, entries[1] | PTE_P | PTE_RW)
        vm.memory.write_uint(entries[1], 8, entries[2] | PTE_P | PTE_RW)
        for place, frame in enumerate((*FRAMES, 0xE000_0000)):
            vm.memory.write_uint(entries[2] + 8 * place, 8, frame | PTE_P)
        yield vm


def test_variables_by_name(vm: Pc) -> None:
    """A variable is read and written by its symbol; an unknown name is a SymbolError."""
    assert vm.linear.read_u32("number") == 0x12345678
    assert vm.linear.read_u8("number+3") == 0x12
    vm.linear.write_uint("number", 4, 7)
    assert vm.memory.read_u32(vm.symbols["number"]) == 7
    assert vm.linear.read_cstring("text") == b"by its name"
    with pytest.raises(SymbolError):
        vm.linear.read_u32("nmber")


def test_pages_are_walked_one_by_one(vm: Pc) -> None:
    """An access across two pages reaches both frames, also where they are no neighbours."""
    vm.linear.write(FAR + 0xFFE, b"abcd")
    assert vm.memory.read(FRAMES[0] + 0xFFE, 2) + vm.memory.read(FRAMES[1], 2) == b"abcd"
    assert vm.linear.read(FAR + 0xFFD, 6) == b"\0abcd\0"
    assert vm.linear.read_cstring(FAR + 0xFFE) == b"abcd"
    assert vm.linear.gpa(FAR + 0x1004) == FRAMES[1] + 4


@pytest.mark.parametrize(
    ("address", "length", "reason"),
    [(FAR + 0x3000, 1, "not present"), (FAR + 0x1FFF, 2, "no memory is"), (0x0000_8000_0000_0000, 1, "canonical")],
)
def test_what_is_not_there(vm: Pc, address: int, length: int, reason: str) -> None:
    """Not mapped, mapped to no memory, not canonical: refused with the reason, and nothing is written of it."""
    with pytest.raises(LinearAddressError, match=reason):
        vm.linear.read(address, length)
    with pytest.raises(GuestAddressError, match=f"{address:#x}"):
        vm.linear.write(address, bytes([0x77]) * length)
    assert vm.memory.read_u8(FRAMES[1] + 0xFFF) == 0
