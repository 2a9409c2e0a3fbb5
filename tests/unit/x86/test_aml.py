"""The AML writer against encodings worked out from the specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.x86 import aml


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a 02"),
        (0xFF, "0a ff"),
        (0x100, "0b 00 01"),
        (0xFFFF, "0b ff ff"),
        (0x10000, "0c 00 00 01 00"),
        (0xFFFF_FFFF, "0c ff ff ff ff"),
        (1 << 32, "0e 00 00 00 00 01 00 00 00"),
        ((1 << 64) - 1, "ff"),
    ],
)
def test_integer_takes_the_shortest_encoding(value: int, encoding: str) -> None:
    """Each width of integer begins exactly where the one before ends."""
    assert aml.integer(value) == bytes.fromhex(encoding)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_outside_64_bits_is_refused(value: int) -> None:
    """There is no encoding for it."""
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(value)


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """(total length, bytes of the PkgLength), as the specification's 20.2.4 decodes it."""
    extra = data[0] >> 6
    if extra == 0:
        return data[0] & 0x3F, 1
    total = data[0] & 0xF
    for index in range(extra):
        total |= data[1 + index] << (4 + 8 * index)
    return total, 1 + extra


@pytest.mark.parametrize(
    ("body", "width"),
    [
        (0, 1),
        (62, 1),
        (63, 2),
        (0xFFF - 2, 2),
        (0xFFF - 1, 3),
        (0xFFFFF - 3, 3),
        (0xFFFFF - 2, 4),
        (0xFFFFFFF - 4, 4),
    ],
)
def test_pkg_length_grows_at_the_right_sizes(body: int, width: int) -> None:
    """The length counts itself, and one byte more is used only when the total no longer fits."""
    assert decode_pkg_length(aml.pkg_length(body)) == (body + width, width)


@given(st.integers(0, 0xFFFFFFF - 4))
def test_pkg_length_decodes_to_body_plus_itself(body: int) -> None:
    """Any encodable body length round-trips."""
    encoded = aml.pkg_length(body)
    assert decode_pkg_length(encoded) == (body + len(encoded), len(encoded))


def test_pkg_length_over_28_bits_is_refused() -> None:
    """A package cannot be longer than its length field."""
    with pytest.raises(ValueError, match="are the most"):
        aml.pkg_length(0xFFFFFFF - 3)


@pytest.mark.parametrize(
    ("path", "encoding"),
    [
        ("_HID", b"_HID"),
        ("RTC", b"RTC_"),
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("^^PCI0", b"^^PCI0"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB.PCI0.COM1", b"\\\x2f\x03_SB_PCI0COM1"),
        ("", b"\0"),
    ],
)
def test_name_string_encodes_paths(path: str, encoding: bytes) -> None:
    """Prefixes stay, segments are padded, two and more segments have their own prefix."""
    assert aml.name_string(path) == encoding


@pytest.mark.parametrize(
    "path", ["abcd", "TOOLONG", "1ABC", "A..B", ".A", "A.", "^\\A", "\\\\A", "A B", ".".join(["A"] * 256)]
)
def test_name_string_refuses_what_is_no_name(path: str) -> None:
    """A mistyped name fails in the builder, not in the guest's interpreter."""
    with pytest.raises(ValueError, match="AML name"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("PNP0501", "0c 41 d0 05 01"), ("PNP0A03", "0c 41 d0 0a 03"), ("PNP0C0F", "0c 41 d0 0c 0f")],
)
def test_eisaid_compresses_as_iasl_does(text: str, encoding: str) -> None:
    """Three letters of five bits and four digits, most significant byte first."""
    assert aml.eisaid(text) == bytes.fromhex(encoding)


@pytest.mark.parametrize("text", ["PNP", "pnp0501", "PNP05011", "PNP05G1", "LNRO0005"])
def test_eisaid_refuses_other_identifiers(text: str) -> None:
    """ACPI identifiers with four letters are strings, never EISA identifiers."""
    with pytest.raises(ValueError):
        aml.eisaid(text)


