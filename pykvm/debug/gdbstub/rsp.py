"""Packets of GDB's remote serial protocol: framing, escapes, checksums. Layer: debug, plain data.

The peer may send anything: a packet that is too long or damaged costs no more than MAX_PACKET bytes of memory and is
refused with a `-`.

Source: GDB manual, appendix E "Remote Serial Protocol", sections Overview and Interrupts.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PACKET = 16384  # bytes of a packet's payload on the wire; what qSupported tells gdb

ACK, NAK, BREAK, BAD = "ack", "nak", "break", "bad"
_ESCAPE = 0x7D
_MARKS = {ord("+"): ACK, ord("-"): NAK, 0x03: BREAK}


class Framer:
    """Cuts a byte stream into packets."""

    def __init__(self) -> None:
        self._buffer: bytearray | None = None  # of the packet that is being received
        self._checksum = bytearray()
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[str | bytes]:
        """What `data` completes: a packet's payload as bytes; ACK, NAK, BREAK; BAD for a packet to be refused."""
        at = 0
        while at < len(data):
            if self._buffer is None:
                byte = data[at]
                at += 1
                if byte == ord("$"):
                    self._buffer, self._too_long = bytearray(), False
                elif byte in _MARKS:
                    yield _MARKS[byte]
            elif self._checksum:
                self._checksum.append(data[at])
                at += 1
                if len(self._checksum) == 3:
                    yield self._finish()
            else:
                at = self._take(data, at)

    def _take(self, data: bytes, at: int) -> int:
        """Payload up to the `#`, as much of it as there is."""
        assert self._buffer is not None
        end = data.find(b"#", at)
        piece = data[at : len(data) if end < 0 else end]
        room = MAX_PACKET - len(self._buffer)
        self._too_long |= len(piece) > room
        self._buffer += piece[:room]
        if end < 0:
            return len(data)
        self._checksum = bytearray(b"#")
        return end + 1

    def _finish(self) -> str | bytes:
        assert self._buffer is not None
        payload, self._buffer = bytes(self._buffer), None
        digits, self._checksum = bytes(self._checksum[1:]), bytearray()
        if self._too_long:
            return BAD
        try:
            return payload if int(digits, 16) == sum(payload) & 0xFF else BAD
        except ValueError:
            return BAD


def encode(payload: bytes) -> bytes:
    """A packet on the wire. `payload` is escaped here: binary data is welcome."""
    if any(special in payload for special in b"#$}*"):
        payload = b"".join(bytes([_ESCAPE, byte ^ 0x20]) if byte in b"#$}*" else bytes([byte]) for byte in payload)
    return b"$%s#%02x" % (payload, sum(payload) & 0xFF)


def unescape(data: bytes) -> bytes:
    """Binary data of a received packet. Raises ValueError when it ends in an escape."""
    if _ESCAPE not in data:
        return data
    out, rest = bytearray(), iter(data)
    for byte in rest:
        if byte != _ESCAPE:
            out.append(byte)
            continue
        escaped = next(rest, None)
        if escaped is None:
            raise ValueError("the data ends within an escape")
        out.append(escaped ^ 0x20)
    return bytes(out)
