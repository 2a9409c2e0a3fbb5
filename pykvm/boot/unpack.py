"""The compressed kernel inside a bzImage, decompressed on the host piece by piece. Layer: boot.

The pieces go straight to their place in guest memory, so that no second copy of the kernel exists. Time and
memory are bounded by the size that the payload declares, which the caller holds against guest memory first; a
decoder's own memory is bounded by WINDOW_MAX.

Sources: Documentation/arch/x86/boot.rst (payload_offset); arch/x86/boot/compressed/Makefile (the size that is
appended to all formats but gzip, which ends in it by itself); lz4_Frame_format.md, "Legacy frame".
"""

from __future__ import annotations

import struct

from pykvm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from pykvm.boot.setup_header import SetupHeader

    Sink = Callable[[int, bytes | bytearray], None]
    Lz4Decoder = Callable[[memoryview], bytes | bytearray | None]

    class Decoder(Protocol):
        """bz2.BZ2Decompressor and lzma.LZMADecompressor."""

        @property
        def eof(self) -> bool: ...
        @property
        def needs_input(self) -> bool: ...
        def decompress(self, data: bytes | memoryview, max_length: int) -> bytes: ...


HEAD_SIZE = 64 << 10  # the first piece has at least so much (or everything): ELF and program headers are in it
PIECE_SIZE = 1 << 20
FEED_SIZE = 256 << 10
WINDOW_MAX = 128 << 20  # zstd -22 has 128 MiB, lzma -9 64 MiB, xz 32 MiB
LIBLZ4 = b"liblz4.so.1"
LZ4_BLOCK_SIZE = 8 << 20  # of every block of a legacy frame but the last
MAX_THREADS = 4

# as lib/decompress.c lists them; LZO is there to be named
_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x1f\x9e", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"BZh", "bzip2"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO", "lzo"),
    (b"\x7fELF", "none"),
)


class UnsupportedPayloadError(Exception):
    """The payload cannot be unpacked here, for the reason given; the kernel can still unpack itself."""


class CorruptPayloadError(Exception):
    """The payload is broken, for the reason given; the kernel could not unpack itself either."""


class Payload:
    """`data` compressed as `codec` says; `size` bytes when unpacked, as it declares."""

    __slots__ = ("codec", "data", "size")

    def __init__(self, codec: str, data: memoryview, size: int) -> None:
        self.codec = codec
        self.data = data
        self.size = size


def find_payload(header: SetupHeader) -> Payload:
    """Locate a bzImage's payload. ImageError if it is not all in the file."""
    offset, length = header.payload_offset, header.payload_length
    if not offset or length < 8:
        raise UnsupportedPayloadError("the header names no payload")
    code = header.code
    if offset + length > len(code):
        raise header.image.error(
            f"truncated: the payload ends at {offset + length:#x} of the code, the file at {len(code):#x}"
        )
    data = code[offset : offset + length]
    for magic, codec in _MAGICS:
        if data[: len(magic)] == magic:
            if codec == "lzo":
                raise UnsupportedPayloadError("lzo compression")
            size = len(data) if codec == "none" else struct.unpack_from("<I", data, length - 4)[0]
            return Payload(codec, data, size)
    raise UnsupportedPayloadError(f"unknown compression (magic {data[:4].hex()})")


def unpack(payload: Payload, open_sink: Callable[[bytes], Sink]) -> None:
    """Decompress `payload`. `open_sink(head)` sees the first bytes and returns `sink(offset, piece)`.

    Every byte, the head's too, goes to the sink once; pieces may come from several threads and in any order, and
    are the sink's only until it returns.
    CorruptPayloadError unless the payload holds exactly `payload.size` bytes.
    """
    if not payload.size:
        raise CorruptPayloadError("it declares a size of 0")
    try:
        unpacker = _unpack_lz4 if payload.codec == "lz4" else _unpack_stream
        total = unpacker(payload, open_sink)
    except ImportError as error:
        raise UnsupportedPayloadError(f"{payload.codec} needs the Python module {error.name}") from error
    if total != payload.size:
        raise CorruptPayloadError(f"it unpacks to {total} bytes instead of {payload.size}")


