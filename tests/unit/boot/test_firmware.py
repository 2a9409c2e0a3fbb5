"""Firmware at the top of the 32-bit address space."""

from __future__ import annotations

import pytest
from builders import MIB, file, guest_ram, options

from pykvm.boot.firmware import load_firmware
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state

FOUR_GIB = 1 << 32


def pattern(size: int) -> bytes:
    """Bytes that differ from page to page."""
    return b"".join((at >> 12).to_bytes(4, "little") * 1024 for at in range(0, size + 4095, 4096))[:size]


@pytest.mark.parametrize("size", [16, 4096, 64 << 10, 128 << 10, 256 << 10, (256 << 10) + 100, 4 << 20])
def test_firmware_is_mapped_twice(size: int) -> None:
    """The image ends at 4 GiB in a read-only slot, and its last 128 KiB end at 1 MiB in RAM."""
    image = pattern(size)
    with guest_ram() as memory:
        boot = load_firmware(memory, file(image, "bios.bin"), options())
        assert memory.read(FOUR_GIB - size, size) == image
        low = min(size, 128 << 10)
        assert memory.read(MIB - low, low) == image[-low:]
        slot = memory.slot_at(FOUR_GIB - 1)
        assert slot is not None
        assert (slot.name, slot.readonly, slot.end) == ("firmware", True, FOUR_GIB)
        assert slot.size == (size + 4095) & ~4095
        low_slot = memory.slot_at(MIB - 1)
        assert low_slot is not None and not low_slot.readonly
        assert (boot.protocol, boot.entry) == ("firmware", layout.RESET_VECTOR)


def test_the_cpu_starts_at_the_reset_vector() -> None:
    """Real mode, CS base 0xffff0000, IP 0xfff0: a state that hardware enters."""
    with guest_ram() as memory:
        state = load_firmware(memory, file(pattern(65536)), options()).state
        assert state.cs.base + state.gprs["rip"] == 0xFFFFFFF0
        assert check_guest_state(state) == []


def test_loading_again_rewrites_the_slot() -> None:
    """A machine reset reloads: no second slot, and what the guest spoiled below 1 MiB is back."""
    with guest_ram() as memory:
        image = pattern(65536)
        load_firmware(memory, file(image), options())
        memory.fill(0xF0000, 65536, 0)
        load_firmware(memory, file(image), options())
        assert len(memory.slots) == 2
        assert memory.read(0xF0000, 65536) == image


@pytest.mark.parametrize(("size", "reason"), [(0, "0 bytes"), ((16 << 20) + 1, "at most 16 MiB")])
def test_impossible_sizes_are_refused(size: int, reason: str) -> None:
    """Nothing, and more than the address space leaves for it, are errors."""
    with guest_ram() as memory, pytest.raises(ImageError, match=reason):
        load_firmware(memory, file(bytes(size)), options())


def test_memory_without_its_first_mebibyte_is_refused() -> None:
    """The copy under 1 MiB needs RAM there."""
    memory = GuestMemory()
    memory.add(0, 0xA0000)
    with pytest.raises(ImageError, match="firmware needs RAM"):
        load_firmware(memory, file(pattern(65536)), options())
    assert len(memory.slots) == 1
    memory.close()


def test_memory_in_the_way_is_named() -> None:
    """A slot just below 4 GiB, or firmware of another size, cannot be overlapped."""
    with guest_ram() as memory:
        memory.add(FOUR_GIB - MIB, MIB, name="hole")
        with pytest.raises(ImageError, match="which hole occupies"):
            load_firmware(memory, file(pattern(65536)), options())


@pytest.mark.parametrize("extra", [{"mode": "long"}, {"entry": 0}, {"load_addr": 0}])
def test_options_without_a_meaning_are_refused(extra: dict[str, object]) -> None:
    """Firmware has its own place and entry point."""
    with guest_ram() as memory, pytest.raises(ImageError, match="loaded as firmware, which takes no"):
        load_firmware(memory, file(pattern(65536)), options(**extra))
