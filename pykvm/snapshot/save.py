"""Writing a snapshot to a file. Layer: live objects.

The file is written beside its final name, synced, and renamed over it: whoever dies in between leaves the old one.
"""

from __future__ import annotations

import os
import zlib

from pykvm.core.memimage import MERGE, apart
from pykvm.errors import SnapshotError
from pykvm.snapshot.describe import describe, layers_of
from pykvm.snapshot.format import COMPRESSED, NO_PARENT, PAGE, PIECE, Header, encode_state
from pykvm.snapshot.take import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pykvm.core.machine import Machine
    from pykvm.core.memimage import SlotImage
    from pykvm.snapshot.state import Snapshot

BLOCK = MERGE  # what is zero as a whole, or as in the disk's image, is left out; of a parent each page that is equal


def save(machine: Machine, path: str, snapshot: Snapshot | None, parent: Snapshot | None, compress: bool) -> Snapshot:
    """`Machine.save`."""
    if parent is not None and parent.file is None:
        raise SnapshotError("the parent of a differential snapshot has to be saved itself first")
    snapshot = snapshot or take(machine, to_file=True)
    if parent is not None and _places(parent) != _places(snapshot):
        raise SnapshotError("the parent has other memory slots or disks than the machine")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    try:
        crc = _write(fd, machine, snapshot, parent, compress)
        os.fsync(fd)
        os.rename(temporary, path)
        _sync_folder(path)
    except OSError as error:
        _remove(temporary)
        raise SnapshotError(f"{path}: {error.strerror}") from None
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(fd)
    snapshot.file = (path, crc)
    return snapshot


def _places(snapshot: Snapshot) -> list[tuple[int, int]]:
    return [(each.gpa, each.size) for each in _images(snapshot)]


def _images(snapshot: Snapshot) -> list[SlotImage]:
    """Memory, then what disks have in memory: in the file one after another."""
    return [*snapshot.memory, *layers_of(snapshot)]


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(fd: int, machine: Machine, snapshot: Snapshot, parent: Snapshot | None, compress: bool) -> int:
    """Memory first, because the state has its checksums; then the state at its place, then the header."""
    images = _images(snapshot)
    pieces = list(_pieces(images, _images(parent) if parent is not None else [each.under() for each in images]))
    document = describe(machine, snapshot)
    if parent is not None and parent.file is not None:
        document["parent"] = os.path.basename(parent.file[0])
    # the table's size is known before its content: every number is written in full width
    document["pieces"] = _table([(slot, offset, length, 0, 0, 0) for slot, offset, length in pieces])
    length = len(encode_state(document))
    place = _compressed_placer(PAGE + length) if compress else _mapped_placer(images, PAGE + length)
    rows = []
    end = PAGE + length
    for slot, offset, size in pieces:
        data = images[slot].read(offset, size)
        at, stored = place(slot, offset, data)
        _write_all(fd, stored, at)
        rows.append((slot, offset, size, at, len(stored), zlib.crc32(stored)))
        end = max(end, at + len(stored))
    if not compress:
        end = PAGE + length + sum(image.size for image in images)
    document["pieces"] = _table(rows)
    state = encode_state(document)
    assert len(state) == length
    os.ftruncate(fd, end)
    _write_all(fd, state, PAGE)
    crc = zlib.crc32(state)
    header = Header(
        flags=COMPRESSED if compress else 0,
        state_length=length,
        state_crc=crc,
        size=end,
        identity=bytes.fromhex(snapshot.id),
        parent=bytes.fromhex(parent.id) if parent is not None else NO_PARENT,
        parent_crc=parent.file[1] if parent is not None and parent.file is not None else 0,
    )
    _write_all(fd, header.pack(), 0)
    return crc


def _table(rows: list[tuple[int, int, int, int, int, int]]) -> bytes:
    return b"".join(number.to_bytes(8, "little") for row in rows for number in row)


def _mapped_placer(images: Sequence[SlotImage], start: int) -> Callable[[int, int, bytes], tuple[int, bytes]]:
    bases = [start]
    for image in images:
        bases.append(bases[-1] + image.size)
    return lambda slot, offset, data: (bases[slot] + offset, data)


def _compressed_placer(start: int) -> Callable[[int, int, bytes], tuple[int, bytes]]:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1)
    at = start

    def place(slot: int, offset: int, data: bytes) -> tuple[int, bytes]:
        nonlocal at
        stored = compressor.compress(data)
        begin, at = at, at + len(stored)
        return begin, stored

    return place


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


# -- which memory --------------------------------------------------------------------------------------------------


def _pieces(images: Sequence[SlotImage], belows: Sequence[SlotImage | None]) -> Iterator[tuple[int, int, int]]:
    """(image's number, offset, length) of what to write, each at most PIECE long, over what `belows` have."""
    for number, (image, below) in enumerate(zip(images, belows, strict=True)):
        start = end = 0
        for at, size in _changed(image, below):
            if at == end and end - start + size <= PIECE:
                end += size
                continue
            if end > start:
                yield number, start, end - start
            start, end = at, at + size
        if end > start:
            yield number, start, end - start


def _changed(image: SlotImage, below: SlotImage | None) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not zero, or not as in `below`, in order."""
    if below is None:
        for block in sorted(_blocks(image)):
            size = min(BLOCK, image.size - block)
            data = image.read(block, size)
            if data.count(0) != size:
                yield block, size
        return
    # every piece over a disk's image becomes a mapping of the disk's: rather whole blocks than pages
    step = PAGE if image.base is None else BLOCK
    holds_data = _blocks(image) | _blocks(below) if image.base is None else None
    for start, end in apart(image, below):
        for block in range(start, end, BLOCK):
            if holds_data is not None and block not in holds_data:
                continue
            size = min(BLOCK, image.size - block)
            ours, theirs = image.read(block, size), below.read(block, size)
            for at in range(0, size, step):
                if ours[at : at + step] != theirs[at : at + step]:
                    yield block + at, min(step, size - at)


def _blocks(image: SlotImage) -> set[int]:
    """The offsets of the blocks that hold data."""
    found: set[int] = set()
    for start, end in image.data_ranges():
        found.update(range(start // BLOCK * BLOCK, end, BLOCK))
    return found
