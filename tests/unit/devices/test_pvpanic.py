"""pvpanic, event by event."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.pvpanic import PvPanic


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
