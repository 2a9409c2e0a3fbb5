"""Packets of gdb's remote protocol: framing, escapes, checksums, and what a hostile peer makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.debug.gdbstub.control import aligned_pieces
from pykvm.debug.gdbstub.rsp import ACK, BAD, BREAK, MAX_PACKET, NAK, Framer, encode, unescape
from pykvm.errors import UsageError


@given(st.binary(max_size=300))
def test_whatever_is_encoded_comes_back(data: bytes) -> None:
    """Every payload survives the escapes, however the bytes arrive."""
    framer = Framer()
    items = [item for byte in encode(data) for item in framer.feed(bytes([byte]))]
    assert len(items) == 1
    assert isinstance(items[0], bytes)
    assert unescape(items[0]) == data


def test_a_known_packet() -> None:
    """The manual's example of a checksum, and the characters that must not stand in a packet."""
    assert encode(b"OK") == b"$OK#9a"
    assert encode(b"a#$}*") == b"$a}\x03}\x04}]}\x0a#" + b"%02x" % (sum(b"a}\x03}\x04}]}\x0a") & 0xFF)


def test_marks_between_packets() -> None:
    """Acknowledgements and interrupts are told apart from packets; noise is nothing."""
    assert list(Framer().feed(b"+\x03xyz\0$?#3f-")) == [ACK, BREAK, b"?", NAK]


@pytest.mark.parametrize("wire", [b"$?#40", b"$?#zz", b"$?##f", b"$" + b"a" * (MAX_PACKET + 1) + b"#00"])
def test_damaged_packets_are_refused(wire: bytes) -> None:
    """A wrong or senseless checksum and too much payload are BAD, and the next packet is good again."""
    assert list(Framer().feed(wire + b"$?#3f")) == [BAD, b"?"]


def test_half_a_packet_is_nothing_yet() -> None:
    """Neither half a payload nor half a checksum gives a packet."""
    framer = Framer()
    assert list(framer.feed(b"$qSup")) == []
    assert list(framer.feed(b"ported#3")) == []
    assert list(framer.feed(b"7")) == [b"qSupported"]


def test_an_endless_packet_costs_no_memory() -> None:
    """What is beyond the limit is counted out, not kept."""
    framer = Framer()
    list(framer.feed(b"$"))
    for _ in range(1000):
        assert list(framer.feed(b"a" * 65536)) == []
    assert framer._buffer is not None
    assert len(framer._buffer) == MAX_PACKET
    assert list(framer.feed(b"#00+")) == [BAD, ACK]


def test_an_escape_needs_a_byte() -> None:
    """Binary data that ends within an escape is refused."""
    with pytest.raises(ValueError, match="escape"):
        unescape(b"ab}")


@pytest.mark.parametrize(
    ("address", "length", "pieces"),
    [
        (0x1000, 8, [(0x1000, 8)]),
        (0x1001, 1, [(0x1001, 1)]),
        (0x1002, 6, [(0x1002, 2), (0x1004, 4)]),
        (0x1004, 24, [(0x1004, 4), (0x1008, 8), (0x1010, 8), (0x1018, 4)]),
    ],
)
def test_watched_ranges(address: int, length: int, pieces: list[tuple[int, int]]) -> None:
    """A range is watched in aligned pieces of 1, 2, 4 or 8 bytes."""
    assert aligned_pieces(address, length) == pieces


@pytest.mark.parametrize("length", [0, 33, 4096])
def test_what_four_registers_cannot_watch(length: int) -> None:
    """Nothing, or more than four pieces, is refused."""
    with pytest.raises(UsageError, match="debug registers"):
        aligned_pieces(0x1000, length)
