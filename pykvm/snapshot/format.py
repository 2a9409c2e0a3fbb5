"""The snapshot file: its layout, and reading and writing it. Layer: live objects.

    0       header, one page: struct HEADER, then zeros
    4096    state: a JSON document, then the bytes that it refers to as {"$": [offset, length]}; zeros up to a page
    ...     memory: each slot as a page-aligned region with holes where it is zero, to be mapped as it is, then each
            disk's overlay, with holes where it is as the disk's image; or, when the header says so, zstd frames one
            after another

All integers are little-endian. The header's checksum covers its page, and holds the state's; the state lists every
piece of memory with a checksum (CRC-32 of ISO 3309, as zlib's). What no piece covers is a hole, or zeros.
"""

from __future__ import annotations

import json
import os
import struct
import zlib

from pykvm.core.memimage import file_data
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PAGE = 4096
MAGIC = b"PYKVMSNP"
VERSION = 1
# magic, version, flags, state length (with padding), state CRC, file size, id, parent's id, parent's state CRC, own CRC
HEADER = struct.Struct("<8sIIQIxxxxQ16s16sII")
COMPRESSED = 1 << 0
KNOWN_FLAGS = COMPRESSED
MAX_STATE = 1 << 30
PIECE = 1 << 20  # bytes of memory under one checksum, at most
NO_PARENT = bytes(16)


class Header:
    """What the first page says."""

    def __init__(
        self,
        *,
        flags: int,
        state_length: int,
        state_crc: int,
        size: int,
        identity: bytes,
        parent: bytes = NO_PARENT,
        parent_crc: int = 0,
    ) -> None:
        self.flags = flags
        self.state_length = state_length
        self.state_crc = state_crc
        self.size = size
        self.identity = identity
        self.parent = parent
        self.parent_crc = parent_crc

    def pack(self) -> bytes:
        """The page."""
        fields = (MAGIC, VERSION, self.flags, self.state_length, self.state_crc, self.size)
        page = HEADER.pack(*fields, self.identity, self.parent, self.parent_crc, 0).ljust(PAGE, b"\0")
        return page[: HEADER.size - 4] + struct.pack("<I", zlib.crc32(page)) + page[HEADER.size :]


def read_header(fd: int, path: str) -> Header:
    """Read and check the first page. Raises SnapshotError."""
    page = os.pread(fd, PAGE, 0)
    if page[:8] != MAGIC:
        raise SnapshotError(f"{path}: not a snapshot of pykvm")
    if len(page) < PAGE:
        raise SnapshotError(f"{path}: truncated: it ends inside its header")
    _, version, flags, length, state_crc, size, identity, parent, parent_crc, crc = HEADER.unpack_from(page)
    blank = page[: HEADER.size - 4] + bytes(4) + page[HEADER.size :]
    if version > VERSION:
        raise SnapshotError(f"{path}: written by a newer pykvm (format {version}; this one reads {VERSION})")
    if zlib.crc32(blank) != crc:
        raise SnapshotError(f"{path}: damaged: the header's checksum is wrong")
    if version != VERSION or flags & ~KNOWN_FLAGS or length > MAX_STATE or length % PAGE:
        raise SnapshotError(f"{path}: format {version} with flags {flags:#x} is not readable")
    real = os.fstat(fd).st_size
    if real != size:
        what = "truncated" if real < size else "longer than it says"
        raise SnapshotError(f"{path}: {what}: {real} bytes instead of {size}")
    return Header(
        flags=flags, state_length=length, state_crc=state_crc, size=size, identity=identity, parent=parent,
        parent_crc=parent_crc,
    )  # fmt: skip


def read_state(fd: int, path: str, header: Header) -> dict[str, Any]:
    """The state document, its bytes filled in. Raises SnapshotError."""
    raw = os.pread(fd, header.state_length, PAGE)
    if len(raw) != header.state_length or zlib.crc32(raw) != header.state_crc:
        raise SnapshotError(f"{path}: damaged: the state's checksum is wrong")
    try:
        text_length, blob_at = struct.unpack_from("<QQ", raw)
        document = json.loads(raw[16 : 16 + text_length])
        filled = _fill(document, raw, blob_at)
    except (ValueError, RecursionError, struct.error, KeyError, TypeError) as error:
        raise SnapshotError(f"{path}: its state cannot be read: {error}") from None
    if not isinstance(filled, dict):
        raise SnapshotError(f"{path}: its state is no document")
    return filled


def encode_state(document: dict[str, Any]) -> bytes:
    """The state section, padded to a page."""
    blobs = bytearray()
    text = json.dumps(_empty(document, blobs), separators=(",", ":")).encode()
    blob_at = (16 + len(text) + 15) // 16 * 16
    raw = (struct.pack("<QQ", len(text), blob_at) + text).ljust(blob_at, b"\0") + blobs
    return raw + bytes(-len(raw) % PAGE)


def _empty(value: Any, blobs: bytearray) -> Any:
    """`value` with each bytes moved into `blobs`."""
    if isinstance(value, bytes):
        blobs += value
        return {"$": [len(blobs) - len(value), len(value)]}
    if isinstance(value, dict):
        return {key: _empty(each, blobs) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_empty(each, blobs) for each in value]
    return value


def _fill(value: Any, raw: bytes, blob_at: int) -> Any:
    if isinstance(value, list):
        return [_fill(each, raw, blob_at) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$"}:
        offset, length = value["$"]
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise ValueError("a reference to bytes is malformed")
        if blob_at + offset + length > len(raw):
            raise ValueError("a reference to bytes leads outside")
        return raw[blob_at + offset : blob_at + offset + length]
    return {key: _fill(each, raw, blob_at) for key, each in value.items()}


def check_pieces(fd: int, path: str, pieces: list[tuple[int, int, int]], start: int) -> None:
    """Read all memory in the file once: (file offset, length, CRC) each; the rest from `start` on has to be zero."""
    at = start
    for offset, length, crc in sorted(pieces):
        _check_zero(fd, path, at, offset)
        if zlib.crc32(os.pread(fd, length, offset)) != crc:
            raise SnapshotError(f"{path}: damaged: the checksum of the memory at byte {offset} is wrong")
        at = offset + length
    _check_zero(fd, path, at, os.fstat(fd).st_size)


def _check_zero(fd: int, path: str, start: int, end: int) -> None:
    for low, high in file_data(fd, start, end) if start < end else ():
        for at in range(low, high, PIECE):
            data = os.pread(fd, min(PIECE, high - at), at)
            if data.count(0) != len(data):
                raise SnapshotError(f"{path}: damaged: there is data at byte {at} where none belongs")
