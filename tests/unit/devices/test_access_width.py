"""Every legacy device takes accesses of every width at every offset, aligned or not, with any value."""

from __future__ import annotations

import random

import pytest
from device_wire import Wire

from pykvm.core.outcome import Outcome
from pykvm.devices.debugcon import DebugCon
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.i8042 import I8042
from pykvm.devices.ioapic import IoApic
from pykvm.devices.ports import PostCode, SystemControlA, SystemControlB
from pykvm.devices.pvpanic import PvPanic
from pykvm.devices.rtc import Rtc
from pykvm.devices.serial import Serial
from pykvm.devices.testdev import PcTestDevice

SIZES = (1, 2, 4, 8)
BYTE_VALUES = (0x00, 0x01, 0x5A, 0x7F, 0x80, 0xAA, 0xD1, 0xFE, 0xFF)


class World:
    """One of each device, with everything they put out counted."""

    def __init__(self):
        self.bytes_out = 0
        self.calls = 0
        test = PcTestDevice(self.call, self.call)
        keyboard = I8042(Wire(1))
        self.regions = {
            "serial": (Serial(Wire(4), self.sink), 8),
            "i8042 data": (keyboard.data, 1),
            "i8042 command": (keyboard.command, 1),
            "rtc": (Rtc(Wire(8), ram_below_4g=1 << 29), 2),
            "0x61": (SystemControlB(), 1),
            "0x80": (PostCode(), 1),
            "0x92": (SystemControlA(), 1),
            "debug exit": (DebugExit(), 4),
            "debugcon": (DebugCon(self.sink), 1),
            "pvpanic": (PvPanic(), 1),
            "latch": (test.latch, 4),
            "byte latch": (test.latch_byte, 4),
            "flush": (test.flush, 4),
            "irq lines": (test.irq_lines, 24),
            "iomem": (test.iomem, 0x10000),
            "ioapic": (IoApic(self.call, self.call), 0x1000),
        }

    def sink(self, data):
        self.bytes_out += len(data)

    def call(self, *_):
        self.calls += 1


NAMES = tuple(World().regions)


def access(world, name, offset, size, value):
    """One write and one read, checked for all that a device promises."""
    device, _ = world.regions[name]
    before = world.bytes_out, world.calls
    outcome = device.write(offset, size, value)
    assert outcome is None or isinstance(outcome, Outcome)
    assert world.bytes_out - before[0] <= size
    assert world.calls - before[1] <= max(size, 2)  # an I/O APIC entry: new routes and one message
    assert 0 <= device.read(offset, size) < 1 << (8 * size)


def offsets(length):
    """Every offset of a small region and some beyond it; both ends of a large one."""
    return range(length + 8) if length <= 64 else (*range(16), *range(length - 16, length + 8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_access_is_survived(name, size):
    """No exception, a value that fits and bounded output, also across the end of the region."""
    world = World()
    for offset in offsets(world.regions[name][1]):
        for byte in BYTE_VALUES:
            for value in {byte, byte << (8 * (size - 1)), int.from_bytes(bytes([byte]) * size)}:
                access(world, name, offset, size, value)


@pytest.mark.parametrize("name", NAMES)
def test_random_accesses_are_survived(name):
    """Long random sequences, with resets in between, end in no state that fails."""
    rng = random.Random(name)
    world = World()
    device, length = world.regions[name]
    for step in range(3000):
        size = rng.choice(SIZES)
        access(world, name, rng.randrange(length), size, rng.getrandbits(8 * size))
        if step % 500 == 499:
            device.reset()


@pytest.mark.parametrize("name", [each for each in NAMES if each not in ("rtc", "0x61")])  # these follow time
def test_reset_repeats(name):
    """After any use, reset gives the same registers as the reset before."""
    world = World()
    device, length = world.regions[name]

    def registers():
        device.reset()
        return [device.read(offset, 1) for offset in range(min(length, 64))]

    first = registers()
    rng = random.Random(name)
    for _ in range(200):
        device.write(rng.randrange(length), 1, rng.getrandbits(8))
    assert registers() == first
