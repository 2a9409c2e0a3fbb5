"""Result files that appear with all their content, or not at all. Layer: debug."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager

from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any


@contextmanager
def whole_file(path: str | os.PathLike[str], *, text: bool = True) -> Iterator[IO[Any]]:
    """A file (UTF-8, or bytes) beside `path` that takes its place at the end of the block, unless that raises.

    Raises UsageError.
    """
    folder = os.path.dirname(os.path.abspath(path))
    mode, encoding = ("w", "utf-8") if text else ("wb", None)
    try:
        with tempfile.NamedTemporaryFile(mode, dir=folder, prefix=".pykvm-", delete=False, encoding=encoding) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
