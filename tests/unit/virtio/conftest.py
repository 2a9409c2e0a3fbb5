"""Fixtures of the virtio tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm.virtio.device import VirtioDevice


@pytest.fixture
def drive() -> Iterator[Callable[[VirtioDevice], Driver]]:
    """drive(device) puts a device on a transport with a driver; closed after the test, without an error left over."""
    drivers: list[Driver] = []

    def make(device: VirtioDevice) -> Driver:
        drivers.append(Driver(device))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()
    assert not [error for driver in drivers for error in driver.errors]
