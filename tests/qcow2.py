"""Empty qcow2 images, made without qemu-img."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 1 << 16


def qcow2(path: Path, size: int) -> Path:
    """An empty image, version 2 (QEMU docs/interop/qcow2.txt): header, refcount table and block, L1 table."""
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0)
    refcounts = struct.pack(">4H", 1, 1, 1, 1)
    pieces = (header, struct.pack(">Q", 2 * CLUSTER), refcounts, b"")
    path.write_bytes(b"".join(piece.ljust(CLUSTER, b"\0") for piece in pieces))
    return path
