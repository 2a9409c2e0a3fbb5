"""The kernel test suites' device."""

from __future__ import annotations

import pytest

from pykvm.devices.testdev import PcTestDevice


class Host:
    """Records what the device asks of the machine."""

    def __init__(self):
        self.lines = []
        self.flushed = []
        self.device = PcTestDevice(lambda n, level: self.lines.append((n, level)), self.flushed.append)


@pytest.fixture
def host():
    return Host()


@pytest.mark.parametrize(("size", "value"), [(1, 0x5A), (2, 0xBEEF), (4, 0xDEADBEEF)])
@pytest.mark.parametrize("region", ["latch", "latch_byte"])
def test_latch_reads_back(host, region, size, value):
    """Both latches give back what was written, in every width that fits."""
    latch = getattr(host.device, region)
    latch.write(0, size, value)
    assert latch.read(0, size) == value


def test_latch_keeps_the_other_bytes(host):
    """A narrow write changes only its own bytes, and the two views are one latch."""
    host.device.latch.write(0, 4, 0x44332211)
    host.device.latch.write(1, 2, 0xBBAA)
    assert host.device.latch.read(0, 4) == 0x44BBAA11
    host.device.latch_byte.write(3, 1, 0xCC)
    assert host.device.latch.read(2, 2) == 0xCCBB


def test_flush_passes_the_page(host):
    """The value is a guest physical address; its page is flushed."""
    host.device.flush.write(0, 4, 0x12345678)
    assert host.flushed == [0x12345000]


def test_irq_lines(host):
    """Byte n drives line n: any value but zero raises it."""
    host.device.irq_lines.write(23, 1, 1)
    host.device.irq_lines.write(23, 1, 0)
    host.device.irq_lines.write(5, 1, 0x80)
    assert host.lines == [(23, True), (23, False), (5, True)]


def test_irq_lines_end_at_24(host):
    """There is no line 24."""
    host.device.irq_lines.write(23, 2, 0x0101)
    assert host.lines == [(23, True)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 0x7FF, 0xFFF8])
def test_iomem_is_memory(host, offset, size):
    """All widths, aligned or not, are little-endian memory."""
    value = int.from_bytes(bytes(range(0x81, 0x81 + size)), "little")
    host.device.iomem.write(offset, size, value)
    assert host.device.iomem.read(offset, size) == value
    assert host.device.iomem.read(offset + size - 1, 1) == 0x80 + size


def test_iomem_does_not_grow(host):
    """An access across the end touches only what is inside."""
    host.device.iomem.write(0xFFFE, 4, 0x44332211)
    assert host.device.iomem.read(0xFFFE, 4) == 0x2211


def test_reset_clears_the_memory(host):
    """Every region is empty after reset."""
    host.device.latch.write(0, 4, 0xFFFFFFFF)
    host.device.iomem.write(0x100, 8, 0xFFFFFFFFFFFFFFFF)
    for region in (host.device.latch, host.device.latch_byte, host.device.iomem):
        region.reset()
    assert host.device.latch.read(0, 4) == 0
    assert host.device.iomem.read(0x100, 8) == 0
