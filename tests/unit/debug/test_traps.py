"""Software breakpoints in guest memory, and the debug registers' encoding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm import GuestAddressError, GuestMemory
from pykvm.debug.guestdebug import ACCESS, WRITE, DebugRegister, dr7_of
from pykvm.debug.hostdebug import INT3, OUT
from pykvm.debug.traps import Traps
from pykvm.errors import DebugUnsupported

OWNER, OTHER = object(), object()
CODE = bytes(range(0x10, 0x20))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """One MiB with sixteen known bytes at 0x1000."""
    memory = GuestMemory()
    memory.add(0, 1 << 20)
    memory.write(0x1000, CODE)
    yield memory
    memory.close()


def test_planting_and_removal(memory: GuestMemory) -> None:
    """The trap stands until its last owner goes; then the guest's byte is back."""
    traps = Traps(memory, INT3)
    traps.add(0x1004, OWNER)
    traps.add(0x1004, OTHER)
    assert memory.read(0x1003, 3) == b"\x13\xcc\x15"
    traps.remove(0x1004, OWNER)
    traps.remove(0x1004, OWNER)
    assert memory[0x1004] == 0xCC
    traps.remove(0x1004, OTHER)
    assert memory.read(0x1000, 16) == CODE
    assert len(traps) == 0


def test_bytes_that_the_guest_wrote_stay(memory: GuestMemory) -> None:
    """A guest that has overwritten the trap keeps what it wrote."""
    traps = Traps(memory, INT3)
    traps.add(0x1004, OWNER)
    memory[0x1004] = 0x77
    assert traps.read(0x1004, 1) == b"\x77"
    traps.remove(0x1004, OWNER)
    assert memory[0x1004] == 0x77


def test_lifting_for_a_snapshot(memory: GuestMemory) -> None:
    """All traps go out of memory and come back."""
    traps = Traps(memory, OUT)
    for at in (0x1000, 0x1004):
        traps.add(at, OWNER)
    traps.lift_all()
    assert memory.read(0x1000, 16) == CODE
    traps.plant_all()
    assert memory.read(0x1004, 2) == OUT.code


@pytest.mark.parametrize("start", range(0xFFF, 0x1008))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_overlap_is_hidden(memory: GuestMemory, start: int, length: int) -> None:
    """Reads show the guest's bytes, writes go under the trap, however they overlap it."""
    traps = Traps(memory, OUT)
    traps.add(0x1003, OWNER)
    expected = bytearray(memory.read(0xFF0, 0x40))
    expected[0x13:0x15] = CODE[3:5]
    assert traps.read(start, length) == expected[start - 0xFF0 :][:length]
    traps.write(start, bytes(length))
    expected[start - 0xFF0 : start - 0xFF0 + length] = bytes(length)
    assert memory.read(0x1003, 2) == OUT.code
    assert traps.read(0xFF0, 0x40) == expected
    traps.remove(0x1003, OWNER)
    assert memory.read(0xFF0, 0x40) == expected


def test_long_traps_need_room(memory: GuestMemory) -> None:
    """Two-byte traps neither overlap nor cross a page; outside memory there is nothing to plant in."""
    traps = Traps(memory, OUT)
    traps.add(0x1004, OWNER)
    for at in (0x1003, 0x1005, 0x1FFF):
        with pytest.raises(DebugUnsupported, match="no room"):
            traps.add(at, OWNER)
    with pytest.raises(GuestAddressError):
        traps.add(1 << 20, OWNER)
    with pytest.raises(GuestAddressError):
        traps.write((1 << 20) - 1, b"ab")
    assert len(traps) == 1


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([None] * 4, 0x400),
        ([DebugRegister(0), None, None, None], 0x402),
        ([None, DebugRegister(0, WRITE, 4), None, None], 0x400 | 1 << 3 | 0xD << 20),
        ([None, None, None, DebugRegister(0, ACCESS, 8)], 0x400 | 1 << 7 | 0xB << 28),
    ],
)
def test_dr7(slots: list[DebugRegister | None], expected: int) -> None:
    """The enable, kind and length bits are where the SDM has them (vol. 3B 17.2.4)."""
    assert dr7_of(slots) == expected
