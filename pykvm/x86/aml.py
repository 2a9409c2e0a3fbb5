"""A small writer of AML, ACPI's byte code: every function returns the encoding of one term. Layer: x86.

A term is `bytes`; a table's definition block is the concatenation of its terms. Names are written as in ASL
(`\\_SB.PCI0`, `_CRS`), short segments are padded with underscores. A wrong name or a value that has no
encoding is a mistake of the caller and raises ValueError: nothing here ever sees a guest's data.

Source: ACPI specification 6.5, chapter 20 (AML) and 6.4 (resource descriptors), 19.3.4 (EISA identifiers).
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    AML: TypeAlias = bytes

ONES = (1 << 64) - 1
MAX_PKG_LENGTH = (1 << 28) - 1

_LEAD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_LATER = _LEAD | frozenset("0123456789")


# -- encoding (20.2.2, 20.2.4) -----------------------------------------------------------------------------


def name_string(path: str) -> bytes:
    """NameString: a path such as `_CRS`, `^PCI0.COM1` or `\\_SB`."""
    prefix_length = len(path) - len(path.lstrip("\\^"))
    prefix, rest = path[:prefix_length], path[prefix_length:]
    if "\\" in prefix and prefix != "\\":
        raise ValueError(f"AML name {path!r}: a root prefix stands alone and first")
    segments = [_segment(part, path) for part in rest.split(".")] if rest else []
    if not segments:
        return prefix.encode() + b"\x00"
    if len(segments) == 1:
        return prefix.encode() + segments[0]
    if len(segments) == 2:
        return prefix.encode() + b"\x2e" + b"".join(segments)
    if len(segments) > 255:
        raise ValueError(f"AML name of {len(segments)} segments; 255 are the most")
    return prefix.encode() + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def _segment(text: str, path: str) -> bytes:
    if not 1 <= len(text) <= 4 or text[0] not in _LEAD or not _LATER.issuperset(text):
        raise ValueError(f"AML name {path!r}: segment {text!r} is not 1 to 4 of A-Z, 0-9 and _")
    return text.ljust(4, "_").encode()


def pkg_length(body_length: int) -> bytes:
    """PkgLength for a body of `body_length` bytes: it counts its own 1 to 4 bytes as well (20.2.4)."""
    if body_length + 1 <= 0x3F:
        return bytes([body_length + 1])
    for extra in (1, 2, 3):
        total = body_length + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML package of {body_length} bytes; {MAX_PKG_LENGTH - 4} are the most")


def _package(opcode: bytes, body: bytes) -> bytes:
    return opcode + pkg_length(len(body)) + body


# -- data objects (20.2.3) ---------------------------------------------------------------------------------


def integer(value: int) -> AML:
    """The shortest encoding of an unsigned integer of at most 64 bits."""
    if not 0 <= value <= ONES:
        raise ValueError(f"AML integer {value:#x} is not an unsigned 64-bit value")
    if value in (0, 1):
        return bytes([value])  # ZeroOp, OneOp
    if value == ONES:
        return b"\xff"  # OnesOp: all ones, whatever the table's integer width
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << (8 * size):
            return bytes([prefix]) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> AML:
    """A NUL-terminated ASCII string."""
    data = text.encode("ascii")
    if 0 in data:
        raise ValueError(f"AML string {text!r} contains a NUL")
    return b"\x0d" + data + b"\x00"


def eisaid(text: str) -> AML:
    """An EISA identifier such as PNP0501 as a DWord: three letters of 5 bits each, four digits."""
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not all("A" <= each <= "Z" for each in letters):
        raise ValueError(f"EISA identifier {text!r} is not three capitals and four hexadecimal digits")
    vendor = 0
    for each in letters:
        vendor = vendor << 5 | ord(each) - 0x40
    return b"\x0c" + (vendor << 16 | int(digits, 16)).to_bytes(4, "big")


def package(*elements: AML) -> AML:
    """A package of at most 255 elements."""
    if len(elements) > 255:
        raise ValueError(f"AML package of {len(elements)} elements; 255 are the most")
    return _package(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> AML:
    """A buffer that holds `data`."""
    return _package(b"\x11", integer(len(data)) + data)


# -- named objects (20.2.5) --------------------------------------------------------------------------------


def name(path: str, value: AML) -> AML:
    """Name (path, value)."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: AML) -> AML:
    """Scope (path) { terms }."""
    return _package(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: AML) -> AML:
    """Device (path) { terms }."""
    return _package(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, *terms: AML, args: int = 0, serialized: bool = False) -> AML:
    """Method (path, args) { terms }."""
    if not 0 <= args <= 7:
        raise ValueError(f"AML method {path} with {args} arguments; 7 are the most")
    return _package(b"\x14", name_string(path) + bytes([args | serialized << 3]) + b"".join(terms))


