"""The keyboard controller, driven as kernels drive it."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.i8042 import I8042

FULL, SYSTEM, COMMAND, UNLOCKED, AUX_DATA, TIMEOUT = 0x01, 0x04, 0x08, 0x10, 0x20, 0x40


class Guest:
    """Ports 0x60 and 0x64."""

    def __init__(self, irq):
        self.irq = irq
        self.core = I8042(irq)

    def command(self, value):
        return self.core.command.write(0, 1, value)

    def data(self, value):
        return self.core.data.write(0, 1, value)

    @property
    def status(self):
        return self.core.command.read(0, 1)

    def answer(self):
        """Read port 0x60, which must be full."""
        assert self.status & FULL
        return self.core.data.read(0, 1)

    def ask(self, command):
        self.command(command)
        return self.answer()


@pytest.fixture
def guest(wire):
    return Guest(wire)


def test_a_fresh_controller_is_idle_and_unlocked(guest):
    """Linux's probe first wants an empty buffer, and warns if the key lock is active."""
    assert guest.status == SYSTEM | UNLOCKED


def test_self_tests_pass(guest):
    """0xaa answers 0x55, the keyboard port test 0."""
    assert guest.ask(0xAA) == 0x55
    assert guest.ask(0xAB) == 0


def test_self_test_sets_the_system_flag_and_stops_the_keyboard(guest):
    """After 0xaa the flag is up and the keyboard clock is off; the rest of the configuration is kept."""
    guest.command(0x60)
    guest.data(0x41)
    guest.ask(0xAA)
    assert guest.status & SYSTEM
    assert guest.ask(0x20) == 0x75


@pytest.mark.parametrize(("command", "answer"), [(0xA4, 0xF1), (0xC0, 0x80), (0xE0, 0x00)])
def test_constant_answers(guest, command, answer):
    """No password, keyboard not inhibited, both test inputs low."""
    assert guest.ask(command) == answer


@pytest.mark.parametrize("command", [0x00, 0x1F, 0xA0, 0xA5, 0xA6, 0xA7, 0xAC, 0xCF, 0xD5, 0xEF])
def test_other_commands_give_no_answer(guest, command):
    """Unknown commands leave the output buffer empty, and the next data byte goes to the keyboard."""
    guest.command(command)
    assert not guest.status & FULL
    guest.data(0x00)
    assert guest.answer() == 0xFE


def test_talking_to_the_keyboard_enables_it(guest):
    """A data byte for the keyboard starts its clock; an argument of a command does not."""
    guest.command(0xAD)
    guest.command(0xD4)
    guest.data(0xF4)
    assert guest.ask(0x20) & 0x10
    guest.data(0xF4)
    guest.answer()
    assert not guest.ask(0x20) & 0x10


def test_configuration_byte_reads_back(guest):
    """What is written with 0x60 is read with 0x20, but for the port that is not there."""
    for value in (0x00, 0x45, 0x54):
        guest.command(0x60)
        guest.data(value)
        assert guest.ask(0x20) == value | 0x20
        assert bool(guest.status & SYSTEM) == bool(value & 0x04)


def test_ram_beyond_the_configuration_byte(guest):
    """The other 31 bytes of controller RAM are storage."""
    guest.command(0x7F)
    guest.data(0xA5)
    assert guest.ask(0x3F) == 0xA5


def test_keyboard_can_be_disabled_and_enabled(guest):
    """0xad and 0xae set and clear bit 4 of the configuration byte."""
    guest.command(0xAD)
    assert guest.ask(0x20) & 0x10
    guest.command(0xAE)
    assert not guest.ask(0x20) & 0x10


def test_linux_finds_no_auxiliary_port(guest):
    """The loop command answers as the keyboard and the port test fails: no mouse, without a time-out."""
    guest.command(0xD3)
    guest.data(0x5A)
    assert not guest.status & AUX_DATA
    assert guest.answer() == 0x5A
    assert guest.ask(0xA9) in (1, 2, 3, 4)


def test_enabling_the_auxiliary_port_has_no_effect(guest):
    """The other probe: after 0xa8 bit 5 is still set on a controller with one port."""
    guest.command(0xA8)
    assert guest.ask(0x20) & 0x20


@pytest.mark.parametrize("byte", [0xFF, 0xF2, 0xED, 0x00])
def test_the_absent_keyboard_times_out_at_once(guest, byte):
    """A byte for the keyboard is answered 0xfe with the time-out bit, which reading clears."""
    guest.data(byte)
    assert guest.status & (FULL | TIMEOUT) == FULL | TIMEOUT
    assert guest.answer() == 0xFE
    assert not guest.status & (FULL | TIMEOUT)


def test_the_absent_mouse_times_out_at_once(guest):
    """0xd4 sends to the auxiliary device, which is not there either."""
    guest.command(0xD4)
    guest.data(0xF4)
    assert guest.status & TIMEOUT
    assert guest.answer() == 0xFE


def test_interrupt_follows_the_output_buffer(guest):
    """Each byte in the buffer is an edge on IRQ 1 when the configuration byte enables it."""
    guest.command(0xD2)
    guest.data(0x1C)
    assert guest.irq.level
    guest.answer()
    assert not guest.irq.level
    guest.data(0xFF)
    guest.data(0xFF)
    assert guest.irq.edges == 3
    guest.command(0x60)
    guest.data(0x00)
    assert not guest.irq.level


def test_status_tells_command_from_data(guest):
    """Bit 3 says which port was written last."""
    guest.command(0xAE)
    assert guest.status & COMMAND
    guest.data(0xF4)
    assert not guest.status & COMMAND


@pytest.mark.parametrize("pulse", range(0xF0, 0x100))
def test_pulsing_bit_0_resets(guest, pulse):
    """0xfe is what kernels write; every pulse command with bit 0 clear pulls the reset line."""
    assert guest.command(pulse) == (None if pulse & 1 else Outcome.RESET)


def test_output_port(guest):
    """0xd1 sets A20 and resets when bit 0 is clear; 0xd0 reads A20 back."""
    assert guest.ask(0xD0) == 0xC3
    guest.data(0xFF)
    assert guest.ask(0xD0) == 0xD3  # bit 4: the output buffer was full
    guest.command(0xD1)
    assert guest.data(0xDD) is None
    assert guest.ask(0xD0) & 0x03 == 0x01
    guest.command(0xD1)
    assert guest.data(0xDE) == Outcome.RESET


def test_a20_commands(guest):
    """0xdd and 0xdf switch A20 without the output port."""
    guest.command(0xDD)
    assert not guest.ask(0xD0) & 0x02
    guest.command(0xDF)
    assert guest.ask(0xD0) & 0x02


def test_a_new_command_forgets_the_one_that_waited_for_data(guest):
    """After an abandoned 0xd1 a data byte goes to the keyboard, not to the reset line."""
    guest.command(0xD1)
    guest.command(0xAE)
    assert guest.data(0x00) is None
    assert guest.answer() == 0xFE


def test_reset_by_either_port(guest):
    """Both regions reset the one controller, lines included."""
    for region in (guest.core.data, guest.core.command):
        guest.data(0xFF)
        guest.command(0xAD)
        region.reset()
        assert (guest.status, guest.irq.level) == (SYSTEM | UNLOCKED, False)
        assert not guest.ask(0x20) & 0x10
        guest.core.data.read(0, 1)
