"""The archive of an initramfs, "newc" cpio (Linux Documentation/driver-api/early-userspace). Layer: control."""

from __future__ import annotations

import stat


class Cpio:
    """Collects files and folders; parents are made as needed."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0
        self._folders = {""}

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file, with the folders above it."""
        self.add_folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFREG | mode, content)

    def add_folder(self, name: str) -> None:
        """A folder, with those above it."""
        if name not in self._folders:
            self.add_folder(name.rpartition("/")[0])
            self._folders.add(name)
            self._entry(name, stat.S_IFDIR | 0o755)

    def add_device(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self.add_folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def _entry(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode(errors="surrogateescape")
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path) + 1, 0)
        self._out += b"070701" + "".join(f"{field:08x}" for field in fields).encode() + path + b"\0"
        self._out += bytes(-len(self._out) % 4) + content
        self._out += bytes(-len(self._out) % 4)

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0)
        return bytes(self._out)
