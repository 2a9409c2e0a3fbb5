"""Reading a snapshot file. Layer: live objects.

Nothing is made before everything was checked. Memory is mapped from the file, copy-on-write; compressed memory is
unpacked into memfds, and a differential snapshot is laid over its parent, whose file it names.
"""

from __future__ import annotations

import os
import struct

from pykvm.config import MAX_MEMORY
from pykvm.core.memimage import MAX_EXTENTS, Backing, Extent, SlotImage, cut
from pykvm.errors import SnapshotError
from pykvm.snapshot.describe import check_document, read_device, read_part
from pykvm.snapshot.format import COMPRESSED, NO_PARENT, PAGE, PIECE, Header, check_pieces, read_header, read_state
from pykvm.snapshot.state import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Row = tuple[int, int, int, int, int, int]  # slot, offset, length, file offset, stored length, CRC

MAX_DEPTH = 32  # of differential snapshots
ROW = struct.Struct("<6Q")


class SnapshotFile:
    """A checked file: its document and its Snapshot."""

    def __init__(self, path: str, document: dict[str, Any], snapshot: Snapshot, layers: list[SlotImage]) -> None:
        self.path = path
        self.layers = layers
        self.document = document
        self.snapshot = snapshot


def load(path: str, *, lazy: bool = False, parent: str | None = None, depth: int = 0) -> SnapshotFile:
    """Read a snapshot file.

    All of its memory is read once to check it, or with `lazy` none: then damage in it goes unnoticed. `parent` is the
    file that a differential snapshot is relative to; by default the name it had, beside `path`. Raises SnapshotError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    backing = Backing(fd, outside=True)
    try:
        header = read_header(fd, path)
        document = read_state(fd, path, header)
        check_document(document, path)
        rows = _rows(document, header, path)
        if not lazy:
            start = PAGE + header.state_length
            check_pieces(fd, path, [(at, stored, crc) for _, _, _, at, stored, crc in rows], start)
        below = _parent(path, header, document, lazy, parent, depth)
        images = _images(backing, header, document, rows, below, path)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror}") from None
    memory, layers = images[: len(document["slots"])], images[len(document["slots"]) :]
    snapshot = Snapshot(
        vcpus=[read_part(each, f"{path}: vcpu") for each in document["vcpus"]],
        vm=read_part(document["vm"], f"{path}: vm"),
        devices={name: read_device(each, f"{path}: {name}", layers) for name, each in document["devices"].items()},
        memory=memory,
        identity=header.identity.hex(),
    )
    snapshot.file = (path, header.state_crc)
    return SnapshotFile(path, document, snapshot, layers)


def _rows(document: dict[str, Any], header: Header, path: str) -> list[Row]:
    """The list of memory pieces, each inside its slot and the file, in order and without overlap."""
    rows: list[Row] = list(ROW.iter_unpack(document["pieces"]))
    sizes = [size for _, size, _, _ in _regions(document)]
    bases = [PAGE + header.state_length]
    for size in sizes:
        bases.append(bases[-1] + size)
    end = PAGE + header.state_length
    last = (0, 0)
    for slot, offset, length, at, stored, _ in rows:
        good = slot < len(sizes) and (slot, offset) >= last and not offset % PAGE and 0 < length <= PIECE
        good = good and offset + length <= sizes[slot] and not length % PAGE and end <= at and stored > 0
        good = good and at + stored <= header.size and stored <= 2 * PIECE
        if not header.flags & COMPRESSED:
            good = good and stored == length and at == bases[slot] + offset
        if not good:
            raise SnapshotError(f"{path}: its list of memory is malformed")
        last, end = (slot, offset + length), at + stored
    if not header.flags & COMPRESSED and header.size != bases[-1]:
        raise SnapshotError(f"{path}: its size does not fit its memory")
    total = sum(size for _, size, _, _ in document["slots"])
    if total > MAX_MEMORY or any(size % PAGE or not size or gpa % PAGE for gpa, size, _, _ in _regions(document)):
        raise SnapshotError(f"{path}: its memory slots are malformed")
    return rows


def _parent(
    path: str, header: Header, document: dict[str, Any], lazy: bool, parent: str | None, depth: int
) -> list[SlotImage] | None:
    """Memory and layers of the file that it is relative to, if any."""
    if header.parent == NO_PARENT:
        if parent is not None:
            raise SnapshotError(f"{path}: is no differential snapshot: leave out the parent")
        return None
    if depth >= MAX_DEPTH:
        raise SnapshotError(f"{path}: more than {MAX_DEPTH} differential snapshots on top of each other")
    name = os.path.basename(str(document.get("parent", "")))
    where = parent or os.path.join(os.path.dirname(path), name)
    try:
        found = load(where, lazy=lazy, depth=depth + 1)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: its parent cannot be used: {error}") from None
    if found.snapshot.id != header.parent.hex() or found.snapshot.file != (where, header.parent_crc):
        raise SnapshotError(f"{path}: {where} is not its parent")
    return [*found.snapshot.memory, *found.layers]


def _regions(document: dict[str, Any]) -> list[tuple[int, int, str, bool]]:
    """(GPA, size, name, read-only) of each image in the file: slots, then layers."""
    return [*map(tuple, document["slots"]), *((0, size, "disk", False) for size in document["layers"])]


def _images(
    backing: Backing,
    header: Header,
    document: dict[str, Any],
    rows: list[Row],
    below: list[SlotImage] | None,
    path: str,
) -> list[SlotImage]:
    slots = _regions(document)
    if below is not None and [(i.gpa, i.size) for i in below] != [(gpa, size) for gpa, size, _, _ in slots]:
        raise SnapshotError(f"{path}: its parent has other memory slots or disks")
    images = []
    base = PAGE + header.state_length
    for number, (gpa, size, name, readonly) in enumerate(slots):
        mine = [row for row in rows if row[0] == number]
        is_layer = number >= len(document["slots"])
        under = below[number].extents if below is not None else ()
        if header.flags & COMPRESSED:
            source, shift = _unpack(backing.fd, mine, size, name, path), 0
        else:
            source, shift = backing, base
        base += size
        if not under and not is_layer:
            extents = [Extent(0, size, source, shift)]
        else:
            own = _joined(mine)
            extents = [*cut(under, own), *(Extent(start, end, source, shift + start) for start, end in own)]
        image = SlotImage(0 if is_layer else number, gpa, size, name, readonly, extents)
        images.append(image if len(extents) <= MAX_EXTENTS or is_layer else image.flat())
    return images


def _joined(rows: list[Row]) -> list[tuple[int, int]]:
    """[start, end) of the pieces, in one where they are neighbours."""
    joined: list[tuple[int, int]] = []
    for _, offset, length, _, _, _ in rows:
        if joined and joined[-1][1] == offset:
            joined[-1] = (joined[-1][0], offset + length)
        else:
            joined.append((offset, offset + length))
    return joined


def _unpack(fd: int, rows: list[Row], size: int, name: str, path: str) -> Backing:
    """The slot's memory in a memfd, decompressed."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    target = Backing(os.memfd_create(f"pykvm-{name}", os.MFD_CLOEXEC))
    os.ftruncate(target.fd, size)
    for _, offset, length, at, stored, _ in rows:
        try:
            if zstandard.get_frame_parameters(raw := os.pread(fd, stored, at)).content_size != length:
                raise SnapshotError(f"{path}: a piece of memory has the wrong size")
            data = decompressor.decompress(raw, max_output_size=length)
        except zstandard.ZstdError as error:
            raise SnapshotError(f"{path}: damaged: {error}") from None
        os.pwrite(target.fd, data, offset)
    return target
