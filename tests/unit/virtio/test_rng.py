"""The entropy device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from driver import INDIRECT_DESC, WRITE, Driver

from pykvm.cli.devices import make_devices
from pykvm.cli.start import PARSER
from pykvm.virtio.rng import CHUNK, Rng

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]


def test_fills_buffers(drive: Drive) -> None:
    """Every writable byte of a request is random, and two requests differ (5.4.6)."""
    driver = drive(Rng())
    (queue,) = driver.start()
    places = [*queue.add([], [100, 28]), *queue.add([], [128])]
    queue.kick()
    assert queue.used() == [(0, 128), (2, 128)]
    first = driver.memory.read(places[0], 100) + driver.memory.read(places[1], 28)
    second = driver.memory.read(places[2], 128)
    assert first != second
    assert len(set(first)) > 64 and len(set(second)) > 64


def test_large_and_odd_buffers(drive: Drive) -> None:
    """A huge buffer gets a chunk, one that is only readable nothing; neither stops the device."""
    driver = drive(Rng())
    (queue,) = driver.start(INDIRECT_DESC)
    queue.add_indirect([(0x80000, 0x40000, WRITE)] * 100)
    queue.add([b"readable"])
    queue.kick()
    assert [written for _, written in queue.used()] == [CHUNK, 0]


def test_option() -> None:
    """--rng makes one, with the limit that its value asks for."""
    for arguments, limited in ((["--rng"], False), (["--rng=rate=1K,burst=64"], True)):
        values, _ = PARSER.parse(arguments)
        (device,) = make_devices(values)
        assert isinstance(device, Rng) and (device.limit is not None) == limited
