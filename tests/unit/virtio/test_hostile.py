"""What hostile drivers try: each case either is legal and works, or ends in NEEDS_RESET, or is ignored.

The section numbers are those of the virtio 1.2 specification.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from driver import BUFFERS, INDIRECT_DESC, NEXT, RAM, RINGS, WRITE, Driver, Queue

from pykvm._native import lib
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.queue import INDIRECT

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

    Drive = Callable[[VirtioDevice], Driver]
    Trick = Callable[[Queue], object]

SIZE = 16
HOLE = 0xD0000000  # the device's own registers


class Copier(VirtioDevice):
    """Copies what is readable into what is writable, a page at most."""

    device_id = 0x30
    queue_sizes = (SIZE, SIZE)

    def __init__(self) -> None:
        self.served = [0, 0]
        self.again: Callable[[Virtqueue], object] = lambda queue: None

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Copy; then let the test's driver do something in the middle."""
        self.served[queue.index] += 1
        written = chain.write(chain.read(4096))
        self.again(queue)
        return written


def direct(*descriptors: tuple[int, int, int, int]) -> Trick:
    """Offer descriptor 0 of these (gpa, length, flags, next)."""

    def trick(queue: Queue) -> None:
        for at, parts in enumerate(descriptors):
            queue.descriptor(at, *parts)
        queue.offer(0)

    return trick


def indirect(*descriptors: tuple[int, int, int, int], flags: int = INDIRECT, length: int | None = None) -> Trick:
    """Offer an indirect descriptor of these."""

    def trick(queue: Queue) -> None:
        for at, parts in enumerate(descriptors):
            queue.driver.memory.write(BUFFERS + 16 * at, struct.pack("<QIHH", *parts))
        queue.descriptor(0, BUFFERS, 16 * len(descriptors) if length is None else length, flags, 1)
        queue.descriptor(1, BUFFERS, 16, 0, 0)
        queue.offer(0)

    return trick


def loop_through_the_queue(queue: Queue) -> None:
    """Every descriptor leads to the next one, the last one to the first."""
    for at in range(SIZE):
        queue.descriptor(at, BUFFERS, 1, NEXT, (at + 1) % SIZE)
    queue.offer(0)


def jump(distance: int) -> Trick:
    """avail.idx moves by `distance` at once."""

    def trick(queue: Queue) -> None:
        direct((BUFFERS, 1, 0, 0))(queue)
        queue.driver.memory.write_uint(queue.avail + 2, 2, distance & 0xFFFF)

    return trick


OK = "served"
RESET = "needs reset"

DESCRIPTORS: dict[str, tuple[Trick, str]] = {
    "self-loop (2.7.5)": (direct((BUFFERS, 1, NEXT, 0)), RESET),
    "loop through the whole table (2.7.5)": (loop_through_the_queue, RESET),
    "loop of writable descriptors (2.7.5)": (
        direct((BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 1, WRITE | NEXT, 0)),
        RESET,
    ),
    "next is the table's size (2.7.5)": (direct((BUFFERS, 1, NEXT, SIZE)), RESET),
    "next is 65535 (2.7.5)": (direct((BUFFERS, 1, NEXT, 0xFFFF)), RESET),
    "head is the table's size (2.7.6)": (lambda queue: queue.offer(SIZE), RESET),
    "head is 65535 (2.7.6)": (lambda queue: queue.offer(0xFFFF), RESET),
    "zero length": (direct((BUFFERS, 0, 0, 0)), RESET),
    "length 0xffffffff": (direct((BUFFERS, 0xFFFFFFFF, WRITE, 0)), RESET),
    "one byte past the end of RAM": (direct((RAM - 8, 9, WRITE, 0)), RESET),
    "at the end of RAM": (direct((RAM, 1, 0, 0)), RESET),
    "up to the end of RAM": (direct((RAM - 8, 8, WRITE, 0)), OK),
    "all of RAM, readable": (direct((0, RAM, 0, 0)), OK),
    "wraps 2^64": (direct((2**64 - 4, 8, WRITE, 0)), RESET),
    "ends at 2^64": (direct((2**64 - 8, 8, WRITE, 0)), RESET),
    "in the MMIO hole: the device's own registers": (direct((HOLE, 8, WRITE, 0)), RESET),
    "readable after writable (2.7.4.2)": (direct((BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 1, 0, 0)), RESET),
    "unknown flags (2.7.5.2: reserved)": (direct((BUFFERS, 8, 0xFFF8, 0)), OK),
    "the rings themselves as a buffer": (direct((RINGS, 64, 0, 1)), OK),
    "indirect inside indirect (2.7.5.3.1)": (indirect((BUFFERS, 16, INDIRECT, 0)), RESET),
    "indirect with next (2.7.5.3.1)": (indirect((BUFFERS, 1, 0, 0), flags=INDIRECT | NEXT), RESET),
    "indirect of no bytes (2.7.5.3.1)": (indirect(length=0), RESET),
    "indirect of 17 bytes (2.7.5.3.1)": (indirect((BUFFERS, 1, 0, 0), length=17), RESET),
    "indirect of 4 GiB less 16 (2.7.5.3.1)": (indirect((BUFFERS, 1, 0, 0), length=0xFFFFFFF0), RESET),
    "indirect at the end of RAM": (direct((RAM, 16, INDIRECT, 0)), RESET),
    "indirect up to the end of RAM, of zeros": (direct((RAM - 16, 16, INDIRECT, 0)), RESET),
    "indirect self-loop (2.7.5)": (indirect((BUFFERS, 1, NEXT, 0)), RESET),
    "indirect next out of the table (2.7.5.3.1)": (indirect((BUFFERS, 1, NEXT, 1)), RESET),
}

