"""isa-debug-exit."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.debugexit import DebugExit


@pytest.mark.parametrize(("size", "value"), [(1, 0), (1, 0x10), (2, 0x1234), (4, 0xDEADBEEF)])
def test_debug_exit_carries_the_value(size, value):
    """The outcome has the whole value; the process's status is QEMU's (value << 1) | 1."""
    outcome = DebugExit().write(0, size, value)
    assert outcome == Outcome("DEBUG_EXIT", value)
    assert outcome.exit_status == (value << 1 | 1) & 0xFF


def test_debug_exit_reads_zero():
    """A read does not end the run."""
    assert DebugExit().read(0, 4) == 0
