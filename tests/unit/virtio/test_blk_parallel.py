"""Requests of a disk that C has going on side by side: order, ends, resets, errors.

A pipe in place of the file makes a request that lasts as long as a test likes.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from driver import Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm._native import lib
from pykvm.virtio.blk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IN, OUT, FLUSH = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH
OK, IOERR = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR
SECTOR, SECTORS = 512, 64
CONTENT = b"".join(bytes([n]) * SECTOR for n in range(SECTORS))
PENDING = 0xFF  # a status that the device has not written

pytestmark = pytest.mark.skipif(lib.pk_uring_probe() < 0, reason="no io_uring here")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """32 KiB in which each sector is full of its number."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


class Slow:
    """A disk with its driver; what is asked for by `ask_slowly` takes until `pour`."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        assert isinstance(driver.transport.device, Disk)
        self.disk = driver.transport.device
        self.plane = self.disk.plane.state
        self.plane.parallel = lib.PK_BLK_ALL
        driver.start()
        self.end, self.source = os.pipe()

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> list[int]:
        """Offer a request and notify; where its data and status go."""
        queue = self.driver.queues[0]
        readable = [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]
        places = queue.add(readable, [*([room] if room else []), 1])
        self.driver.memory.write(places[-1], bytes([PENDING]))
        self.driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
        self.driver.io.run()
        return places

    def ask_slowly(self, kind: int, room: int = 0) -> list[int]:
        """The same, of the pipe."""
        file, self.plane.fd = self.plane.fd, self.end
        places = self.ask(kind, room=room)
        self.plane.fd = file
        return places

    def pour(self, data: bytes) -> None:
        """End reads of the pipe."""
        os.write(self.source, data)

    def status(self, places: list[int]) -> int:
        """Of a request."""
        return self.driver.memory.read_u8(places[-1])

    def wait(self, count: int = 0) -> None:
        """Until no more than `count` are in flight."""
        while self.disk.in_flight > count:
            self.driver.io.run(wait_ms=1000)


@pytest.fixture
def slow(drive: Callable[[Disk], Driver], image: Path) -> Iterator[Slow]:
    """A disk of which everything goes through the ring."""
    slow = Slow(drive(Disk(image)))
    yield slow
    for fd in (slow.end, slow.source):
        os.close(fd)


def test_a_slow_request_holds_up_no_other(slow: Slow) -> None:
    """What was asked for later ends first, with an interrupt of its own; the slow one follows."""
    first = slow.ask_slowly(IN, room=SECTOR)
    second = slow.ask(IN, 7, room=SECTOR)
    slow.wait(1)
    assert slow.driver.queues[0].used() == [(3, SECTOR + 1)]
    assert (slow.status(first), slow.status(second)) == (PENDING, OK)
    assert slow.driver.memory.read(second[0], SECTOR) == bytes([7]) * SECTOR
    assert slow.driver.interrupts()
    slow.pour(b"s" * SECTOR)
    slow.wait()
    assert slow.driver.queues[0].used() == [(0, SECTOR + 1)]
    assert slow.driver.memory.read(first[0], SECTOR) == b"s" * SECTOR
    assert slow.driver.interrupts()
    assert slow.disk.requests["read"] == 2


def test_a_reset_ends_what_is_in_flight(slow: Slow) -> None:
    """After a reset nothing that was asked for before it is written to the guest any more, and the disk works on."""
    places = slow.ask_slowly(IN, room=SECTOR)
    slow.driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert slow.disk.in_flight == 0
    slow.pour(b"s" * SECTOR)
    assert slow.driver.memory.read(places[0], SECTOR) == bytes(SECTOR)
    assert slow.status(places) == PENDING
    slow.driver.memory.write(slow.driver.queues[0].desc, bytes(0x8000))
    slow.driver.start()
    places = slow.ask(IN, 3, room=SECTOR)
    slow.wait()
    assert slow.driver.queues[0].used() == [(0, SECTOR + 1)]
    assert slow.status(places) == OK


def test_closing_ends_what_is_in_flight(slow: Slow) -> None:
    """A disk is closed with a request in flight that would never end, and its descriptors are gone."""
    before = len(os.listdir("/proc/self/fd"))
    places = slow.ask_slowly(IN, room=SECTOR)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the ring
    slow.disk.close()
    assert slow.disk.in_flight == 0
    assert len(os.listdir("/proc/self/fd")) == before - 2  # image and eventfd
    assert slow.status(places) == PENDING


def test_a_stopped_device_ends_nothing(slow: Slow) -> None:
    """What was in flight when the driver broke a rule is dropped: the rings are the next driver's."""
    places = slow.ask_slowly(IN, room=SECTOR)
    slow.driver.queues[0].add([struct.pack("<IIQ", IN, 0, 0)], [])
    slow.driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    slow.driver.io.run()
    assert slow.driver.needs_reset
    slow.pour(b"s" * SECTOR)
    slow.wait()
    assert slow.driver.queues[0].used() == []
    assert slow.status(places) == PENDING


