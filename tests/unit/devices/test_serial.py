"""The 16550A against its data sheet, and against what drivers do with it."""

from __future__ import annotations

import pytest

from pykvm.devices import serial as uart
from pykvm.devices.serial import (
    CABLE,
    FCR,
    IER,
    IIR,
    LCR,
    LSR,
    MCR,
    MSR,
    RBR,
    SCR,
    THR,
    Serial,
)

OUT2 = uart.MCR_OUT2
LOOP = uart.MCR_LOOP
RDI, THRI, RLSI, MSI = uart.IER_RDI, uart.IER_THRI, uart.IER_RLSI, uart.IER_MSI
FIFO_ON, CLEAR_RX = uart.FCR_ENABLE, uart.FCR_CLEAR_RX
TRIGGER_8 = 0x80


class Guest:
    """A driver's view of one UART, with the host's ends of it."""

    def __init__(self, irq, **options):
        self.irq = irq
        self.sent = bytearray()
        self.calls = 0
        self.serial = Serial(irq, self.sent.extend, **options)
        self.serial.on_rx_space = self._on_space

    def _on_space(self):
        self.calls += 1

    def out(self, register, value):
        assert self.serial.write(register, 1, value) is None

    def inb(self, register):
        return self.serial.read(register, 1)

    @property
    def cause(self):
        return self.inb(IIR) & 0x0F

    def read_all(self):
        data = bytearray()
        while self.inb(LSR) & uart.LSR_DR:
            data.append(self.inb(RBR))
        return bytes(data)


@pytest.fixture
def guest(wire):
    return Guest(wire)


@pytest.fixture
def listening(guest):
    """FIFOs on, trigger level 8, receive interrupt enabled and gated through."""
    guest.out(FCR, FIFO_ON | TRIGGER_8)
    guest.out(IER, RDI)
    guest.out(MCR, OUT2)
    return guest


def test_reset_values(guest):
    """The registers read after reset as table III of the data sheet says."""
    assert [guest.inb(register) for register in (IER, IIR, LCR, MCR, LSR)] == [0, 1, 0, 0, 0x60]
    assert guest.inb(MSR) == CABLE
    assert guest.irq.changes == []


def test_output_reaches_the_sink_in_order(guest):
    """Every byte written to THR is sent at once."""
    for byte in b"hello\xff\x00":
        guest.out(THR, byte)
    assert guest.sent == b"hello\xff\x00"


@pytest.mark.parametrize("value", [0x00, 0x5A, 0xA5, 0xFF])
def test_scratch_and_line_control_hold_any_value(guest, value):
    """SCR and LCR are plain storage."""
    guest.out(SCR, value)
    guest.out(LCR, value)
    assert (guest.inb(SCR), guest.inb(LCR)) == (value, value)


def test_reserved_bits_read_as_zero(guest):
    """IER has four bits and MCR five; probes for later UARTs rely on it."""
    guest.out(IER, 0xFF)
    guest.out(MCR, 0xFF)
    assert (guest.inb(IER), guest.inb(MCR)) == (0x0F, 0x1F)


def test_divisor_latch_hides_data_and_interrupt_enable(guest):
    """With DLAB the first two registers are the divisor; nothing is sent and IER keeps its value."""
    guest.out(IER, RDI)
    guest.out(LCR, 0x83)
    guest.out(0, 0x34)
    guest.out(1, 0x12)
    assert (guest.inb(0), guest.inb(1)) == (0x34, 0x12)
    guest.out(LCR, 0x03)
    assert (guest.inb(IER), guest.sent) == (RDI, b"")


def test_status_registers_ignore_writes(guest):
    """LSR and MSR are read-only."""
    guest.out(LSR, 0xFF)
    guest.out(MSR, 0xFF)
    assert (guest.inb(LSR), guest.inb(MSR)) == (0x60, CABLE)


def test_fifo_enable_shows_in_iir(guest):
    """IIR bits 7:6 tell a 16550A with working FIFOs from its ancestors."""
    guest.out(FCR, FIFO_ON)
    assert guest.inb(IIR) == 0xC1
    guest.out(FCR, 0)
    assert guest.inb(IIR) == 0x01


# -- receiving ---------------------------------------------------------------------------------------------


def test_received_bytes_come_out_in_order(listening):
    """What the host sends is what the guest reads, and DR follows the FIFO."""
    assert listening.serial.receive(b"abc") == 3
    assert listening.inb(LSR) == 0x61
    assert listening.read_all() == b"abc"
    assert listening.inb(LSR) == 0x60