RINGS_OF_A_LIVE_QUEUE: dict[str, tuple[Trick, str]] = {
    "avail.idx jumps by the size + 1 (2.7.13.3)": (jump(SIZE + 1), RESET),
    "avail.idx jumps by 32768 (2.7.13.3)": (jump(0x8000), RESET),
    "avail.idx goes back by one (2.7.13.3)": (jump(-1), RESET),
    "avail.idx jumps by the size": (jump(SIZE), OK),
}


@pytest.mark.parametrize(("trick", "answer"), DESCRIPTORS.values(), ids=DESCRIPTORS.keys())
def test_descriptors(drive: Drive, trick: Trick, answer: str) -> None:
    """A chain that breaks a rule stops the device and changes no byte of memory; a legal one is served."""
    check(drive, trick, answer)


@pytest.mark.parametrize(("trick", "answer"), RINGS_OF_A_LIVE_QUEUE.values(), ids=RINGS_OF_A_LIVE_QUEUE.keys())
def test_available_index(drive: Drive, trick: Trick, answer: str) -> None:
    """No more than the queue's size can be available."""
    check(drive, trick, answer)


def check(drive: Drive, trick: Trick, answer: str) -> None:
    """Play `trick` on a device and compare the outcome."""
    device = Copier()
    driver = drive(device)
    queue, _ = driver.start(INDIRECT_DESC, SIZE)
    trick(queue)
    before = driver.memory.read(0, RAM)
    queue.kick()
    assert driver.needs_reset == (answer == RESET)
    assert driver.errors == []
    if answer == RESET:
        assert device.served == [0, 0]
        assert driver.memory.read(0, RAM) == before
    else:
        assert device.served[0] == len(queue.used()) >= 1


def test_indirect_without_the_feature(drive: Drive) -> None:
    """An indirect descriptor that was not negotiated is a fault (2.7.5.3.1)."""
    driver = drive(Copier())
    queue, _ = driver.start(0, SIZE)
    indirect((BUFFERS, 1, 0, 0))(queue)
    queue.kick()
    assert driver.needs_reset


def test_answer_goes_into_writable_buffers_only(drive: Drive) -> None:
    """A request without a writable buffer gets no answer, one with a small one a part of it (2.7.5)."""
    driver = drive(Copier())
    queue, _ = driver.start(size=SIZE)
    queue.add([b"secret"])
    (place,) = queue.add([b"secret"], [3])
    before = driver.memory.read(BUFFERS, 6)
    queue.kick()
    assert [written for _, written in queue.used()] == [0, 3]
    assert driver.memory.read(BUFFERS, 6) == before
    assert driver.memory.read(place, 4) == b"sec\0"


PLACES: dict[str, tuple[dict[str, int], int]] = {
    "descriptor table misaligned (2.7)": ({"desc": RINGS + 8}, SIZE),
    "available ring misaligned (2.7)": ({"avail": RINGS + 0x4001}, SIZE),
    "used ring misaligned (2.7)": ({"used": RINGS + 0x5002}, SIZE),
    "available ring over the descriptor table": ({"avail": RINGS + 16}, SIZE),
    "used ring over the available ring": ({"used": RINGS + 0x4004}, SIZE),
    "descriptor table across the end of RAM": ({"desc": RAM - 16}, SIZE),
    "used ring one entry short of RAM": ({"used": RAM - 4 - 8 * SIZE}, SIZE),
    "rings in the MMIO hole": ({"desc": HOLE}, SIZE),
    "rings at the end of the address space": ({"used": 2**64 - 4}, SIZE),
    "3 entries (2.7)": ({}, 3),
    "more than the maximum (4.2.2)": ({}, 2 * SIZE),
    "2^31 entries": ({}, 1 << 31),
}


@pytest.mark.parametrize(("places", "size"), PLACES.values(), ids=PLACES.keys())
def test_rings_in_bad_places(drive: Drive, places: dict[str, int], size: int) -> None:
    """The device refuses the queue and asks for a reset."""
    driver = drive(Copier())
    driver.negotiate()
    driver.setup_queue(0, size, **places)
    assert driver.needs_reset
    assert driver.read(lib.VIRTIO_MMIO_QUEUE_READY) == 0
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    driver.start()
    assert not driver.needs_reset


