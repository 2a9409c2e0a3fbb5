"""The balloon: pages that come back to the host, statistics, reporting, and drivers that lie."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driver import BUFFERS, RAM, WRITE, Driver, Queue

from pykvm._native import lib
from pykvm.core.memory import GuestMemory
from pykvm.errors import ConfigError
from pykvm.virtio.balloon import MAX_PFNS, STATS_VQ, Balloon

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

INFLATE, DEFLATE, STATS, REPORTING, LAST = range(5)
MIB = 1 << 20
CONFIG = lib.VIRTIO_MMIO_CONFIG
NUM_PAGES, ACTUAL, POISON_VAL = CONFIG, CONFIG + 4, CONFIG + 12


def pages(*numbers: int) -> bytes:
    """A request's list of page frames."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def resident(gpa: int, memory: GuestMemory) -> bool:
    """Whether the page at `gpa` has a page of the host behind it."""
    hva = memory.slots[0].hva + gpa
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(hva // 4096 * 8)
        return bool(int.from_bytes(pagemap.read(8), "little") >> 63)


@pytest.mark.parametrize("memfd", [False, True])
def test_inflation_gives_pages_back(memfd: bool) -> None:
    """The pages in the list are released, read as zeros, and their neighbours stay (5.5.6)."""
    memory = GuestMemory(memfd=memfd)
    memory.add(0, RAM)
    memory.fill(0xC0000, 0x10000, 0xAA)
    balloon = Balloon()
    driver = Driver(balloon, memory)
    queues = driver.start()
    queues[INFLATE].add([pages(0xC4, 0xC2, 0xC3, 0xCF)])
    queues[INFLATE].kick()
    gone = [number for number in range(0xC0, 0xD0) if not resident(number << 12, memory)]
    assert gone == [0xC2, 0xC3, 0xC4, 0xCF]
    assert balloon.released == 4 * 4096
    assert memory.read(0xC4000, 4096) == bytes(4096)
    assert memory.read(0xC5000, 4096) == b"\xaa" * 4096
    queues[DEFLATE].add([pages(0xC4, 0xC2, 0xC3, 0xCF)])
    queues[DEFLATE].kick()
    assert len(queues[DEFLATE].used()) == 1
    driver.close()


def resident_mib() -> int:
    """This process's RSS."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // MIB


@pytest.mark.parametrize("how", ["inflated", "reported"])
def test_600_of_800_touched_mib_leave_the_rss(how: str) -> None:
    """Of 1 GiB with 800 MiB touched, 600 MiB leave the process's RSS, by requests as Linux makes them."""
    memory = GuestMemory()
    memory.add(0, 1024 * MIB)
    memory.fill(100 * MIB, 800 * MIB, 1)
    before = resident_mib()
    balloon = Balloon()
    driver = Driver(balloon, memory)
    queue = driver.start()[INFLATE if how == "inflated" else REPORTING]
    step = MIB if how == "inflated" else 4 * MIB  # 256 page frame numbers, or one free block
    for gpa in range(200 * MIB, 800 * MIB, step):
        if how == "inflated":
            memory.write(BUFFERS, pages(*range(gpa >> 12, (gpa + step) >> 12)))
            queue.descriptor(0, BUFFERS, step // 4096 * 4)
        else:
            queue.descriptor(0, gpa, step, WRITE)
        queue.offer(0)
        queue.kick()
    assert balloon.released == 600 * MIB
    assert 590 <= before - resident_mib() <= 610
    assert memory.read_u8(199 * MIB) == memory.read_u8(800 * MIB) == 1
    driver.close()


def test_target_and_actual(drive: Drive) -> None:
    """A new target is a configuration change; what the driver says it has is `actual`."""
    balloon = Balloon(256 << 10)
    driver = drive(balloon)
    assert driver.read(NUM_PAGES) == 64
    driver.start()
    balloon.set_target(512 << 10)
    assert driver.interrupts() == 1
    assert (driver.read(NUM_PAGES), balloon.target) == (128, 512 << 10)
    driver.write(ACTUAL, 100)
    driver.write(NUM_PAGES, 1)
    driver.write(ACTUAL + 1, 0, 2)
    assert (balloon.actual, balloon.target) == (100 * 4096, 512 << 10)
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert (balloon.actual, balloon.target) == (0, 512 << 10)


@pytest.mark.parametrize("size", [-1, RAM + 1])
def test_impossible_targets(drive: Drive, size: int) -> None:
    """More than the machine has, or less than nothing, is the caller's error."""
    balloon = Balloon()
    drive(balloon)
    with pytest.raises(ConfigError):
        balloon.set_target(size)


def test_statistics(drive: Drive) -> None:
    """The driver's buffer is kept until somebody asks; then it comes back filled (5.5.6.3)."""
    balloon = Balloon()
    driver = drive(balloon)
    queue = driver.start()[STATS]
    assert balloon.stats(0.1) == {}
    queue.add([struct.pack("<HQHQ", lib.VIRTIO_BALLOON_S_MEMFREE, 5 * MIB, 0x7777, 1) + b"rest"])
    queue.kick()
    assert queue.used() == []

    def answer() -> None:
        queue.add([struct.pack("<HQ", lib.VIRTIO_BALLOON_S_MEMFREE, 7 * MIB)])
        queue.kick()

    timer = threading.Timer(0.05, answer)
    timer.start()
    assert balloon.stats(10) == {"free_memory": 7 * MIB}
    timer.join()
    assert len(queue.used()) == 1


def test_statistics_of_a_driver_that_offers_many_buffers(drive: Drive) -> None:
    """One is kept, the others come back: nothing piles up."""
    balloon = Balloon()
    queue = drive(balloon).start()[STATS]
    for _ in range(10):
        queue.add([b"x" * 10])
    queue.kick()
    assert len(queue.used()) == 9


@pytest.mark.parametrize(("features", "index"), [(None, REPORTING), (None, LAST), (1 << 5, STATS), (1 << 5, LAST)])
def test_free_page_reporting(features: int | None, index: int) -> None:
    """Whole pages of reported blocks are released, whichever way the driver numbers its queues (5.5.2, 5.5.6.7)."""
    memory = GuestMemory()
    memory.add(0, RAM)
    memory.fill(0xC0000, 0x10000, 0xAA)
    balloon = Balloon()
    driver = Driver(balloon, memory)
    queue = driver.start(features)[index]
    queue.descriptor(0, 0xC0800, 0x4000, lib.VRING_DESC_F_WRITE)
    queue.offer(0)
    queue.kick()
    gone = [number for number in range(0xC0, 0xD0) if not resident(number << 12, memory)]
    assert gone == [0xC1, 0xC2, 0xC3]
    assert len(queue.used()) == 1
    driver.close()


@pytest.mark.parametrize(("poison", "kept"), [(0xAAAAAAAA, True), (0, False)])
def test_poisoned_pages(drive: Drive, poison: int, kept: bool) -> None:
    """A guest that expects its poison in free pages keeps them; zeros are what it gets anyway (5.5.6.6)."""
    balloon = Balloon()
    driver = drive(balloon)
    driver.memory.fill(0xC0000, 0x1000, 0xAA)
    queue = driver.start()[REPORTING]
    driver.write(POISON_VAL, poison)
    queue.descriptor(0, 0xC0000, 0x1000, lib.VRING_DESC_F_WRITE)
    queue.offer(0)
    queue.kick()
    assert driver.memory.read(0xC0000, 0x1000) == (b"\xaa" if kept else b"\0") * 0x1000


@pytest.mark.parametrize(
    "request_", [pages(RAM >> 12), pages(0xFFFFFFFF), pages(0xD0000), pages(*[1] * (MAX_PFNS + 1))]
)
def test_pages_that_are_no_ram(drive: Drive, request_: bytes) -> None:
    """A page outside RAM, or a list without end, stops the device."""
    driver = drive(Balloon())
    queues = driver.start()
    queues[INFLATE].add([request_])
    queues[INFLATE].kick()
    assert driver.needs_reset


def test_a_list_with_a_wrong_page_changes_nothing(drive: Drive) -> None:
    """The pages before it are kept as well."""
    driver = drive(Balloon())
    driver.memory.write(0xC4000, b"kept")
    queues = driver.start()
    queues[INFLATE].add([pages(0xC4, RAM >> 12)])
    queues[INFLATE].kick()
    assert driver.needs_reset and driver.memory.read(0xC4000, 4) == b"kept"


def test_read_only_memory_is_not_taken() -> None:
    """Firmware's memory does not become zeros because a guest says so."""
    memory = GuestMemory()
    memory.add(0, RAM)
    memory.add(RAM, 0x1000, readonly=True)
    memory.write(RAM, b"firmware")
    driver = Driver(Balloon(), memory)
    queues = driver.start()
    queues[INFLATE].add([pages(RAM >> 12)])
    queues[INFLATE].kick()
    assert driver.needs_reset and memory.read(RAM, 8) == b"firmware"
    driver.close()


def test_odd_requests(drive: Drive) -> None:
    """A list that ends within a page number, or is empty, counts as far as it goes; so does the same page twice."""
    balloon = Balloon()
    driver = drive(balloon)
    queue: Queue = driver.start()[INFLATE]
    queue.add([pages(0xC0, 0xC0) + b"abc"])
    queue.add([], [16])
    queue.kick()
    assert (len(queue.used()), balloon.released) == (2, 4096)
    assert not driver.needs_reset


def test_features_can_be_left_out(drive: Drive) -> None:
    """A balloon without reporting and deflation on OOM offers neither."""
    features = drive(Balloon(deflate_on_oom=False, reporting=False)).features()
    assert features & 0x3F == STATS_VQ | 1 << lib.VIRTIO_BALLOON_F_PAGE_POISON
