"""The user-space I/O APIC against its data sheet and what the kernel's local APICs need from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.ioapic import LEVEL, LOGICAL, MASKED, REMOTE_IRR, IoApic

IOREGSEL, IOWIN, EOI = 0x00, 0x10, 0x40
FIXED, LOWEST, SMI, RESERVED, NMI, INIT, EXTINT = 0 << 8, 1 << 8, 2 << 8, 3 << 8, 4 << 8, 5 << 8, 7 << 8
ACTIVE_LOW = 1 << 13


class Host:
    """The I/O APIC with what it sends, in order: messages and route changes."""

    def __init__(self):
        self.sent = []
        self.log = []
        self.ioapic = IoApic(self.send, self.routes_changed)

    def send(self, address, data):
        self.sent.append((address, data))
        self.log.append(("msi", data & 0xFF))

    def routes_changed(self, routes):
        assert routes == self.ioapic.routes
        self.log.append(("routes", tuple(pin for pin, message in enumerate(routes) if message)))

    def __getitem__(self, register):
        self.ioapic.write(IOREGSEL, 4, register)
        return self.ioapic.read(IOWIN, 4)

    def __setitem__(self, register, value):
        self.ioapic.write(IOREGSEL, 4, register)
        self.ioapic.write(IOWIN, 4, value)

    def program(self, pin, low, destination=0):
        """As a kernel does it: destination first, then the half with the mask."""
        self[0x11 + 2 * pin] = destination << 24
        self[0x10 + 2 * pin] = low

    def entry(self, pin):
        return self[0x10 + 2 * pin]


@pytest.fixture
def host():
    return Host()


# -- registers ---------------------------------------------------------------------------------------------


def test_version_says_24_pins_and_an_eoi_register(host):
    """Version 0x20, highest entry 23."""
    assert host[0x01] == 0x00170020


def test_id_has_four_bits_and_shows_in_arbitration(host):
    """The ID is writable, its other bits are reserved; arbitration ID follows it; version does not change."""
    host[0x00] = 0xFFFFFFFF
    host[0x01] = 0
    assert (host[0x00], host[0x02], host[0x01]) == (0x0F000000, 0x0F000000, 0x00170020)


def test_every_entry_is_masked_after_reset(host):
    """All pins start masked."""
    assert [host.entry(pin) for pin in range(24)] == [MASKED] * 24


@pytest.mark.parametrize("pin", [0, 11, 23])
def test_entry_halves_keep_their_writable_bits(host, pin):
    """Delivery status, remote IRR and the reserved bits cannot be written; each half is by itself."""
    host[0x11 + 2 * pin] = 0xFFFFFFFF
    assert host.entry(pin) == MASKED
    host[0x10 + 2 * pin] = 0xFFFFFFFF
    assert (host.entry(pin), host[0x11 + 2 * pin]) == (0x1AFFF, 0xFF000000)
    host[0x11 + 2 * pin] = 0
    assert host.entry(pin) == 0x1AFFF


@pytest.mark.parametrize("index", [0x03, 0x0F, 0x40, 0xFF])
def test_registers_that_are_not_there(host, index):
    """Behind the table there is nothing: reads give 0, writes do nothing."""
    host[index] = 0xFFFFFFFF
    assert host[index] == 0


def test_index_reads_back(host):
    """IOREGSEL is eight bits wide."""
    host.ioapic.write(IOREGSEL, 4, 0xFFFFFF12)
    assert host.ioapic.read(IOREGSEL, 4) == 0x12


def test_narrow_and_wide_reads(host):
    """Parts of the window read as parts of the register, wide reads have zeros above it."""
    host.ioapic.write(IOREGSEL, 1, 0x01)
    assert host.ioapic.read(IOWIN, 1) == 0x20
    assert host.ioapic.read(IOWIN + 2, 1) == 0x17
    assert host.ioapic.read(IOWIN + 2, 2) == 0x0017
    assert host.ioapic.read(IOWIN, 8) == 0x00170020
    host[0x10] = 0x1FFFF
    assert [host.ioapic.read(IOWIN + part, 1) for part in range(4)] == [0xFF, 0xAF, 0x01, 0x00]


# -- delivery ----------------------------------------------------------------------------------------------


def test_edge_sends_once_for_each_rise(host):
    """An edge-triggered pin sends at the rising edge, not while it stays high or falls."""
    host.program(4, 0x34, destination=3)
    for level in (True, True, False, True):
        host.ioapic.set_irq(4, level)
    assert host.sent == [(0xFEE03000, 0x0034)] * 2
    assert not host.entry(4) & REMOTE_IRR


def test_masked_edges_are_lost(host):
    """An edge on a masked pin is neither delivered nor held pending (data sheet, bit 16)."""
    host.program(4, MASKED | 0x34)
    host.ioapic.set_irq(4, True)
    host.program(4, 0x34)
    assert host.sent == []


def test_level_waits_for_its_eoi(host):
    """A level-triggered pin sends once, sets remote IRR, and sends again at EOI while it is still asserted."""
    host.program(9, LEVEL | ACTIVE_LOW | 0x51)
    host.ioapic.set_irq(9, True)
    host.ioapic.set_irq(9, False)
    host.ioapic.set_irq(9, True)
    assert host.sent == [(0xFEE00000, 0xC051)]
    assert host.entry(9) & REMOTE_IRR
    host.ioapic.eoi(0x51)
    assert len(host.sent) == 2
    host.ioapic.set_irq(9, False)
    host.ioapic.eoi(0x51)
    assert len(host.sent) == 2
    assert not host.entry(9) & REMOTE_IRR


def test_level_asserted_while_masked_is_delivered_at_unmask(host):
    """A level is still there when the mask goes."""
    host.program(9, MASKED | LEVEL | 0x51)
    host.ioapic.set_irq(9, True)
    assert host.sent == []
    host.program(9, LEVEL | 0x51)
    assert host.sent == [(0xFEE00000, 0xC051)]


def test_eoi_ends_every_pin_of_the_vector_and_no_other(host):
    """Pins may share a vector; EOI of another vector changes nothing."""
    for pin, vector in ((5, 0x60), (6, 0x60), (7, 0x61)):
        host.program(pin, LEVEL | vector)
        host.ioapic.set_irq(pin, True)
        host.ioapic.set_irq(pin, False)
    host.ioapic.eoi(0x60)
    assert [bool(host.entry(pin) & REMOTE_IRR) for pin in (5, 6, 7)] == [False, False, True]


def test_eoi_register(host):
    """Version 0x20 has a register for directed EOI, which is write-only."""
    host.program(9, LEVEL | 0x51)
    host.ioapic.set_irq(9, True)
    host.ioapic.write(EOI, 4, 0x50)
    assert len(host.sent) == 1
    host.ioapic.write(EOI, 4, 0x51)
    assert len(host.sent) == 2
    assert host.ioapic.read(EOI, 4) == 0


def test_switching_to_edge_and_back_ends_the_interrupt(host):
    """How kernels send an EOI to an I/O APIC without the register."""
    host.program(9, LEVEL | 0x51)
    host.ioapic.set_irq(9, True)
    host.program(9, MASKED | 0x51)
    assert not host.entry(9) & REMOTE_IRR
    host.program(9, LEVEL | 0x51)
    assert len(host.sent) == 2


def test_destination_and_modes_reach_the_message(host):
    """Destination in address bits 19:12, logical in bit 2, delivery mode in data bits 10:8."""
    host.program(1, LOGICAL | LOWEST | 0xFE, destination=0xA5)
    host.ioapic.set_irq(1, True)
    assert host.sent == [(0xFEEA5004, 0x01FE)]


@pytest.mark.parametrize("mode", [SMI, NMI, INIT])
def test_smi_nmi_and_init_are_edges(host, mode):
    """No local APIC ends these, so the trigger bit must not make them wait for an EOI."""
    host.program(2, LEVEL | mode)
    for level in (True, False, True):
        host.ioapic.set_irq(2, level)
    assert host.sent == [(0xFEE00000, mode)] * 2
    assert not host.entry(2) & REMOTE_IRR


@pytest.mark.parametrize("mode", [RESERVED, 6 << 8, EXTINT])
@pytest.mark.parametrize("trigger", [0, LEVEL])
def test_reserved_modes_and_extint_send_nothing(host, mode, trigger):
    """Without an 8259 there is no vector for ExtINT."""
    host.program(0, mode | trigger | 0x20)
    host.ioapic.set_irq(0, True)
    assert (host.sent, host.ioapic.routes[0]) == ([], None)


@pytest.mark.parametrize("pin", [-1, 24, 1 << 40])
def test_pins_that_are_not_there(host, pin):
    """A GSI beyond the pins is not this device's."""
    host.ioapic.set_irq(pin, True)
    assert host.sent == []


