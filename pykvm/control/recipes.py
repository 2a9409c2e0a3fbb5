"""The virtio devices that a snapshot file names, made again with their ends on this host. Layer: control."""

from __future__ import annotations

from pykvm.core.device import ClosedOnFailure
from pykvm.core.state import BOOL, U32, U64, Bytes, Int, Kind, ListOf, Row, Shape, Text
from pykvm.errors import SnapshotError, UsageError
from pykvm.virtio.rate import limit_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.virtio.device import VirtioDevice
    from pykvm.virtio.netbackend import NetBackend

PATH = Text(4096)
MAX_DEVICES = 64


class _Options(Kind):
    """A device's options, checked by its Shape later."""

    def __init__(self) -> None:
        super().__init__("options")

    def accepts(self, value: object) -> bool:
        """A document."""
        return isinstance(value, dict)


class _OrNothing(Kind):
    """A row, or []."""

    def __init__(self, what: str, row: Row) -> None:
        super().__init__(what)
        self._row = row

    def accepts(self, value: object) -> bool:
        """Such a row, or []."""
        return value == [] or self._row.accepts(value)


_LIMIT = _OrNothing("a rate limit", Row(*[Int(0, 1 << 62)] * 3))  # as pykvm.virtio.rate.numbers_of gives it
_BACKEND = _OrNothing("the kind and options of a network", Row(Text(20), _Options()))
_RECIPES = ListOf(Row(Text(20), _Options()), 0, MAX_DEVICES)


class Ends:
    """Ends on this host that devices get instead of those that the file names; see restore_file."""

    def __init__(self, *, net: Sequence[NetBackend | None] | None = None, vsock: str | None = None) -> None:
        self.net = None if net is None else list(net)
        self.vsock = vsock

    def replace(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """A device's checked options with them."""
        if kind == "vsock" and self.vsock is not None:
            options, self.vsock = {**options, "path": self.vsock}, None
        if kind == "net" and self.net:
            options = {**options, "backend": self.net.pop(0)}
        return options

    def check_used(self) -> None:
        """Raise UsageError when there was no device for one."""
        if self.vsock is not None:
            raise UsageError(f"the machine was saved without a vsock: leave out {self.vsock or 'none'}")
        if self.net:
            raise UsageError("the machine was saved with fewer networks than are given now")

    def close(self) -> None:
        """Close what no device got."""
        for backend in self.net or ():
            if backend is not None:
                backend.close()


def make_devices(recipes: object, path: str, ends: Ends) -> list[VirtioDevice]:
    """The virtio devices of the file at `path`, with their host files opened.

    Raises SnapshotError, ConfigError, UsageError.
    """
    if not _RECIPES.accepts(recipes):
        raise SnapshotError(f"{path}: its list of devices is malformed")
    made: list[VirtioDevice] = []
    with ClosedOnFailure(made):
        for kind, options in recipes:  # type: ignore[attr-defined]
            if kind not in _KINDS:
                raise SnapshotError(f"{path}: a device of kind {kind!r} is unknown")
            shape, make = _KINDS[kind]
            shape.check(f"{path}: {kind}", 1, options)
            made.append(make(ends.replace(kind, options)))
        ends.check_used()
    return made


def _disk(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.blk import Disk

    return Disk(**{**options, "limit": limit_of(options["limit"])})


def _rng(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.rng import Rng

    return Rng(limit_of(options["limit"]))


def _console(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.console import Console, ConsolePort

    ports = []
    for name, console, where in options["ports"]:
        ports.append(ConsolePort(name, console=console))
        ports[-1].where, ports[-1].resumed = where, True
    return Console(ports)


def _balloon(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.balloon import Balloon

    return Balloon(**options)


def _vsock(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.vsock import Vsock

    return Vsock(options["cid"], options["path"] or None)


def _net(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.net import Net
    from pykvm.virtio.netbackend import NetBackend
    from pykvm.virtio.netplug import known_features

    found = options["backend"]
    backend = found if found is None or isinstance(found, NetBackend) else _net_backend(*found)
    net = Net(backend, mtu=options["mtu"] or None, link=options["link"], limit=limit_of(options["limit"]))
    net.mac = options["mac"]
    net.features = options["features"] & (known_features() if backend is None else net.features)
    return net


def _net_backend(kind: str = "", options: dict[str, Any] | None = None) -> NetBackend | None:
    if not kind:
        return None
    if kind not in _NETS:
        raise SnapshotError(f"a network of kind {kind!r} is unknown")
    _NETS[kind].check(f"network {kind}", 1, options or {})
    if kind == "tap":
        from pykvm.virtio.tap import Tap

        return Tap(options["ifname"] or None, mtu=options["mtu"])  # type: ignore[index]
    from pykvm.virtio.passt import Passt

    return Passt(options["hostfwd"])  # type: ignore[index]


_NETS = {
    "tap": Shape(1, ifname=Text(15), mtu=Int(0, 65535)),
    "user": Shape(1, hostfwd=ListOf(Text(200), 0, 256)),
}


def _image(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.imagedisk import ImageDisk

    return ImageDisk(**options)


def _share(options: dict[str, Any]) -> VirtioDevice:
    from pykvm.virtio.share import Share

    return Share(**options)


# kind -> (what its options are, function that makes it)
_KINDS: dict[str, tuple[Shape, Callable[[dict[str, Any]], VirtioDevice]]] = {
    "disk": (
        Shape(
            1,
            path=PATH,
            readonly=BOOL,
            id=Text(20),
            direct=BOOL,
            queues=Int(1, 16),
            thread=BOOL,
            overlay=BOOL,
            limit=_LIMIT,
        ),
        _disk,
    ),
    "rng": (Shape(1, limit=_LIMIT), _rng),
    "console": (Shape(1, ports=ListOf(Row(Text(255), BOOL, PATH), 1, 16)), _console),
    "balloon": (Shape(1, deflate_on_oom=BOOL, reporting=BOOL), _balloon),
    "net": (
        Shape(1, mac=Bytes(6), mtu=Int(0, 65535), link=BOOL, features=U64, backend=_BACKEND, limit=_LIMIT),
        _net,
    ),
    "image": (Shape(1, path=PATH, kind=Text(10), readonly=BOOL, direct=BOOL, queues=Int(1, 16)), _image),
    "share": (Shape(1, path=PATH, tag=Text(36), readonly=BOOL, cache=Text(10)), _share),
    "vsock": (Shape(1, cid=U32, path=PATH), _vsock),
}