def test_string_is_nul_terminated_and_refuses_a_nul_inside() -> None:
    """An embedded NUL would cut the string short."""
    assert aml.string("LNRO0005") == b"\x0dLNRO0005\0"
    with pytest.raises(ValueError, match="NUL"):
        aml.string("A\0B")


def test_containers_hold_their_terms() -> None:
    """Scope, device, method, package and buffer: opcode, length, name or count, body."""
    assert aml.scope("\\_SB", b"\x00") == b"\x10\x07\\_SB_\x00"
    assert aml.device("COM1", b"\x00") == b"\x5b\x82\x06COM1\x00"
    assert aml.method("_STA", aml.return_(aml.integer(0xF))) == b"\x14\x09_STA\x00\xa4\x0a\x0f"
    assert aml.method("_DSM", args=4, serialized=True) == b"\x14\x06_DSM\x0c"
    assert aml.package(aml.integer(0), aml.integer(5)) == b"\x12\x05\x02\x00\x0a\x05"
    assert aml.buffer(b"ab") == b"\x11\x05\x0a\x02ab"
    assert aml.name("_UID", aml.integer(1)) == b"\x08_UID\x01"


def test_limits_of_packages_and_methods() -> None:
    """A package counts its elements in a byte, a method its arguments in three bits."""
    assert aml.package(*[aml.integer(0)] * 255)[3] == 255
    with pytest.raises(ValueError, match="255"):
        aml.package(*[aml.integer(0)] * 256)
    with pytest.raises(ValueError, match="7 are the most"):
        aml.method("FOO", args=8)


@pytest.mark.parametrize(
    ("descriptor", "encoding"),
    [
        (aml.io(0x3F8, 8), "47 01 f803 f803 01 08"),
        (aml.irq_no_flags(4), "22 1000"),
        (aml.irq_no_flags(3, 9), "22 0802"),
        (aml.memory32_fixed(0xD000_0000, 0x1000), "86 0900 01 000000d0 00100000"),
        (aml.memory32_fixed(0xD000_0000, 0x1000, writable=False), "86 0900 00 000000d0 00100000"),
        (aml.interrupt(16), "89 0600 01 01 10000000"),
        (aml.interrupt(16, 17, edge=True, active_low=True, shared=True), "89 0a00 0f 02 10000000 11000000"),
        (aml.word_bus_number(0, 0), "88 0d00 02 0c 00 0000 0000 0000 0000 0100"),
        (aml.word_io(0xD00, 0xFFFF), "88 0d00 01 0c 03 0000 000d ffff 0000 00f3"),
        (aml.dword_memory(0xE000_0000, 0xFEBF_FFFF), "87 1700 00 0c 01 00000000 000000e0 ffffbffe 00000000 0000c01e"),
    ],
)
def test_resource_descriptors(descriptor: bytes, encoding: str) -> None:
    """Each descriptor as the specification's chapter 6.4 lays it out."""
    assert descriptor == bytes.fromhex(encoding)


@pytest.mark.parametrize("irqs", [(), (16,), (-1,)])
def test_irq_descriptor_knows_only_isa_interrupts(irqs: tuple[int, ...]) -> None:
    """The small descriptor is a mask of sixteen bits."""
    with pytest.raises(ValueError, match="ISA interrupts"):
        aml.irq_no_flags(*irqs)


def test_interrupt_descriptor_needs_an_interrupt() -> None:
    """An empty list of interrupts has no meaning."""
    with pytest.raises(ValueError, match="1 to 255"):
        aml.interrupt()


def test_resource_template_sums_to_zero() -> None:
    """The end tag's checksum makes the template's bytes sum to zero."""
    template = aml.resource_template(aml.io(0x70, 2), aml.irq_no_flags(8))
    data = template[template.index(b"\x47") :]
    assert data[-2] == 0x79
    assert sum(data) & 0xFF == 0
