"""Payloads of every compression, sound and hostile."""

from __future__ import annotations

import struct
import sys
import threading
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import CODECS, LZ4_BLOCK, MIB, compress, lz4_legacy, make_bzimage, make_image

from pykvm.boot import unpack as module
from pykvm.boot.setup_header import SetupHeader
from pykvm.boot.unpack import LIBLZ4, CorruptPayloadError, Payload, UnsupportedPayloadError, find_payload, unpack
from pykvm.errors import ImageError

TEXT = bytes(range(256)) * 1000 + b"the end"


def collect(payload: Payload) -> bytes:
    """What the payload unpacks to, put together as a sink gets it."""
    out = bytearray(payload.size)
    seen = bytearray(payload.size)

    def sink(offset: int, piece: bytes) -> None:
        assert not any(seen[offset : offset + len(piece)]), "a byte came twice"
        seen[offset : offset + len(piece)] = b"\1" * len(piece)
        out[offset : offset + len(piece)] = piece

    def open_sink(head: bytes) -> Any:
        assert len(head) >= min(payload.size, module.HEAD_SIZE)
        return sink

    unpack(payload, open_sink)
    assert all(seen)
    return bytes(out)


def payload_of(data: bytes) -> Payload:
    """The payload that a bzImage around `data` declares."""
    return find_payload(SetupHeader(make_image(make_bzimage(data))))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [8, 70_000, 3 * MIB + 17])
