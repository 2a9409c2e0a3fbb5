"""Writing a snapshot to a file. Layer: live objects.

The file is written beside its final name, synced, and renamed over it: whoever dies in between leaves the old one.
"""

from __future__ import annotations

import os
import zlib

from pykvm.core.memimage import MERGE
from pykvm.errors import SnapshotError
from pykvm.snapshot.describe import describe
from pykvm.snapshot.format import COMPRESSED, NO_PARENT, PAGE, PIECE, Header, encode_state
from pykvm.snapshot.take import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm.core.machine import Machine
    from pykvm.core.memimage import SlotImage
    from pykvm.snapshot.state import Snapshot

BLOCK = MERGE  # what is zero as a whole, or equal to the parent's, is left out


def save(machine: Machine, path: str, snapshot: Snapshot | None, parent: Snapshot | None, compress: bool) -> Snapshot:
    """`Machine.save`."""
    if parent is not None and parent.file is None:
        raise SnapshotError("the parent of a differential snapshot has to be saved itself first")
    snapshot = snapshot or take(machine, to_file=True)
    if parent is not None and [(i.gpa, i.size) for i in parent.memory] != [(i.gpa, i.size) for i in snapshot.memory]:
        raise SnapshotError("the parent has other memory slots than the machine")
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
    pieces = list(_pieces(snapshot, parent))
    document = describe(machine, snapshot)
    if parent is not None and parent.file is not None:
        document["parent"] = os.path.basename(parent.file[0])
    # the table's size is known before its content: every number is written in full width
    document["pieces"] = _table([(slot, offset, length, 0, 0, 0) for slot, offset, length in pieces])
    length = len(encode_state(document))
    place = _compressed_placer(PAGE + length) if compress else _mapped_placer(snapshot, PAGE + length)
    rows = []
    end = PAGE + length
    for slot, offset, size in pieces:
        data = snapshot.memory[slot].read(offset, size)
        at, stored = place(slot, offset, data)
        _write_all(fd, stored, at)
        rows.append((slot, offset, size, at, len(stored), zlib.crc32(stored)))
        end = max(end, at + len(stored))
    if not compress:
        end = PAGE + length + sum(image.size for image in snapshot.memory)
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


def _mapped_placer(snapshot: Snapshot, start: int) -> Callable[[int, int, bytes], tuple[int, bytes]]:
    bases = [start]
    for image in snapshot.memory:
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


def _pieces(snapshot: Snapshot, parent: Snapshot | None) -> Iterator[tuple[int, int, int]]:
    """(slot number, offset, length) of the memory to write, each at most PIECE long."""
    for number, image in enumerate(snapshot.memory):
        below = parent.memory[number] if parent is not None else None
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
    """(offset, length) of what is not zero, or not as in the parent, in order. A parent is compared page by page."""
    ranges = _blocks(image)
    if below is not None:
        ranges |= _blocks(below)
    for block in sorted(ranges):
        size = min(BLOCK, image.size - block)
        if below is None:
            data = image.read(block, size)
            if data.count(0) != size:
                yield block, size
        elif not _same_file(image, below, block, size):
            ours, theirs = image.read(block, size), below.read(block, size)
            for page in range(0, size, PAGE):
                if ours[page : page + PAGE] != theirs[page : page + PAGE]:
                    yield block + page, min(PAGE, size - page)


def _blocks(image: SlotImage) -> set[int]:
    """The offsets of the blocks that hold data."""
    found: set[int] = set()
    for start, end in image.data_ranges():
        found.update(range(start // BLOCK * BLOCK, end, BLOCK))
    return found


def _same_file(image: SlotImage, below: SlotImage, start: int, size: int) -> bool:
    """Whether both have this part from the same place of the same file."""

    def home(of: SlotImage) -> tuple[object, int] | None:
        for each in of.extents:
            if each.start <= start and start + size <= each.end:
                return each.backing, each.offset - each.start
        return None

    return home(image) is not None and home(image) == home(below)