# -- formats that are one stream --------------------------------------------------------------------------


def _unpack_stream(payload: Payload, open_sink: Callable[[bytes], Sink]) -> int:
    decode = _DECODERS[payload.codec]
    sink: Sink | None = None
    pending = b""  # what came before the sink was opened
    total = 0
    for piece in decode(payload.data):
        total += len(piece)
        if total > payload.size:
            raise CorruptPayloadError(f"it unpacks to more than the {payload.size} bytes that it declares")
        if sink is None:
            pending += piece
            if len(pending) < HEAD_SIZE and total < payload.size:
                continue
            sink, piece = open_sink(pending), pending  # noqa: PLW2901 - the head is the first piece
        sink(total - len(piece), piece)
    return total


def _decode_none(data: memoryview) -> Iterator[bytes]:
    for at in range(0, len(data), PIECE_SIZE):
        yield bytes(data[at : at + PIECE_SIZE])


def _decode_gzip(data: memoryview) -> Iterator[bytes]:
    import zlib

    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        for at in range(0, len(data), FEED_SIZE):
            feed: bytes | memoryview = data[at : at + FEED_SIZE]
            while feed:
                yield decoder.decompress(feed, PIECE_SIZE)
                feed = decoder.unconsumed_tail
            if decoder.eof:
                return
        while piece := decoder.decompress(b"", PIECE_SIZE):
            yield piece
    except zlib.error as error:
        raise CorruptPayloadError(f"gzip: {error}") from error
    if not decoder.eof:
        raise CorruptPayloadError("gzip: truncated stream")


def _decode_lzma(data: memoryview) -> Iterator[bytes]:
    import lzma

    try:
        yield from _pump("lzma", lzma.LZMADecompressor(memlimit=2 * WINDOW_MAX), data)
    except lzma.LZMAError as error:
        raise CorruptPayloadError(f"lzma: {error}") from error


def _decode_bzip2(data: memoryview) -> Iterator[bytes]:
    import bz2

    try:
        yield from _pump("bzip2", bz2.BZ2Decompressor(), data)
    except (OSError, ValueError) as error:
        raise CorruptPayloadError(f"bzip2: {error}") from error


def _pump(name: str, decoder: Decoder, data: memoryview) -> Iterator[bytes]:
    at = 0
    while not decoder.eof:
        feed = data[at : at + FEED_SIZE] if decoder.needs_input else data[:0]
        if decoder.needs_input and not feed:
            raise CorruptPayloadError(f"{name}: truncated stream")
        at += len(feed)
        yield decoder.decompress(feed, PIECE_SIZE)


def _decode_zstd(data: memoryview) -> Iterator[bytes]:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
    try:
        # without the appended size, which the reader would take for another frame
        with decoder.stream_reader(data[:-4]) as reader:
            while piece := reader.read(PIECE_SIZE):
                yield piece
    except zstandard.ZstdError as error:
        raise CorruptPayloadError(f"zstd: {error}") from error


_DECODERS: dict[str, Callable[[memoryview], Iterator[bytes]]] = {
    "none": _decode_none,
    "gzip": _decode_gzip,
    "xz": _decode_lzma,
    "lzma": _decode_lzma,
    "bzip2": _decode_bzip2,
    "zstd": _decode_zstd,
}

# -- LZ4: independent blocks, hence threads -----------------------------------------------------------------