def test_size_zero(drive: Drive) -> None:
    """A queue of no entries is refused (2.7)."""
    driver = drive(Copier())
    driver.negotiate()
    driver.write(lib.VIRTIO_MMIO_QUEUE_NUM, 0)
    driver.write(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    assert driver.needs_reset


def test_used_ring_up_to_the_end_of_ram(drive: Drive) -> None:
    """A used ring whose event field ends with RAM is legal."""
    driver = drive(Copier())
    driver.negotiate()
    used = RAM - (6 + 8 * SIZE) & ~3
    queue = driver.setup_queue(0, SIZE, used=used)
    assert not driver.needs_reset
    queue.used_ring = used
    driver.write(lib.VIRTIO_MMIO_STATUS, driver.transport.status | lib.VIRTIO_CONFIG_S_DRIVER_OK)
    queue.add([b"x"])
    queue.kick()
    assert queue.used() == [(0, 0)]


QUEUE_REGISTERS = [
    lib.VIRTIO_MMIO_QUEUE_NUM,
    lib.VIRTIO_MMIO_QUEUE_READY,
    lib.VIRTIO_MMIO_QUEUE_DESC_LOW,
    lib.VIRTIO_MMIO_QUEUE_DESC_HIGH,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    lib.VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    lib.VIRTIO_MMIO_QUEUE_USED_LOW,
    lib.VIRTIO_MMIO_QUEUE_USED_HIGH,
]


@pytest.mark.parametrize("register", QUEUE_REGISTERS)
def test_queue_registers_freeze_at_driver_ok(drive: Drive, register: int) -> None:
    """What a driver writes into the registers of a live queue moves nothing (CVE-2026-5747)."""
    driver = drive(Copier())
    queue, _ = driver.start(size=SIZE)
    driver.write(lib.VIRTIO_MMIO_QUEUE_SEL, 0)
    for value in (0, 1, 2, 0x20000, 0xFFFFFFFF):
        driver.write(register, value)
    driver.write(lib.VIRTIO_MMIO_QUEUE_READY, 1)
    queue.add([b"x"])
    queue.kick()
    assert queue.used() == [(0, 0)]


def test_ready_toggled_before_driver_ok(drive: Drive) -> None:
    """A queue may be taken back and set up elsewhere until DRIVER_OK; ready, its registers are frozen as well."""
    driver = drive(Copier())
    driver.negotiate()
    queue = driver.setup_queue(0, SIZE)
    driver.write(lib.VIRTIO_MMIO_QUEUE_DESC_LOW, 0x40000)
    assert driver.transport.queues[0].desc == queue.desc
    driver.write(lib.VIRTIO_MMIO_QUEUE_READY, 0)
    assert driver.read(lib.VIRTIO_MMIO_QUEUE_READY) == 0
    queue = driver.setup_queue(0, SIZE)
    driver.write(lib.VIRTIO_MMIO_STATUS, driver.transport.status | lib.VIRTIO_CONFIG_S_DRIVER_OK)
    queue.add([b"x"])
    queue.kick()
    assert queue.used() == [(0, 0)]


def test_queue_before_features_ok(drive: Drive) -> None:
    """Setting up a queue before the features are agreed on is a fault (3.1.1)."""
    driver = drive(Copier())
    driver.write(lib.VIRTIO_MMIO_STATUS, 3)
    driver.setup_queue(0, SIZE)
    assert driver.needs_reset


def test_a_ring_that_never_ends(drive: Drive) -> None:
    """A driver that adds a request for each one served keeps neither the thread nor its neighbour (CVE-2016-5403)."""
    device = Copier()
    driver = drive(device)
    endless, other = driver.start(size=SIZE)

    def again(queue: Virtqueue) -> None:
        if queue.index == 0:
            endless.offer(0)

    device.again = again
    endless.add([b"x"])
    other.add([b"x"])
    driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 1)
    driver.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    driver.io.run(4)
    assert device.served[1] == 1
    assert SIZE <= device.served[0] <= 4 * SIZE
    device.again = lambda queue: None
    driver.io.run()
    assert driver.errors == [] and not driver.needs_reset


def test_one_interrupt_for_many_requests(drive: Drive) -> None:
    """A full ring served in one go interrupts once: no interrupt storm."""
    driver = drive(Copier())
    queue, _ = driver.start(size=SIZE)
    for _ in range(SIZE):
        queue.add([b"x"])
    queue.kick()
    assert (len(queue.used()), driver.interrupts()) == (SIZE, 1)


def test_chain_changed_after_it_was_read(drive: Drive) -> None:
    """A descriptor that the driver changes while its request is served does not move the device's buffers."""
    device = Copier()
    driver = drive(device)
    queue, _ = driver.start(size=SIZE)
    queue.add([b"abc"], [3])
    device.again = lambda _: queue.descriptor(1, 0, 0xFFFFFFFF, WRITE)
    queue.kick()
    assert queue.used() == [(0, 3)]


def test_a_chain_twice_in_the_ring(drive: Drive) -> None:
    """Offering the same descriptors twice harms the driver alone: both are served."""
    driver = drive(Copier())
    queue, _ = driver.start(size=SIZE)
    queue.add([b"abc"], [3])
    queue.offer(0)
    queue.kick()
    assert queue.used() == [(0, 3), (0, 3)]
