"""Guest memory: where its pages come from."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from pykvm._native import ffi
from pykvm.core.memory import HUGE_PAGE_SIZE, PAGE_SIZE, GuestMemory
from pykvm.errors import ConfigError


def free_huge_pages() -> int:
    """Those of 2 MiB that nobody has reserved."""
    facts = dict(re.findall(r"^(\w+): +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return int(facts["HugePages_Free"]) - int(facts["HugePages_Rsvd"])


def test_huge_pages_that_the_host_lacks() -> None:
    """Refused with what to do, instead of a SIGBUS when one of them is touched."""
    memory = GuestMemory(memfd=True, hugepages=True)
    pages = free_huge_pages() + 1
    with pytest.raises(ConfigError, match=rf"MiB in huge pages for ram: .*: sudo sysctl vm.nr_hugepages={pages}, or"):
        memory.add(0, pages * HUGE_PAGE_SIZE)
    assert not memory.slots


def test_a_few_pages_are_ordinary_ones() -> None:
    """A firmware beside RAM of huge pages has the size that it has."""
    memory = GuestMemory(memfd=True, hugepages=True)
    slot = memory.add(0xFFFE0000, 0x20000, name="firmware", readonly=True)
    memory.write(slot.gpa, b"x")
    assert slot.fd >= 0
    memory.close()


@pytest.mark.parametrize("gpa", [0, 4 << 30, (4 << 30) + PAGE_SIZE])
def test_what_kvm_wants_for_huge_pages(gpa: int) -> None:
    """GPA and HVA are as far from a huge page's start, and the slot has its size and its bytes where they belong."""
    memory = GuestMemory()
    slots = [memory.add(gpa + number * (8 << 20), 5 << 20) for number in range(2)]
    for slot in slots:
        assert (slot.hva - slot.gpa) % HUGE_PAGE_SIZE == 0
        assert len(slot.view) == slot.size
        memory.write(slot.end - 4, b"last")
        assert bytes(ffi.buffer(ffi.cast("char *", slot.hva + slot.size - 4), 4)) == b"last"
        slot.advise(mmap.MADV_DONTNEED, slot.size - PAGE_SIZE, PAGE_SIZE)
        assert memory.read(slot.end - 4, 4) == bytes(4)
    memory.close()


def test_huge_pages() -> None:
    """Where the host has some, RAM is made of them."""
    if not free_huge_pages():
        pytest.skip("no huge pages are set aside (vm.nr_hugepages)")
    memory = GuestMemory(memfd=True, hugepages=True)
    before = free_huge_pages()
    memory.add(0, HUGE_PAGE_SIZE)
    assert free_huge_pages() == before - 1
    memory.write(0, b"x")
    memory.close()
    assert free_huge_pages() == before