@pytest.mark.parametrize("length", [SECTOR, 100])
def test_a_snapshot_waits_for_what_is_in_flight(slow: Slow, length: int) -> None:
    """`hold` returns when the last request has ended, one that failed and was done again as well."""
    places = slow.ask_slowly(IN, room=SECTOR)
    pouring = threading.Timer(0.05, slow.pour, [b"s" * length])
    pouring.start()
    slow.driver.transport.hold()
    try:
        assert slow.disk.in_flight == 0
        assert slow.status(places) == OK
        expected = b"s" * SECTOR if length == SECTOR else CONTENT[:SECTOR]
        assert slow.driver.memory.read(places[0], SECTOR) == expected
        assert slow.driver.queues[0].used() == [(0, SECTOR + 1)]
    finally:
        slow.driver.transport.release()
        pouring.join()


def test_what_ends_too_early_is_done_again(slow: Slow) -> None:
    """The host gave less than was asked for: Python, which has the words, asks again."""
    places = slow.ask_slowly(IN, room=2 * SECTOR)
    slow.pour(b"s" * 100)
    slow.wait()
    assert slow.status(places) == OK
    assert slow.driver.memory.read(places[0], 2 * SECTOR) == CONTENT[: 2 * SECTOR]
    assert slow.driver.queues[0].used() == [(0, 2 * SECTOR + 1)]


def test_a_chain_changed_meanwhile_stops_the_device(slow: Slow) -> None:
    """A driver that rewrites the descriptors of a request in flight which then fails finds no hole."""
    slow.ask_slowly(IN, room=2 * SECTOR)
    slow.driver.queues[0].descriptor(0, 2**64 - 8, 16)
    slow.pour(b"s" * 100)
    slow.wait()
    slow.driver.io.run()
    assert slow.driver.needs_reset


def test_a_slow_host_serves_side_by_side(slow: Slow) -> None:
    """Where a request took long, the next ones go on beside each other; a single one does not go that way."""
    slow.plane.parallel, slow.plane.slow_ns = lib.PK_BLK_MISSES, 0
    asked = 0
    while not slow.plane.slow:  # the clock is looked at only now and then, and not when the thread lost its CPU
        slow.ask(IN, 3, room=SECTOR)
        asked += 1
    assert slow.disk.in_flight == 0
    queue, places = slow.driver.queues[0], []
    for sector in (4, 5):
        places += queue.add([struct.pack("<IIQ", IN, 0, sector)], [SECTOR, 1])
    file, slow.plane.fd = slow.plane.fd, slow.end
    slow.driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    slow.driver.io.run()
    assert slow.disk.in_flight == 2
    slow.plane.fd = file
    slow.pour(b"s" * 2 * SECTOR)
    slow.wait()
    assert len(queue.used()) == asked + 2
    assert [slow.driver.memory.read_u8(each) for each in places[1::2]] == [OK, OK]
    while slow.plane.slow:  # and not for ever
        slow.plane.slow_ns = 1 << 31
        slow.ask(IN, 3, room=SECTOR)
    slow.ask(IN, 3, room=SECTOR)
    assert slow.plane.slow == 0


def test_a_failed_flush_is_told_once(slow: Slow) -> None:
    """The kernel tells an error of a flush once: so does the disk, to the flush that got it."""
    failed = slow.ask_slowly(FLUSH)
    slow.wait()
    good = slow.ask(FLUSH)
    slow.wait()
    slow.driver.io.run()
    assert (slow.status(failed), slow.status(good)) == (IOERR, OK)


def test_without_io_uring(slow: Slow) -> None:
    """A host that allows no ring gets the requests one after the other."""
    slow.plane.ended, ended = slow.end, slow.plane.ended  # no eventfd: the kernel refuses
    places = slow.ask(IN, 9, room=SECTOR)
    slow.plane.ended = ended
    assert slow.plane.parallel == lib.PK_BLK_SERIAL
    assert slow.status(places) == OK
    assert slow.driver.queues[0].used() == [(0, SECTOR + 1)]


def test_more_than_fit_into_the_ring(slow: Slow) -> None:
    """With as many in flight as the ring takes, further requests are served one by one."""
    plane = slow.plane
    slow.ask_slowly(IN, room=SECTOR)
    plane.in_flight += 255
    places = slow.ask(IN, 5, room=SECTOR)
    assert slow.status(places) == OK
    plane.in_flight -= 255


requests = st.lists(st.tuples(st.sampled_from([IN, OUT, FLUSH, 77]), st.integers(1, 3)), min_size=1, max_size=16)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=requests, direct=st.booleans(), cached=st.booleans())
def test_the_same_as_one_after_the_other(image: Path, asked: list[tuple[int, int]], direct: bool, cached: bool) -> None:
    """Whatever is asked of different sectors at once: status, data, lengths and image are those of Python's way."""
    results = []
    for native in (True, False):
        image.write_bytes(CONTENT)
        if not cached:
            with image.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        driver = Driver(Disk(image, native=native, direct=direct))
        driver.start()
        queue = driver.queues[0]
        places = []
        for number, (kind, sectors) in enumerate(asked):
            data = [bytes([0x80 + number]) * sectors * SECTOR] if kind == OUT else []
            room = [sectors * SECTOR] if kind == IN else []
            places.append((queue.add([struct.pack("<IIQ", kind, 0, 4 * number), *data], [*room, 1]), sum(room)))
        queue.kick()
        read = [driver.memory.read(each[0], room + (room == 0)) for each, room in places]
        status = [driver.memory.read_u8(each[-1]) for each, _ in places]
        results.append((sorted(queue.used()), read, status, image.read_bytes()))
        assert not driver.errors
        driver.close()
    assert results[0] == results[1]
    assert errno.EIO not in results[0][2]
