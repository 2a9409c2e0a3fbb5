"""The virtio devices that a snapshot file names, made again with their ends on this host. Layer: control."""

from __future__ import annotations

from pykvm.core.state import BOOL, Int, Kind, ListOf, Row, Shape, Text
from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.virtio.device import VirtioDevice

PATH = Text(4096)
MAX_DEVICES = 64


class _Options(Kind):
    """A device's options, checked by its Shape later."""

    def __init__(self) -> None:
        super().__init__("options")

    def accepts(self, value: object) -> bool:
        """A document."""
        return isinstance(value, dict)


_RECIPES = ListOf(Row(Text(20), _Options()), 0, MAX_DEVICES)


def make_devices(recipes: object, path: str) -> list[VirtioDevice]:
    """The virtio devices of the file at `path`, with their host files opened. Raises SnapshotError, ConfigError."""
    if not _RECIPES.accepts(recipes):
        raise SnapshotError(f"{path}: its list of devices is malformed")
    made: list[VirtioDevice] = []
    try:
        for kind, options in recipes:  # type: ignore[attr-defined]
            if kind not in _KINDS:
                raise SnapshotError(f"{path}: a device of kind {kind!r} is unknown")
            shape, make = _KINDS[kind]
            shape.check(f"{path}: {kind}", 1, options)
            made.append(make(options))
    except BaseException:
        for device in made:
            device.close()
        raise
    return made


def _disk(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.blk import Disk

    return Disk(**options)


def _rng(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.rng import Rng

    return Rng()


# kind -> (what its options are, function that makes it)
_KINDS: dict[str, tuple[Shape, Callable[[dict[str, Any]], VirtioDevice]]] = {
    "disk": (
        Shape(1, path=PATH, readonly=BOOL, id=Text(20), direct=BOOL, queues=Int(1, 16), thread=BOOL),
        _disk,
    ),
    "rng": (Shape(1), _rng),
}
