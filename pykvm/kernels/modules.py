"""A kernel's modules: what each needs, and its ELF file out of whatever it is compressed with. Layer: control.

The "depends=" entry of a module's .modinfo section lists the modules that it needs, so depmod's files are not needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from pykvm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_MODULE = 256 << 20  # bytes unpacked; the largest of a distribution has some tens of MiB


class Modules:
    """The modules of one kernel: `folder` is its lib/modules/VERSION. "-" and "_" are the same in names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {_plain(path.name): path for path in folder.rglob("*.ko*")}
        try:
            text = (folder / "modules.builtin").read_text()
        except OSError:
            text = ""
        self._builtin = {_plain(line.rpartition("/")[2]) for line in text.split()}

    def has(self, name: str) -> bool:
        """Whether the kernel has it, as a module or built in."""
        return _plain(name) in self._files or _plain(name) in self._builtin

    def order(self, names: Iterable[str]) -> dict[str, bytes]:
        """name -> ELF file of `names` and of all that they need, in an order in which insmod takes them.

        Those that are built in need none. Raises ImageError.
        """
        files: dict[str, bytes] = {}
        for name in names:
            self._add(_plain(name), files)
        return files

    def _add(self, name: str, files: dict[str, bytes]) -> None:
        if name in files or name in self._builtin:
            return
        path = self._files.get(name)
        if path is None:
            raise ImageError(self.folder, f"this kernel has no module {name}: give another one with --kernel")
        content = read_module(path)
        found = re.search(rb"\0depends=([^\0]+)\0", content)
        for needed in found.group(1).decode(errors="replace").split(",") if found else ():
            self._add(_plain(needed), files)
        files[name] = content


def _plain(name: str) -> str:
    return name.partition(".")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """The ELF file in a .ko, .ko.xz, .ko.zst or .ko.gz. Raises ImageError."""
    try:
        content = path.read_bytes()
        if path.suffix == ".xz":
            import lzma

            return lzma.LZMADecompressor().decompress(content, MAX_MODULE)
        if path.suffix == ".gz":
            import zlib

            return zlib.decompressobj(31).decompress(content, MAX_MODULE)
        if path.suffix == ".zst":
            import zstandard

            return zstandard.ZstdDecompressor().decompress(content, max_output_size=MAX_MODULE)
    except Exception as error:  # each library has its own for a damaged file
        raise ImageError(path, f"cannot be read: {error}") from None
    return content