def test_reading_an_empty_receiver_gives_zero(guest):
    """RBR without data is no error."""
    assert guest.inb(RBR) == 0


@pytest.mark.parametrize(("code", "level"), list(enumerate(uart.RX_TRIGGERS)))
def test_receive_interrupt_at_the_trigger_level(wire, code, level):
    """At the trigger level the cause is received data; no more is taken than that."""
    guest = Guest(wire)
    guest.out(FCR, FIFO_ON | code << 6)
    guest.out(IER, RDI)
    guest.out(MCR, OUT2)
    assert guest.serial.receive(bytes(20)) == level
    assert guest.cause == uart.IIR_RX_DATA
    assert wire.level


def test_data_below_the_trigger_level_interrupts_as_timeout(listening):
    """A single key press raises the character time-out interrupt."""
    listening.serial.receive(b"x")
    assert listening.cause == uart.IIR_TIMEOUT
    assert listening.irq.level
    listening.inb(RBR)
    assert listening.cause == uart.IIR_NONE
    assert not listening.irq.level


def test_a_handler_that_takes_one_character_per_edge_gets_all(listening):
    """Each character read with more behind it makes a new edge, at the trigger level and below."""
    assert listening.serial.receive(b"12345678") == 8
    got = bytearray()
    handled = 0
    while handled < listening.irq.edges:
        handled += 1
        got.append(listening.inb(RBR))
    assert got == b"12345678"


def test_sixteen_bytes_need_two_rounds_and_one_call(listening):
    """The host is told when the FIFO has run empty, once for each refusal."""
    assert listening.serial.receive(b"0123456789") == 8
    listening.inb(RBR)
    assert listening.calls == 0
    assert listening.read_all() == b"1234567"
    assert listening.calls == 1
    assert listening.serial.receive(b"89") == 2
    assert listening.read_all() == b"89"
    assert listening.calls == 1


def test_without_fifo_one_byte_at_a_time(wire):
    """A 16450 driver sees one character per interrupt."""
    guest = Guest(wire)
    guest.out(IER, RDI)
    guest.out(MCR, OUT2)
    assert guest.serial.receive(b"ab") == 1
    assert (guest.inb(IIR), guest.inb(RBR), guest.calls) == (uart.IIR_RX_DATA, ord("a"), 1)
    assert not wire.level
    assert guest.serial.receive(b"b") == 1
    assert wire.edges == 2


def test_clearing_the_receive_fifo(listening):
    """FCR bit 1 empties the FIFO and ends its interrupt."""
    listening.serial.receive(b"abc")
    listening.out(FCR, FIFO_ON | CLEAR_RX | TRIGGER_8)
    assert (listening.inb(LSR), listening.cause, listening.irq.level) == (0x60, uart.IIR_NONE, False)


def test_switching_the_fifos_empties_them(listening):
    """Changing FCR bit 0 clears the FIFOs."""
    listening.serial.receive(b"abc")
    listening.out(FCR, 0)
    assert listening.inb(LSR) == 0x60


# -- when the sender waits ---------------------------------------------------------------------------------


def test_typed_ahead_input_survives_a_driver_that_resets_the_fifo(guest):
    """The sequence of Linux's 8250 driver, from probe to open, with bytes waiting all the time: none is lost."""
    waiting = bytearray(b"ls -l\n")

    def feed():
        del waiting[: guest.serial.receive(bytes(waiting))]

    feed()
    for fcr in (0x01, 0x07, 0x00):
        guest.out(FCR, fcr)
        guest.out(THR, ord("."))  # the console prints in between, polling LSR once per character
        guest.inb(LSR)
        feed()
        guest.inb(RBR)
        guest.inb(IIR)
        guest.inb(MSR)
    guest.out(FCR, FIFO_ON | TRIGGER_8)
    guest.out(IER, RDI | RLSI)
    assert guest.calls == 1
    feed()
    assert guest.read_all() == b"ls -l\n"
    assert not waiting


def test_a_guest_that_only_polls_gets_input(guest):
    """Polling LSR twice in a row is listening, without any interrupt enabled."""
    assert guest.serial.receive(b"k") == 0
    assert [guest.inb(LSR), guest.inb(LSR)] == [0x60, 0x60]
    assert guest.calls == 1
    assert guest.serial.receive(b"k") == 1
    assert guest.read_all() == b"k"


def test_a_guest_that_only_prints_is_not_listening(guest):
    """One LSR read for each character written is waiting for the transmitter."""
    guest.serial.receive(b"k")
    for _ in range(10):
        guest.inb(LSR)
        guest.out(THR, ord("x"))
    assert (guest.calls, guest.serial.receive(b"k")) == (0, 0)


