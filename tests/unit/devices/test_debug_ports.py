"""isa-debug-exit, the debug console and pvpanic."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.debugcon import DebugCon
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.pvpanic import PvPanic


@pytest.mark.parametrize(("size", "value"), [(1, 0), (1, 0x10), (2, 0x1234), (4, 0xDEADBEEF)])
def test_debug_exit_carries_the_value(size, value):
    """The outcome has the whole value; the process's status is QEMU's (value << 1) | 1."""
    outcome = DebugExit().write(0, size, value)
    assert outcome == Outcome("DEBUG_EXIT", value)
    assert outcome.exit_status == (value << 1 | 1) & 0xFF


def test_debug_exit_reads_zero():
    """A read does not end the run."""
    assert DebugExit().read(0, 4) == 0


def test_debug_console_prints_and_is_found():
    """Bytes reach the sink; a read gives the 0xe9 that firmware looks for."""
    printed = bytearray()
    console = DebugCon(printed.extend)
    for byte in b"SeaBIOS":
        assert console.write(0, 1, byte) is None
    assert (printed, console.read(0, 1)) == (b"SeaBIOS", 0xE9)


def test_debug_console_prints_only_its_own_byte_of_a_wide_write():
    """The upper bytes of a wide write belong to the next ports."""
    printed = bytearray()
    DebugCon(printed.extend).write(0, 4, 0x44434241)
    assert printed == b"A"


def test_pvpanic_names_its_events():
    """A read gives the three event bits of the specification."""
    assert PvPanic().read(0, 1) == 0b111


@pytest.mark.parametrize("value", [0x01, 0x03, 0x05, 0xFF])
def test_pvpanic_panicked_is_a_crash(value):
    """Bit 0 ends the run as a crash that says where it came from."""
    outcome = PvPanic().write(0, 1, value)
    assert outcome.kind == "CRASH"
    assert outcome.detail == "guest panicked (pvpanic)"


def test_pvpanic_crash_loaded_runs_on():
    """Bit 1 only notes the panic, until reset."""
    device = PvPanic()
    assert device.write(0, 1, 0x02) is None
    assert device.crash_loaded
    device.reset()
    assert not device.crash_loaded


def test_pvpanic_shutdown_powers_off():
    """Bit 2 is an orderly end."""
    assert PvPanic().write(0, 1, 0x04) == Outcome.POWER_OFF


def test_pvpanic_ignores_unknown_bits():
    """Events from a later specification do nothing."""
    device = PvPanic()
    assert device.write(0, 1, 0xF8) is None
    assert not device.crash_loaded
