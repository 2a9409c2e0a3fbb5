"""The split virtqueue with rings that no driver would write: random ones, and every rule's limit."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from driver import BUFFERS, EVENT_IDX, INDIRECT_DESC, NEXT, RAM, RINGS, WRITE, Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm._native import ffi
from pykvm.core.memory import GuestMemory
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.queue import INDIRECT, MAX_SIZE, Virtqueue

if TYPE_CHECKING:
    from pykvm.virtio.chain import Chain

SIZE = 8
Drive = "Callable[[VirtioDevice], Driver]"


class Scribbler(VirtioDevice):
    """Fills every writable buffer with 0xEE and remembers where it was."""

    device_id = 0x30
    queue_sizes = (SIZE,)

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.descriptors = 0

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Write all that may be written."""
        self.descriptors = max(self.descriptors, len(chain.readable) + len(chain.writable))
        base = self.memory.slots[0].hva
        for buffer in chain.writable:
            start = int(ffi.cast("uintptr_t", ffi.from_buffer(buffer))) - base
            self.ranges.append((start, start + len(buffer)))
            buffer[:] = b"\xee" * len(buffer)
        return chain.writable_size & 0xFFFFFFFF


# Addresses that mean something: rings, buffers, the end of RAM, the MMIO hole, the end of the address space.
PLACES = st.one_of(
    st.sampled_from(
        [0, RINGS, RINGS + 0x4000, RINGS + 0x5000, BUFFERS, RAM - 16, RAM - 1, RAM, 0xD0000000, 2**64 - 16]
    ),
    st.integers(0, RAM + 64),
    st.integers(0, 2**64 - 1),
)
LENGTHS = st.one_of(st.sampled_from([0, 1, 15, 16, 32, 48, 0x1000, RAM, 0xFFFFFFFF]), st.integers(0, 2**32 - 1))
FLAGS = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT]), st.integers(0, 0xFFFF))
DESCRIPTORS = st.tuples(PLACES, LENGTHS, FLAGS, st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)))


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    indirect=st.lists(DESCRIPTORS, max_size=6),
    heads=st.lists(st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)), min_size=SIZE, max_size=SIZE),
    idx=st.one_of(st.integers(0, SIZE + 1), st.integers(0, 0xFFFF)),
    features=st.sampled_from([0, INDIRECT_DESC, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
)
def test_any_rings(
    table: list[tuple[int, ...]], indirect: list[tuple[int, ...]], heads: list[int], idx: int, features: int
) -> None:
    """Whatever stands in the rings: the device stops or serves, no exception, and no byte changes but those offered."""
    device = Scribbler()
    driver = Driver(device)
    try:
        (queue,) = driver.start(features, SIZE)
        memory = driver.memory
        for at, parts in enumerate(table):
            memory.write(queue.desc + 16 * at, struct.pack("<QIHH", *parts))
        for at, parts in enumerate(indirect):
            memory.write(BUFFERS + 16 * at, struct.pack("<QIHH", *parts))
        memory.write(queue.avail, struct.pack(f"<HH{SIZE}H", 0, idx, *heads))
        before = bytearray(memory.read(0, RAM))
        driver.kick(0)
        assert driver.errors == []
        assert device.descriptors <= MAX_SIZE
        after = bytearray(memory.read(0, RAM))
        for start, end in [*device.ranges, (queue.used_ring, queue.used_ring + 6 + 8 * SIZE)]:
            before[start:end] = after[start:end]
        assert before == after
        driver.write(0x70, 0)
        assert not driver.needs_reset
    finally:
        driver.close()


@settings(max_examples=100, deadline=None)
@given(desc=PLACES, avail=PLACES, used=PLACES, size=st.one_of(st.integers(0, SIZE + 1), st.integers(0, 2**32 - 1)))
def test_any_ring_addresses(desc: int, avail: int, used: int, size: int) -> None:
    """Rings anywhere, of any size: refused by DriverFault, or inside memory, aligned and apart."""
    memory = GuestMemory()
    memory.add(0, RAM)
    queue = Virtqueue(0, SIZE, memory)
    queue.size, queue.desc, queue.avail, queue.used = size, desc, avail, used
    try:
        queue.enable(EVENT_IDX)
    except DriverFault:
        pass
    else:
        assert size in (1, 2, 4, 8)
        assert (desc % 16, avail % 2, used % 4) == (0, 0, 0)
        parts = sorted([(desc, 16 * size), (avail, 4 + 2 * size), (used, 4 + 8 * size)])
        assert all(sum(one) <= other[0] for one, other in pairwise(parts))
        assert sum(parts[-1]) <= RAM
    queue.release()
    memory.close()


def test_longest_chains(drive: Drive) -> None:
    """As many descriptors as the queue has entries make a chain (2.7.5), an indirect table may hold up to MAX_SIZE."""
    device = Scribbler()
    driver = drive(device)
    (queue,) = driver.start(INDIRECT_DESC, SIZE)
    queue.add([], [1] * SIZE)
    queue.kick()
    assert queue.used() == [(0, SIZE)]
    place = driver.allocate(16)
    queue.add_indirect([(place, 1, WRITE)] * MAX_SIZE)
    queue.kick()
    assert queue.used() == [(0, MAX_SIZE)]
    queue.add_indirect([(place, 1, WRITE)] * (MAX_SIZE + 1))
    queue.kick()
    assert driver.needs_reset and queue.used() == []


def test_chain_of_direct_and_indirect_descriptors(drive: Drive) -> None:
    """Direct descriptors may be followed by one indirect one, whose WRITE flag means nothing (2.7.5.3.2)."""
    device = Scribbler()
    driver = drive(device)
    (queue,) = driver.start(INDIRECT_DESC, SIZE)
    data, table = driver.allocate(16), driver.allocate(16)
    driver.memory.write(table, struct.pack("<QIHH", data, 5, WRITE, 0))
    queue.descriptor(0, BUFFERS, 3, NEXT, 1)
    queue.descriptor(1, table, 16, INDIRECT | WRITE, 0)
    queue.offer(0)
    queue.kick()
    assert queue.used() == [(0, 5)]
    assert driver.memory.read(data, 6) == b"\xee" * 5 + b"\0"


def test_used_ring_in_read_only_memory_is_refused() -> None:
    """The device does not write into a slot that the guest itself may not write (firmware)."""
    memory = GuestMemory()
    memory.add(0, RAM)
    memory.add(0x200000, 0x1000, readonly=True)
    driver = Driver(Scribbler(), memory)
    driver.negotiate()
    driver.setup_queue(0, SIZE, used=0x200000)
    assert driver.needs_reset
    driver.close()


def test_rings_in_two_slots_are_refused() -> None:
    """A ring lies in one memory slot, for it is accessed as one array."""
    memory = GuestMemory()
    memory.add(0, RAM)
    memory.add(RAM, 0x1000)
    driver = Driver(Scribbler(), memory)
    driver.negotiate()
    driver.setup_queue(0, SIZE, desc=RAM - 16)
    assert driver.needs_reset
    driver.close()


def test_buffer_across_two_slots() -> None:
    """A buffer that begins in one slot and ends in the next is two pieces of one buffer."""
    memory = GuestMemory()
    memory.add(0, RAM)
    memory.add(RAM, 0x1000)
    driver = Driver(Scribbler(), memory)
    (queue,) = driver.start(size=SIZE)
    queue.descriptor(0, RAM - 4, 8, WRITE)
    queue.offer(0)
    queue.kick()
    assert queue.used() == [(0, 8)]
    assert memory.read(RAM - 5, 10) == b"\0" + b"\xee" * 8 + b"\0"
    driver.close()


def test_four_gibibytes_are_too_much() -> None:
    """A chain holds up to 2^32 - 1 bytes, as used.len can say (2.7.4.1): 64 MiB offered 64 times are more."""
    memory = GuestMemory()
    memory.add(0, 64 << 20)
    for times, refused in ((63, False), (64, True)):
        driver = Driver(Scribbler(), memory)
        (queue,) = driver.start(INDIRECT_DESC, SIZE)
        queue.add_indirect([(0, 64 << 20, 0)] * times)
        queue.kick()
        assert (queue.used() == []) == driver.needs_reset == refused
        driver.transport.close()
        memory.fill(RINGS, 0x8000)
    memory.close()


@pytest.mark.parametrize("size", [0, 3, 2048])
def test_a_device_offers_possible_queues(size: int) -> None:
    """A queue size that no driver could use is a bug of the device's author."""
    with pytest.raises(ValueError, match="power of two"):
        Virtqueue(0, size, GuestMemory())
