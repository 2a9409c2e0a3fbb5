"""Ports 0x61, 0x80 and 0x92."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.ports import (
    POST_HISTORY,
    REFRESH_NS,
    REFRESH_TOGGLE,
    TIMER2_GATE,
    TIMER2_NS,
    TIMER2_OUT,
    PostCode,
    SystemControlA,
    SystemControlB,
)


class Clock:
    """Host time that the test moves."""

    def __init__(self):
        self.ns = 0

    def __call__(self):
        return self.ns


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def control_b(clock):
    return SystemControlB(clock)


def test_control_bits_read_back(control_b):
    """The low four bits are storage, the upper four are not writable."""
    control_b.write(0, 1, 0xFE)
    assert control_b.read(0, 1) & 0x0F == 0x0E
    assert control_b.read(0, 1) & 0xC0 == 0


def test_timer_2_output_rises_after_the_gate_opens(control_b, clock):
    """A TSC calibration loop sees bit 5 low, then high after 10 ms, and again when it starts anew."""
    for _ in range(2):
        control_b.write(0, 1, TIMER2_GATE)
        assert not control_b.read(0, 1) & TIMER2_OUT
        clock.ns += TIMER2_NS - 1
        assert not control_b.read(0, 1) & TIMER2_OUT
        clock.ns += 1
        assert control_b.read(0, 1) & TIMER2_OUT


def test_timer_2_output_is_low_while_the_gate_is_shut(control_b, clock):
    """Without the gate nothing counts."""
    clock.ns += 10 * TIMER2_NS
    assert not control_b.read(0, 1) & TIMER2_OUT


def test_refresh_bit_toggles(control_b, clock):
    """Bit 4 changes with every refresh period, which delay loops count."""
    seen = []
    for _ in range(6):
        seen.append(bool(control_b.read(0, 1) & REFRESH_TOGGLE))
        clock.ns += REFRESH_NS
    assert seen == [False, True] * 3


def test_refresh_bit_moves_with_the_host_clock():
    """With the real clock a guest that waits for the bit to change gets through."""
    device = SystemControlB()
    first = device.read(0, 1) & REFRESH_TOGGLE
    assert any(device.read(0, 1) & REFRESH_TOGGLE != first for _ in range(1_000_000))


def test_post_codes_are_kept_in_order_and_bounded():
    """The last codes are there for the crash report; the port reads back the newest."""
    device = PostCode()
    assert device.read(0, 1) == 0
    for code in range(100):
        device.write(0, 1, code)
    assert device.codes == list(range(100 - POST_HISTORY, 100))
    assert device.read(0, 1) == 99
    device.reset()
    assert device.codes == []


def test_a_repeated_post_code_is_kept_once():
    """Linux writes the port as a delay; that does not push the firmware's codes out."""
    device = PostCode()
    device.write(0, 1, 0x55)
    for _ in range(100):
        device.write(0, 1, 0)
    assert device.codes == [0x55, 0]


def test_fast_init_resets_and_a20_reads_back():
    """Bit 0 of port 0x92 is the reset, bit 1 the A20 gate."""
    device = SystemControlA()
    assert device.read(0, 1) == 0x02
    assert device.write(0, 1, 0x00) is None
    assert device.read(0, 1) == 0x00
    assert device.write(0, 1, 0x03) == Outcome.RESET
    device.reset()
    assert device.read(0, 1) == 0x02