def test_other_interrupts_are_no_listening(guest):
    """Only the receive interrupt tells the sender to start."""
    guest.out(IER, THRI | RLSI | MSI)
    assert guest.serial.receive(b"k") == 0


def test_polls_with_other_accesses_between_are_no_listening(guest):
    """Whatever register comes between two LSR reads, they are not in a row."""
    guest.serial.receive(b"k")
    for register in (RBR, IER, IIR, LCR, MCR, MSR, SCR):
        guest.inb(LSR)
        guest.inb(register)
        guest.inb(LSR)
        guest.out(register, 0)
    assert guest.calls == 0


def test_nothing_is_taken_in_loopback(listening):
    """In loopback the receiver is disconnected from the cable; the sender hears when it is back."""
    listening.out(MCR, OUT2 | LOOP)
    assert listening.serial.receive(b"a") == 0
    listening.out(MCR, OUT2)
    assert listening.calls == 1
    assert listening.serial.receive(b"a") == 1


# -- interrupts --------------------------------------------------------------------------------------------


def test_out2_gates_the_line(listening):
    """Without OUT2 an interrupt is pending in IIR but does not reach the line."""
    listening.out(MCR, 0)
    listening.serial.receive(b"a")
    assert (listening.cause, listening.irq.level) == (uart.IIR_TIMEOUT, False)
    listening.out(MCR, OUT2)
    assert listening.irq.level


def test_the_gate_can_be_left_out(wire):
    """A guest that never sets OUT2 gets its interrupts when the gate is switched off."""
    guest = Guest(wire, out2_gates_irq=False)
    guest.out(IER, RDI)
    guest.serial.receive(b"a")
    assert wire.level


def test_enabling_thre_interrupts_at_once_and_iir_acknowledges(guest):
    """THR is empty, so ETBEI raises the interrupt; reading IIR clears it; disabling and enabling raises it again."""
    guest.out(MCR, OUT2)
    guest.out(IER, THRI)
    assert guest.irq.level
    assert guest.cause == uart.IIR_THRE
    assert not guest.irq.level
    assert guest.cause == uart.IIR_NONE
    guest.out(IER, 0)
    guest.out(IER, THRI)
    assert guest.cause == uart.IIR_THRE


def test_rewriting_ier_does_not_raise_thre_again(guest):
    """Only the change of ETBEI counts."""
    guest.out(IER, THRI)
    assert guest.cause == uart.IIR_THRE
    guest.out(IER, THRI | RDI)
    assert guest.cause == uart.IIR_NONE


def test_every_byte_sent_makes_a_thre_edge(guest):
    """Interrupt-driven output advances by edges, also when the handler never reads IIR."""
    guest.out(MCR, OUT2)
    guest.out(IER, THRI)
    for byte in b"abc":
        guest.out(THR, byte)
    assert guest.irq.edges == 4
    assert guest.sent == b"abc"


def test_interrupt_priorities(guest):
    """With all four causes pending IIR shows them in the order of table IV, each acknowledged in its own way."""
    guest.out(FCR, FIFO_ON)
    guest.out(MCR, LOOP)
    guest.inb(MSR)
    guest.out(IER, RDI | THRI | RLSI | MSI)
    for byte in range(17):
        guest.out(THR, byte)  # the 17th overruns
    guest.out(MCR, LOOP | uart.MCR_RTS)
    assert guest.cause == uart.IIR_LINE
    assert guest.inb(LSR) & uart.LSR_OE
    assert guest.cause == uart.IIR_RX_DATA
    assert guest.read_all() == bytes(range(16))
    assert guest.cause == uart.IIR_THRE
    assert guest.cause == uart.IIR_MODEM
    assert guest.inb(MSR) == uart.MSR_CTS | uart.MSR_DCTS
    assert guest.cause == uart.IIR_NONE


def test_reading_iir_acknowledges_thre_only_when_it_is_shown(guest):
    """A THRE interrupt behind a receive interrupt is still there after IIR was read."""
    guest.out(FCR, FIFO_ON)
    guest.out(IER, RDI | THRI)
    guest.serial.receive(b"a")
    assert guest.cause == uart.IIR_RX_DATA
    guest.inb(RBR)
    assert guest.cause == uart.IIR_THRE