# -- routes ------------------------------------------------------------------------------------------------


def test_routes_name_the_unmasked_pins(host):
    """A pin has a route while it may deliver, with the message that set_irq would send."""
    host.program(4, 0x34, destination=1)
    assert host.ioapic.routes[4] == (0xFEE01000, 0x34)
    assert [message for pin, message in enumerate(host.ioapic.routes) if pin != 4] == [None] * 23
    host.program(4, MASKED | 0x34, destination=1)
    assert host.ioapic.routes == (None,) * 24
    assert [kind for kind, _ in host.log] == ["routes", "routes"]


def test_masked_writes_do_not_disturb_the_kernel(host):
    """Kernels program all pins masked first: no route changes, no call (it costs a grace period)."""
    for pin in range(24):
        host.program(pin, MASKED | 0x30 + pin, destination=pin)
    assert host.log == []


def test_routes_come_before_the_first_message(host):
    """The kernel has to know the vector before it is delivered, else its EOI would be missed."""
    host.ioapic.set_irq(9, True)
    host.program(9, LEVEL | 0x51)
    assert host.log == [("routes", (9,)), ("msi", 0x51)]


def test_a_pin_masked_in_service_keeps_its_route_until_eoi(host):
    """Threaded handlers mask first and end later; without the route that EOI would not come out."""
    host.program(9, LEVEL | 0x51)
    host.ioapic.set_irq(9, True)
    host.program(9, MASKED | LEVEL | 0x51)
    assert host.ioapic.routes[9]
    host.ioapic.set_irq(9, False)
    host.ioapic.eoi(0x51)
    assert host.ioapic.routes[9] is None
    assert not host.entry(9) & REMOTE_IRR