def return_(value: AML) -> AML:
    """Return (value)."""
    return b"\xa4" + value


# -- resource descriptors (6.4) ----------------------------------------------------------------------------


def resource_template(*descriptors: bytes) -> AML:
    """ResourceTemplate () { descriptors }: a buffer closed by an end tag with the checksum (6.4.2.9)."""
    data = b"".join(descriptors) + b"\x79"
    return buffer(data + bytes([-sum(data) & 0xFF]))


def io(port: int, length: int, *, alignment: int = 1) -> bytes:
    """IO (Decode16, port, port, alignment, length): a fixed port range (6.4.2.5)."""
    return b"\x47\x01" + _word(port) + _word(port) + bytes([alignment, length])


def irq_no_flags(*irqs: int) -> bytes:
    """IRQNoFlags () { irqs }: ISA interrupts, edge-triggered and active high (6.4.2.1)."""
    if not irqs or not all(0 <= irq <= 15 for irq in irqs):
        raise ValueError(f"ISA interrupts {irqs}: need one or more of 0 to 15")
    return b"\x22" + _word(sum(1 << irq for irq in set(irqs)))


def memory32_fixed(base: int, length: int, *, writable: bool = True) -> bytes:
    """Memory32Fixed (ReadWrite or ReadOnly, base, length) (6.4.3.4)."""
    return b"\x86" + _word(9) + bytes([writable]) + _dword(base) + _dword(length)


def interrupt(*gsis: int, edge: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, ...) { gsis }: the extended descriptor, any GSI (6.4.3.6)."""
    if not 1 <= len(gsis) <= 255:
        raise ValueError(f"an interrupt descriptor of {len(gsis)} interrupts; 1 to 255 are allowed")
    flags = 1 | edge << 1 | active_low << 2 | shared << 3
    body = bytes([flags, len(gsis)]) + b"".join(_dword(gsi) for gsi in gsis)
    return b"\x89" + _word(len(body)) + body


_FIXED_RANGE = 0x0C  # _MIF and _MAF: both ends are fixed; positive decode; the device produces the range


def word_bus_number(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, fixed): the buses behind a host bridge (6.4.3.5.3)."""
    return b"\x88" + _address_space("<5H", (2, 0), first, last)


def word_io(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, fixed, EntireRange): ports that a host bridge forwards."""
    return b"\x88" + _address_space("<5H", (1, 0x03), first, last)


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory (ResourceProducer, fixed, NonCacheable, ReadWrite): MMIO that a host bridge forwards."""
    return b"\x87" + _address_space("<5I", (0, 0x01), first, last)


def _address_space(fields: str, flags: tuple[int, int], first: int, last: int) -> bytes:
    """Length and body of an address space descriptor; `flags` are its type and that type's flags."""
    kind, specific = flags
    body = bytes([kind, _FIXED_RANGE, specific]) + struct.pack(fields, 0, first, last, 0, last - first + 1)
    return _word(len(body)) + body


def _word(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _dword(value: int) -> bytes:
    return value.to_bytes(4, "little")