@pytest.mark.parametrize("enabled", [RDI, THRI, RLSI, MSI])
def test_only_enabled_causes_are_shown(guest, enabled):
    """With everything pending, one enable bit shows one cause."""
    guest.out(FCR, FIFO_ON)
    guest.out(MCR, LOOP)
    for byte in range(17):
        guest.out(THR, byte)
    guest.out(IER, enabled)
    shown = {RDI: uart.IIR_RX_DATA, THRI: uart.IIR_THRE, RLSI: uart.IIR_LINE, MSI: uart.IIR_MODEM}
    assert guest.cause == shown[enabled]


# -- errors, break, loopback -------------------------------------------------------------------------------


def test_overrun_with_fifo_keeps_the_old_characters(guest):
    """The 17th character is lost, and OE is shown once."""
    guest.out(FCR, FIFO_ON)
    guest.out(MCR, LOOP)
    for byte in range(17):
        guest.out(THR, byte)
    assert guest.inb(LSR) == 0x60 | uart.LSR_OE | uart.LSR_DR
    assert guest.inb(LSR) == 0x60 | uart.LSR_DR
    assert guest.read_all() == bytes(range(16))


def test_overrun_without_fifo_keeps_the_new_character(guest):
    """A 16450's RBR is overwritten."""
    guest.out(MCR, LOOP)
    guest.out(THR, 1)
    guest.out(THR, 2)
    assert guest.inb(LSR) & uart.LSR_OE
    assert guest.inb(RBR) == 2


def test_break_is_shown_when_its_character_is_next(listening):
    """BI belongs to a character: LSR bit 7 announces it, BI appears at the top of the FIFO, once."""
    listening.out(IER, RDI | RLSI)
    listening.serial.receive(b"a")
    assert listening.serial.receive_break()
    assert listening.inb(LSR) == 0x60 | uart.LSR_DR | uart.LSR_FIFO_ERROR
    assert listening.inb(RBR) == ord("a")
    assert listening.cause == uart.IIR_LINE
    assert listening.inb(LSR) == 0x60 | uart.LSR_DR | uart.LSR_BI | uart.LSR_FIFO_ERROR
    assert listening.inb(LSR) == 0x60 | uart.LSR_DR
    assert listening.inb(RBR) == 0


def test_break_is_not_heard_in_loopback(guest):
    """Loopback disconnects the receiver."""
    guest.out(MCR, LOOP)
    assert not guest.serial.receive_break()
    assert guest.inb(LSR) == 0x60


def test_loopback_echoes_and_sends_nothing(guest):
    """What is written in loopback is received, and does not reach the cable."""
    guest.out(MCR, LOOP)
    guest.out(THR, 0xAE)
    assert (guest.inb(RBR), guest.sent) == (0xAE, b"")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (uart.MCR_RTS, uart.MSR_CTS),
        (uart.MCR_DTR, uart.MSR_DSR),
        (uart.MCR_OUT1, uart.MSR_RI),
        (uart.MCR_OUT2, uart.MSR_DCD),
    ],
)
def test_loopback_connects_modem_outputs_to_inputs(guest, output, line):
    """Each MCR output drives its MSR input in loopback; Linux's probe (RTS and OUT2) sees 0x90."""
    guest.out(MCR, LOOP | output)
    assert guest.inb(MSR) & 0xF0 == line


def test_modem_deltas(guest):
    """Changes set the delta bits until MSR is read; RI counts its trailing edge only."""
    guest.out(MCR, LOOP)
    assert guest.inb(MSR) == uart.MSR_DCTS | uart.MSR_DDSR | uart.MSR_DDCD
    guest.out(MCR, LOOP | uart.MCR_OUT1)
    assert guest.inb(MSR) == uart.MSR_RI
    guest.out(MCR, LOOP)
    assert guest.inb(MSR) == uart.MSR_TERI
    assert guest.inb(MSR) == 0


def test_reset_returns_everything_to_power_on(listening):
    """After reset the registers, the FIFO and the line are as new."""
    listening.serial.receive(b"abc")
    listening.out(SCR, 1)
    listening.serial.reset()
    assert [listening.inb(register) for register in (IER, IIR, LCR, MCR, LSR)] == [0, 1, 0, 0, 0x60]
    assert (listening.inb(SCR), listening.inb(MSR), listening.irq.level) == (0, CABLE, False)


def test_wide_accesses_are_byte_cycles(guest):
    """A 16-bit write at offset 0 is THR and IER; a 16-bit read at 4 is MCR and LSR."""
    guest.serial.write(0, 2, THRI << 8 | ord("z"))
    assert (guest.sent, guest.inb(IER)) == (b"z", THRI)
    assert guest.serial.read(4, 2) == 0x6000