def test_reset_masks_and_keeps_the_lines(host):
    """After reset nothing is routed; a line that its device still asserts is seen when the pin is unmasked."""
    host.program(9, LEVEL | 0x51)
    host.ioapic.set_irq(9, True)
    host[0x00] = 0x01000000
    host.ioapic.reset()
    assert (host.ioapic.routes, host.entry(9), host[0x00]) == ((None,) * 24, MASKED, 0)
    host.program(9, LEVEL | 0x51)
    assert len(host.sent) == 2


def test_routes_are_optional():
    """A machine that polls `routes` needs no callback."""
    ioapic = IoApic(lambda *_: None)
    ioapic.write(IOREGSEL, 4, 0x10)
    ioapic.write(IOWIN, 4, 0x33)
    assert ioapic.routes[0] == (0xFEE00000, 0x33)


# -- hostile guests ----------------------------------------------------------------------------------------

OFFSETS = st.one_of(st.sampled_from([IOREGSEL, IOWIN, EOI]), st.integers(0, 0xFFF))
SELECTS = st.tuples(st.just("write"), st.just(IOREGSEL), st.just(4), st.integers(0, 0x45))
# Few vectors and destinations, so that interrupts and EOIs meet.
ENTRIES = st.builds(
    lambda vector, mode, level, masked: ("write", IOWIN, 4, vector | mode << 8 | level | masked),
    st.integers(0x30, 0x32),
    st.sampled_from([0, 0, 0, 1, 4, 7]),
    st.sampled_from([0, LEVEL]),
    st.sampled_from([0, MASKED]),
)
NOISE = st.tuples(st.just("write"), OFFSETS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 0xFFFFFFFF))
LINES = st.tuples(st.just("line"), st.integers(0, 23), st.booleans())
EOIS = st.tuples(st.just("eoi"), st.integers(0x30, 0x32))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(SELECTS, ENTRIES, NOISE, LINES, EOIS), max_size=80))
def test_invariants(operations):
    """Messages only ever go out by a route that the host knows; level pins wait; no operation sends without bound."""
    host = Host()
    ioapic = host.ioapic
    for verb, *arguments in operations:
        del host.sent[:]
        if verb == "write":
            offset, size, value = arguments
            ioapic.write(offset, size, value & (1 << 8 * size) - 1)
            assert 0 <= ioapic.read(offset, size) < 1 << 8 * size
        elif verb == "line":
            ioapic.set_irq(*arguments)
        else:
            ioapic.eoi(*arguments)
        assert len(host.sent) <= 24
        assert all(message in ioapic.routes for message in host.sent)
        for pin, entry in enumerate(ioapic._entries):
            if entry & REMOTE_IRR:
                assert entry & LEVEL
                assert ioapic.routes[pin] is not None
            elif ioapic._lines[pin] and not entry & MASKED and ioapic.routes[pin]:
                assert not ioapic.routes[pin][1] & LEVEL  # an asserted, unmasked level is always in service