def _unpack_lz4(payload: Payload, open_sink: Callable[[bytes], Sink]) -> int:
    """A legacy frame: magic, then blocks of a 4-byte size and that many bytes, then the appended size."""
    blocks = _lz4_blocks(payload.data)
    last_size = payload.size - (len(blocks) - 1) * LZ4_BLOCK_SIZE
    if not 0 < last_size <= LZ4_BLOCK_SIZE:
        raise CorruptPayloadError(f"lz4: {payload.size} bytes are declared, there are {len(blocks)} blocks")

    def decode(decoder: Lz4Decoder, index: int) -> bytes | bytearray:
        piece = decoder(blocks[index])
        expected = LZ4_BLOCK_SIZE if index < len(blocks) - 1 else last_size
        if piece is None or len(piece) != expected:
            raise CorruptPayloadError(f"lz4: block {index} does not hold {expected} bytes")
        return piece

    decoder = _lz4_decoder()
    head = decode(decoder, 0)
    sink = open_sink(bytes(head[:HEAD_SIZE]))
    sink(0, head)
    todo = list(range(1, len(blocks)))

    def work() -> None:
        decoder = _lz4_decoder()
        while todo:
            try:
                index = todo.pop()
            except IndexError:  # another thread took the last one
                return
            sink(index * LZ4_BLOCK_SIZE, decode(decoder, index))

    _in_threads(work, len(todo))
    return payload.size


def _lz4_decoder() -> Lz4Decoder:
    """A function from a block to its bytes, None if it is corrupt or holds more than LZ4_BLOCK_SIZE.

    The system's liblz4 where there is one: it decodes into a buffer that is used again, which the next call
    overwrites. The Python package allocates and copies 8 MiB for every block, and the page faults cost more than
    the decoding.
    """
    symbol = lib.pk_dynamic_symbol(LIBLZ4, b"LZ4_decompress_safe")
    if symbol == ffi.NULL:
        return _lz4_package_decoder()
    decompress = ffi.cast("int(*)(const char *, char *, int, int)", symbol)
    buffer = bytearray(LZ4_BLOCK_SIZE)
    target = ffi.from_buffer(buffer)

    def decode(block: memoryview) -> bytes | bytearray | None:
        size = decompress(ffi.from_buffer(block), target, len(block), LZ4_BLOCK_SIZE)
        if size == LZ4_BLOCK_SIZE:
            return buffer
        return bytes(memoryview(buffer)[:size]) if size >= 0 else None

    return decode


def _lz4_package_decoder() -> Lz4Decoder:
    from lz4.block import LZ4BlockError, decompress

    def decode(block: memoryview) -> bytes | None:
        try:
            piece: bytes = decompress(block, uncompressed_size=LZ4_BLOCK_SIZE)
        except LZ4BlockError:
            return None
        return piece

    return decode


def _lz4_blocks(data: memoryview) -> list[memoryview]:
    """The compressed blocks. The last four bytes are the appended size, no block."""
    blocks: list[memoryview] = []
    at, end = 4, len(data) - 4
    while at < end:
        if end - at < 4:
            raise CorruptPayloadError("lz4: truncated block header")
        size = struct.unpack_from("<I", data, at)[0]
        if size == 0 or size > end - at - 4:
            raise CorruptPayloadError(f"lz4: block {len(blocks)} has {size} bytes, {end - at - 4} are left")
        blocks.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return blocks


def _in_threads(work: Callable[[], None], jobs: int) -> None:
    """Run `work` in this thread and, with enough `jobs`, in others too; raises what any of them raised."""
    import _thread
    import os

    errors: list[BaseException] = []

    def guarded(done: _thread.LockType) -> None:
        try:
            work()
        except BaseException as error:  # it is raised in the caller's thread
            errors.append(error)
        finally:
            done.release()

    running: list[_thread.LockType] = []
    for _ in range(min(jobs, len(os.sched_getaffinity(0)), MAX_THREADS) - 1):
        done = _thread.allocate_lock()
        done.acquire()
        try:
            _thread.start_new_thread(guarded, (done,))
        except RuntimeError:  # no more threads: this one does it all
            break
        running.append(done)
    try:
        work()
    finally:
        for done in running:
            done.acquire()
    if errors:
        raise errors[0]
