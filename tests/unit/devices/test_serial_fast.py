"""The UART's fast path makes no difference: differential tests of three ways through the same operations."""

from __future__ import annotations

from device_wire import Wire
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.serial import FCR, IER, LCR, LSR, LSR_IDLE, MCR, THR, Serial


class Ring:
    """The C side's part: two switches and a ring of bytes."""

    def __init__(self):
        self.tx = self.lsr = False
        self.bytes = bytearray()
        self.switched = []

    def enable_tx(self, on):
        self.switched.append(("tx", on))
        self.tx = on

    def enable_lsr(self, on):
        self.switched.append(("lsr", on))
        self.lsr = on

    def drain(self):
        data = bytes(self.bytes)
        self.bytes.clear()
        return data


class Direct:
    """No fast path, and the class's own short cuts closed before each access."""

    def __init__(self):
        self.irq = Wire()
        self.sent = bytearray()
        self.told = 0
        self.serial = self.make()
        self.serial.on_rx_space = self.tell

    def make(self):
        return Serial(self.irq, self.sent.extend)

    def tell(self):
        self.told += 1

    def write(self, offset, value):
        self.serial._plain_tx = self.serial._plain_lsr = False
        self.serial.write(offset, 1, value)

    def read(self, offset):
        self.serial._plain_tx = self.serial._plain_lsr = False
        return self.serial.read(offset, 1)

    def observe(self):
        """All that guest and host can see, once the ring is empty."""
        self.serial.flush()
        return bytes(self.sent), tuple(self.irq.changes), self.told


class Abridged(Direct):
    """No fast path, short cuts as they come."""

    def write(self, offset, value):
        self.serial.write(offset, 1, value)

    def read(self, offset):
        return self.serial.read(offset, 1)


class Fast(Direct):
    """With a ring in front, as the C side does it."""

    def make(self):
        self.ring = Ring()
        return Serial(self.irq, self.sent.extend, fast=self.ring)

    def write(self, offset, value):
        if offset == THR and self.ring.tx:
            self.ring.bytes.append(value)
        else:
            self.serial.write(offset, 1, value)

    def read(self, offset):
        if offset == LSR and self.ring.lsr:
            return LSR_IDLE
        return self.serial.read(offset, 1)


BYTES = st.integers(0, 255)
# Values that matter are likelier than noise: otherwise most runs never leave DLAB or loopback.
LIKELY = {IER: (0, 1, 2, 7), FCR: (0, 1, 3, 0xC1, 0x81), LCR: (0x03, 0x83), MCR: (0, 0x08, 0x0B, 0x1B)}
WRITES = st.one_of(
    st.tuples(st.just("write"), st.just(THR), BYTES),
    st.sampled_from([("write", offset, value) for offset, values in LIKELY.items() for value in values]),
    st.tuples(st.just("write"), st.integers(0, 7), BYTES),
)
READS = st.tuples(st.just("read"), st.one_of(st.integers(0, 7), st.just(LSR)))
HOST = st.one_of(
    st.tuples(st.just("receive"), st.binary(max_size=20)),
    st.sampled_from([("receive_break",), ("reset",), ("flush",)]),
)


def perform(side, operation):
    """Do one operation on one side; its visible result."""
    verb, *arguments = operation
    if verb in ("read", "write"):
        return getattr(side, verb)(*arguments)
    return getattr(side.serial, verb)(*arguments)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(WRITES, READS, HOST), max_size=60))
def test_fast_path_is_invisible(operations):
    """Results, output, interrupt edges and calls to the host agree step by step with and without short cuts."""
    sides = [Direct(), Abridged(), Fast()]
    for operation in operations:
        direct, abridged, fast = (perform(side, operation) for side in sides)
        assert direct == abridged == fast
        observed = [side.observe() for side in sides] if operation[0] != "write" else []
        assert all(each == observed[0] for each in observed)
    assert sides[0].observe() == sides[1].observe() == sides[2].observe()


def test_switches_follow_their_conditions():
    """Each switch is thrown exactly when its condition changes, and both are on at reset."""
    side = Fast()
    ring = side.ring
    assert ring.switched == [("lsr", True), ("tx", True)]
    steps = [
        ((LCR, 0x83), [("tx", False)]),
        ((LCR, 0x03), [("tx", True)]),
        ((IER, 0x02), [("tx", False)]),
        ((IER, 0x01), [("tx", True)]),
        ((MCR, 0x18), [("tx", False)]),
        ((THR, 0x55), [("lsr", False)]),
        ((MCR, 0x08), [("tx", True)]),
    ]
    for (offset, value), expected in steps:
        ring.switched.clear()
        side.write(offset, value)
        assert ring.switched == expected
    ring.switched.clear()
    assert side.read(0) == 0x55
    assert ring.switched == [("lsr", True)]


def test_received_data_closes_the_lsr_short_cut_before_the_interrupt():
    """A handler on another vCPU must not be answered with the LSR from before its interrupt."""
    ring = Ring()
    seen = []

    class Watch(Wire):
        def set(self, level):
            seen.append((level, ring.lsr))

    serial = Serial(Watch(), lambda _: None, fast=ring)
    serial.write(IER, 1, 0x01)
    serial.write(MCR, 1, 0x08)
    seen.clear()
    serial.receive(b"a")
    assert seen == [(True, False)]


def test_ring_is_drained_before_python_sends():
    """Bytes that C took come first, also at reset and when the short cut closes."""
    side = Fast()
    side.write(THR, ord("a"))
    side.serial.write(THR, 1, ord("b"))  # as C hands over when the ring is full
    assert side.sent == b"ab"
    side.write(THR, ord("c"))
    side.write(IER, 0x02)
    assert side.sent == b"abc"
    side.write(IER, 0x00)
    side.write(THR, ord("d"))
    side.serial.reset()
    assert side.sent == b"abcd"


def test_waiting_input_closes_both_short_cuts():
    """To see whether a guest polls, its accesses have to come to Python while input waits."""
    side = Fast()
    assert side.serial.receive(b"x") == 0
    assert (side.ring.tx, side.ring.lsr) == (False, False)
    side.read(LSR)
    side.read(LSR)
    assert (side.ring.tx, side.ring.lsr, side.told) == (True, True, 1)
