"""Virtio devices in snapshots: queues that go on where they were, and states that are refused."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from driver import Driver

from pykvm._native import lib
from pykvm.core.memory import GuestMemory
from pykvm.errors import SnapshotError
from pykvm.virtio.blk import Disk
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.rng import Rng

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pykvm.core.state import State

SIZE = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 KiB of ones."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\1" * SIZE)
    return path


def write(driver: Driver, sector: int, byte: int) -> int:
    """Write one sector full of `byte`; the status."""
    (status,) = driver.queues[0].add([struct.pack("<IIQ", lib.VIRTIO_BLK_T_OUT, 0, sector), bytes([byte]) * 512], [1])
    driver.queues[0].kick()
    driver.queues[0].used()
    return driver.memory.read_u8(status)


def read(driver: Driver, sector: int) -> bytes:
    """The sector's content."""
    data, status = driver.queues[0].add([struct.pack("<IIQ", lib.VIRTIO_BLK_T_IN, 0, sector)], [512, 1])
    driver.queues[0].kick()
    driver.queues[0].used()
    assert driver.memory.read_u8(status) == lib.VIRTIO_BLK_S_OK
    return driver.memory.read(data, 512)


def moved(driver: Driver, device: VirtioDevice, state: State) -> Driver:
    """Another machine's driver that goes on with a copy of the memory and this state."""
    memory = GuestMemory()
    memory.add(0, driver.memory.size)
    memory.write(0, driver.memory.read(0, driver.memory.size))
    other = Driver(device, memory)
    other.transport.shape.check("test", other.transport.shape.version, state)
    other.transport.restore(state)
    other.queues, other._free = driver.queues, driver._free
    for queue in other.queues:
        queue.driver = other
    other.io.run()
    return other


@pytest.mark.parametrize("native", [False, True])
def test_a_disk_goes_on_elsewhere(
    drive: Callable[[VirtioDevice], Driver], image: Path, tmp_path: Path, native: bool
) -> None:
    """Ring indexes wrap, the state moves, and the next requests are served from where the last ones ended."""
    driver = drive(Disk(image, native=native, readonly=True))
    driver.start(size=8)
    for _ in range(11):
        assert read(driver, 3) == b"\1" * 512
    state = driver.transport.save()
    other = moved(driver, Disk(image, native=native, readonly=True), state)
    for _ in range(11):
        assert read(other, 3) == b"\1" * 512
    assert not other.needs_reset
    other.close()


def test_what_was_offered_and_not_served(drive: Callable[[VirtioDevice], Driver]) -> None:
    """A request that the driver had made available is served after the restore, and interrupts."""
    driver = drive(Rng())
    (queue,) = driver.start()
    (place,) = queue.add((), (32,))
    state = driver.transport.save()
    other = moved(driver, Rng(), state)
    assert other.queues[0].used() == [(0, 32)] and other.memory.read(place, 32) != bytes(32)
    assert other.interrupts()
    other.close()


def test_holding_serves_what_was_offered(drive: Callable[[VirtioDevice], Driver]) -> None:
    """Whoever holds the device for a snapshot finds no request left, though nobody has served the notification."""
    driver = drive(Rng())
    (queue,) = driver.start()
    queue.add((), (32,))
    driver.transport.hold()
    assert queue.used() == [(0, 32)]
    driver.transport.release()


def test_an_interrupt_on_its_way_is_repeated(drive: Callable[[VirtioDevice], Driver]) -> None:
    """An interrupt that the guest has not acknowledged is raised again after the restore."""
    driver = drive(Rng())
    (queue,) = driver.start()
    queue.add((), (8,))
    queue.kick()
    other = moved(driver, Rng(), driver.transport.save())
    assert other.interrupts() and other.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == 1
    other.close()


def test_overlays_are_independent(drive: Callable[[VirtioDevice], Driver], image: Path) -> None:
    """What is written to an overlay stays in memory; a copy goes its own way; a restore undoes what came after."""
    driver = drive(Disk(image, overlay=True))
    driver.start()
    assert write(driver, 5, 2) == lib.VIRTIO_BLK_S_OK
    state = driver.transport.save()
    device = driver.transport.device.twin()
    other = moved(driver, device, state)
    assert read(other, 5) == b"\2" * 512 and read(other, 6) == b"\1" * 512
    assert write(other, 6, 3) == lib.VIRTIO_BLK_S_OK and read(other, 6) == b"\3" * 512
    second, memory = other.transport.save(), other.memory.read(0, other.memory.size)
    assert write(other, 6, 4) == lib.VIRTIO_BLK_S_OK
    other.memory.write(0, memory)
    other.transport.restore(second)
    other.io.run()
    buffer = bytearray(1024)
    other.transport.device.file.read([memoryview(buffer)], 6 * 512)  # type: ignore[attr-defined]
    assert buffer == b"\3" * 512 + b"\1" * 512
    other.close()
    mine = bytearray(1024)
    driver.transport.device.file.read([memoryview(mine)], 5 * 512)  # type: ignore[attr-defined]
    assert mine == b"\2" * 512 + b"\1" * 512
    assert image.read_bytes() == b"\1" * SIZE


def test_states_that_are_refused(drive: Callable[[VirtioDevice], Driver], image: Path) -> None:
    """Another kind of device, features that are not offered, an image that was changed."""
    driver = drive(Disk(image))
    driver.start()
    state = driver.transport.save()
    with pytest.raises(SnapshotError, match="another kind"):
        driver.transport.restore({**state, "device_id": 4})
    with pytest.raises(SnapshotError, match="does not offer"):
        driver.transport.restore({**state, "driver_features": 1 << 60})
    os.utime(image, ns=(1, 1))
    with pytest.raises(SnapshotError, match="has changed since"):
        driver.transport.restore(state)


@pytest.mark.parametrize(
    ("place", "value"), [(0, 3), (0, 0), (0, 9999), (1, 1 << 60), (1, 8), (2, 1), (3, 0xFFFFF000), (5, 0x7777)]
)
def test_queues_that_break_the_rules(drive: Callable[[VirtioDevice], Driver], place: int, value: int) -> None:
    """A queue in impossible places or with impossible indexes makes the device ask for a reset, no more."""
    driver = drive(Rng())
    driver.start()
    state = driver.transport.save()
    row = list(state["queues"][0])
    row[place] = value
    driver.transport.restore({**state, "queues": [row]})
    driver.io.run()
    assert driver.needs_reset


def test_a_device_that_cannot_be_saved(drive: Callable[[VirtioDevice], Driver]) -> None:
    """A device says by itself that it cannot take part: nothing is left out silently."""

    class Plain(VirtioDevice):
        queue_sizes = (8,)

    driver = drive(Plain())
    with pytest.raises(SnapshotError, match="cannot be saved"):
        driver.transport.save()
    with pytest.raises(SnapshotError, match="cannot be forked"):
        driver.transport.device.twin()
