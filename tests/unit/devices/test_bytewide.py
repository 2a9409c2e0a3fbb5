"""How a wide access becomes byte cycles."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.bytewide import ByteDevice


class Recorder(ByteDevice):
    """Reads give the offset; a write of 0xee ends the run."""

    def __init__(self):
        self.writes = []

    def read_byte(self, offset):
        return 0x10 + offset

    def write_byte(self, offset, value):
        self.writes.append((offset, value))
        return Outcome.RESET if value == 0xEE else None


@pytest.mark.parametrize(("size", "value"), [(1, 0x13), (2, 0x1413), (4, 0x16151413), (8, 0x1A19181716151413)])
def test_reads_are_little_endian(size, value):
    """The lowest offset is the lowest byte."""
    assert Recorder().read(3, size) == value


def test_writes_go_lowest_offset_first():
    """A word write is the low byte, then the high one."""
    device = Recorder()
    assert device.write(1, 2, 0xBBAA) is None
    assert device.writes == [(1, 0xAA), (2, 0xBB)]


def test_an_ending_stops_the_cycles():
    """The first byte that ends the run gives the outcome, and the rest is not written."""
    device = Recorder()
    assert device.write(0, 4, 0xDDCCEEAA) == Outcome.RESET
    assert device.writes == [(0, 0xAA), (1, 0xEE)]


def test_a_device_without_registers_is_an_empty_bus():
    """Reads float high, writes vanish."""
    assert ByteDevice().read(0, 4) == 0xFFFFFFFF
    assert ByteDevice().write(0, 4, 0) is None