def test_round_trip(codec: str, size: int) -> None:
    """Every compression that a kernel can have gives back its bytes, whatever their number."""
    data = b"\x7fELF" + (TEXT * (size // len(TEXT) + 1))[: size - 4]
    payload = payload_of(compress(codec, data))
    assert payload.codec == codec
    assert collect(payload) == data


@pytest.mark.parametrize("library", [LIBLZ4, b"no-such-library.so"])
@pytest.mark.parametrize("size", [LZ4_BLOCK - 1, LZ4_BLOCK, LZ4_BLOCK + 1, 4 * LZ4_BLOCK])
def test_lz4_block_borders(size: int, library: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of exactly 8 MiB and a last one of any size get where they belong, by liblz4 and by the package."""
    monkeypatch.setattr("pykvm.boot.unpack.LIBLZ4", library)
    data = struct.pack("<I", 7) * (size // 4 + 1)
    data = data[: size - 4] + b"last"
    assert collect(payload_of(compress("lz4", data))) == data


def test_lz4_without_a_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, the caller's does it all."""

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    data = bytes(3 * LZ4_BLOCK)
    assert collect(payload_of(compress("lz4", data))) == data


def test_lz4_error_in_another_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrupt block is reported whichever thread decodes it, and no thread is left behind."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    data = compress("lz4", bytes(6 * LZ4_BLOCK))
    broken = bytearray(data)
    size = struct.unpack_from("<I", data, 4)[0]
    broken[4 + 4 + size + 4] = 0xFF  # the first token of the second block
    before = threading.active_count()
    with pytest.raises(CorruptPayloadError, match="lz4: block 1"):
        collect(payload_of(bytes(broken)))
    assert threading.active_count() == before


@pytest.mark.parametrize("codec", CODECS[:-1])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_stream(codec: str, keep: float) -> None:
    """A stream that ends early is corrupt, though its size is still declared at the end."""
    data = compress(codec, TEXT)
    cut = data[: int(len(data) * keep)] + struct.pack("<I", len(TEXT))
    with pytest.raises(CorruptPayloadError):
        collect(payload_of(cut))


@pytest.mark.parametrize("codec", CODECS[:-1])
@pytest.mark.parametrize("declared", [0, 1, len(TEXT) - 1, len(TEXT) + 1, 0xFFFF_FFFF])
def test_wrong_size(codec: str, declared: int) -> None:
    """A payload that unpacks to more or less than it declares is refused."""
    data = compress(codec, TEXT)[:-4] + struct.pack("<I", declared)
    payload = payload_of(data)
    assert payload.size == declared
    with pytest.raises(CorruptPayloadError):
        unpack(payload, lambda head: lambda offset, piece: None)


@pytest.mark.parametrize("codec", ["gzip", "xz", "lzma", "bzip2", "zstd"])
def test_bomb_ends_at_the_declared_size(codec: str) -> None:
    """A payload that would unpack to 64 MiB is given up as soon as it passes the size that it declares."""
    data = compress(codec, bytes(64 * MIB))[:-4] + struct.pack("<I", 1 * MIB)
    payload = payload_of(data)
    got = 0

    def sink(offset: int, piece: bytes) -> None:
        nonlocal got
        got = max(got, offset + len(piece))

    tracemalloc.start()
    with pytest.raises(CorruptPayloadError, match="more than"):
        unpack(payload, lambda head: sink)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got <= 1 * MIB
    assert peak < 40 * MIB


def test_lzma_that_wants_gigabytes_is_refused() -> None:
    """A dictionary of 4 GiB in the header does not make the host allocate it."""
    header = b"\x5d" + struct.pack("<IQ", 0xFFFF_FFFF, 1 << 30)
    with pytest.raises((CorruptPayloadError, UnsupportedPayloadError)):
        collect(payload_of(header.replace(b"\x5d\xff", b"\x5d\x00", 1) + bytes(100) + struct.pack("<I", 100)))


def test_zstd_window_is_bounded() -> None:
    """A frame whose window is larger than any kernel's is refused, not allocated."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + struct.pack("<I", 1 | 8 << 3)[:3] + b"x"
    with pytest.raises(CorruptPayloadError, match="zstd"):
        collect(payload_of(frame + bytes(20) + struct.pack("<I", 8)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89LZO\0\r\n\x1a\n" + bytes(64), "lzo compression"),
        (b"PK\x03\x04" + bytes(64), r"unknown compression \(magic 504b0304\)"),
        (b"\x02\x21\x4c\x19" + bytes(64), "unknown compression"),
    ],
)
def test_unsupported(data: bytes, reason: str) -> None:
    """Compressions that cannot be undone here are told apart from broken files, with the reason."""
    with pytest.raises(UnsupportedPayloadError, match=reason):
        collect(payload_of(data + struct.pack("<I", 100)))


@pytest.mark.parametrize(("codec", "package"), [("lz4", "lz4.block"), ("zstd", "zstandard")])
def test_missing_package(codec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the Python package the payload is unsupported, not broken, and the package is named."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("pykvm.boot.unpack.LIBLZ4", b"no-such-library.so")
    with pytest.raises(UnsupportedPayloadError, match=package):
        collect(payload_of(compress(codec, TEXT)))


def test_no_payload_in_the_header() -> None:
    """Images such as memtest86+ name none."""
    with pytest.raises(UnsupportedPayloadError, match="names no payload"):
        find_payload(SetupHeader(make_image(make_bzimage())))


@pytest.mark.parametrize("fields", [{"payload_length": 0xFFFF_FFFF}, {"payload_offset": 0xFFFF_FFFF}])
def test_payload_outside_the_file(fields: dict[str, int]) -> None:
    """Offsets and lengths are held against the file."""
    header = SetupHeader(make_image(make_bzimage(compress("gzip", TEXT), **fields)))
    with pytest.raises(ImageError, match="kernel: truncated: the payload ends at"):
        find_payload(header)


def test_payload_needs_protocol_2_08() -> None:
    """Before 2.08 the bytes at payload_offset are something else."""
    header = SetupHeader(make_image(make_bzimage(compress("gzip", TEXT), version=0x207)))
    with pytest.raises(UnsupportedPayloadError):
        find_payload(header)


@pytest.mark.parametrize(
    "blocks",
    [
        b"",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff" + bytes(8),
        b"\x01\0\0\0\0" * 1000,
        b"\x05\0\0",
        struct.pack("<I", 6) + b"\x1f\x00\x00\x00\xff\xff",
    ],
)
def test_lz4_hostile_blocks(blocks: bytes) -> None:
    """Empty, endless, overlong and truncated blocks are corrupt."""
    with pytest.raises(CorruptPayloadError, match="lz4"):
        collect(payload_of(b"\x02\x21\x4c\x18" + blocks + struct.pack("<I", 100)))


def test_gzip_crc_is_checked() -> None:
    """One flipped bit of a stored block fails gzip's own checksum."""
    packer = zlib.compressobj(0, zlib.DEFLATED, 31)
    data = bytearray(packer.compress(TEXT) + packer.flush())
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptPayloadError, match="gzip"):
        collect(payload_of(bytes(data)))


SMALL = {codec: compress(codec, b"\x7fELF" + bytes(range(256)) * 20) for codec in CODECS}


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(CODECS))
def test_mutated_payloads_fail_cleanly(data: st.DataObject, codec: str) -> None:
    """Whatever bytes change, the answer is the right number of bytes or one of the two errors."""
    mutated = bytearray(SMALL[codec])
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(mutated) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        mutated[at] = value
    try:
        payload = payload_of(bytes(mutated))
        payload.size = min(payload.size, 64 * MIB)
        assert len(collect(payload)) == payload.size
    except (CorruptPayloadError, UnsupportedPayloadError):
        pass


def test_lz4_legacy_is_what_the_tool_writes() -> None:
    """The tests' own frames have the layout of a real one: magic, size, block."""
    frame = lz4_legacy(b"abcabcabcabcabcabcabcabc")
    assert frame[:4].hex() == "02214c18"
    assert struct.unpack_from("<I", frame, 4)[0] == len(frame) - 8
