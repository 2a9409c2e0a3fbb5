"""The options of `pykvm start` that make virtio devices, and the words of their values. Layer: cli.

Loaded only when such an option is given: it may import what it likes.
"""

from __future__ import annotations

import os

from pykvm.config import parse_int, parse_size
from pykvm.core.device import ClosedOnFailure
from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.virtio.device import VirtioDevice
    from pykvm.virtio.netbackend import NetBackend


def _disk(text: str) -> VirtioDevice:
    from pykvm.virtio.blk import Disk
    from pykvm.virtio.rate import RATE_KEYS, parse_rate

    flags = ("ro", "direct", "thread", "overlay")
    path, words = split_spec("--disk", text, flags, ("id", "queues", "format", *RATE_KEYS))
    if not path:
        raise UsageError("--disk: no file given: --disk FILE[,ro][,id=TEXT][,direct][,overlay][,queues=N][,format=..]")
    if words.get("format", "raw") != "raw":
        return _image_disk(path, words)
    return Disk(
        path,
        readonly="ro" in words,
        id=words.get("id", ""),
        direct="direct" in words,
        thread="thread" in words,
        overlay="overlay" in words,
        queues=parse_int(words.get("queues", "1"), "queues"),
        limit=parse_rate(words),
    )


def _image_disk(path: str, words: dict[str, str]) -> VirtioDevice:
    from pykvm.virtio.imagedisk import ImageDisk

    for word in words:
        if word not in ("ro", "direct", "overlay", "queues", "format"):
            raise UsageError(
                f"--disk: {word} is for raw images; one of format={words['format']} has ro, direct, overlay, queues"
            )
    return ImageDisk(
        path,
        words["format"],
        readonly="ro" in words,
        direct="direct" in words,
        overlay="overlay" in words,
        queues=parse_int(words.get("queues", "1"), "queues"),
    )


def _share(text: str) -> VirtioDevice:
    from pykvm.virtio.share import Share

    place, words = split_spec("--share", text, ("ro",), ("cache",))
    path, tag = place, ""
    if not os.path.isdir(place) and ":" in place:
        path, _, tag = place.rpartition(":")
    if not path:
        raise UsageError("--share: no folder given: --share DIR[:TAG][,ro][,cache=auto|always|never]")
    return Share(path, tag=tag, readonly="ro" in words, cache=words.get("cache", "auto"))


def _pmem(text: str) -> VirtioDevice:
    from pykvm.virtio.pmem import Pmem

    path, words = split_spec("--pmem", text, ("ro",), ())
    if not path:
        raise UsageError("--pmem: no file given: --pmem FILE[,ro]")
    return Pmem(path, readonly="ro" in words)


def _rng(text: str) -> VirtioDevice:
    from pykvm.virtio.rate import RATE_KEYS, parse_rate
    from pykvm.virtio.rng import Rng

    return Rng(parse_rate(only_words("--rng", text, (), RATE_KEYS)))


def _net(text: str) -> VirtioDevice:
    from pykvm.virtio.net import Net
    from pykvm.virtio.rate import RATE_KEYS, parse_rate

    kind, words = _net_words(text, ("down", "vhost"), ("mac", "mtu", *RATE_KEYS))
    mtu = parse_int(words["mtu"], "mtu") if "mtu" in words else None
    limit = parse_rate(words)
    if "vhost" in words and (kind != "tap" or limit is not None):
        raise UsageError("--net: vhost is for a tap, and without a rate limit (tc can limit a tap)")
    backend = _net_backend(kind, words, mtu or 0)
    if "vhost" in words:
        from pykvm.virtio.vhost_net import VhostNet

        return VhostNet(backend, mac=words.get("mac"), mtu=mtu, link="down" not in words)
    return Net(backend, mac=words.get("mac"), mtu=mtu, link="down" not in words, limit=limit)


def parse_net_backend(text: str) -> NetBackend | None:
    """What a network that exists already is plugged into: a --net without the words about the device, or none."""
    return None if text == "none" else _net_backend(*_net_words(text, (), ()), 0)


def _net_words(text: str, flags: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    kind = text.split(",", 1)[0]
    keys = {"user": ("hostfwd",), "tap": ("ifname", "fd")}.get(kind)
    if keys is None:
        raise UsageError(
            f"--net: {kind!r} is neither user nor tap: --net user[,hostfwd=tcp::2222-:22] or --net tap[,...]"
        )
    return kind, split_spec("--net", text, flags, (*keys, *more), many=("hostfwd",))[1]


def _net_backend(kind: str, words: dict[str, str], mtu: int) -> NetBackend:
    if kind == "tap":
        from pykvm.virtio.tap import Tap

        fd = parse_int(words["fd"], "fd") if "fd" in words else None
        return Tap(words.get("ifname"), fd=fd, mtu=mtu)
    from pykvm.virtio.passt import Passt

    return Passt(words.get("hostfwd", "").split("\n") if "hostfwd" in words else ())


def _balloon(text: str) -> VirtioDevice:
    from pykvm.virtio.balloon import Balloon

    words = only_words("--balloon", text, ("no-deflate-on-oom", "no-reporting"), ("size",))
    return Balloon(
        parse_size(words["size"], "balloon") if "size" in words else 0,
        deflate_on_oom="no-deflate-on-oom" not in words,
        reporting="no-reporting" not in words,
    )


def _vsock(text: str) -> VirtioDevice:
    from pykvm.virtio.vsock import Vsock

    head, colon, path = text.partition(":")
    if not (colon and head.isascii() and head.isdigit()):  # a path may hold colons, and `cid=` digits
        words = only_words("--vsock", text, (), ("cid", "path"))
        head, path = words.get("cid", ""), words.get("path", "")
    if not head or not path:
        raise UsageError(f"--vsock: {text!r} is not CID:PATH, nor cid=CID,path=PATH")
    return Vsock(parse_int(head, "vsock"), path)


# option key -> function(its text) -> device; in the order in which the devices are put on the machine
MAKERS: dict[str, Callable[[str], VirtioDevice]] = {
    "disk": _disk,
    "net": _net,
    "rng": _rng,
    "balloon": _balloon,
    "vsock": _vsock,
    "share": _share,
    "pmem": _pmem,
}


def _console(texts: list[str]) -> VirtioDevice:
    from pykvm.cli.consoleport import make_console

    return make_console(texts)


# option key -> function(all its texts) -> one device
GROUPS: dict[str, Callable[[list[str]], VirtioDevice]] = {"console": _console}


def make_devices(values: dict[str, Any]) -> list[VirtioDevice]:
    """The devices that the parsed options ask for. Raises UsageError, and then none is left open."""
    devices: list[VirtioDevice] = []
    with ClosedOnFailure(devices):
        for key, make in MAKERS.items():
            given = values.get(key)
            texts = given if isinstance(given, list) else [] if given in (None, False) else [given]
            devices += [make("" if text is True else text) for text in texts]
        devices += [group(values[key]) for key, group in GROUPS.items() if values.get(key)]
    return devices


def split_spec(
    option: str, text: str, flags: tuple[str, ...], keys: tuple[str, ...], many: tuple[str, ...] = ()
) -> tuple[str, dict[str, str]]:
    """`FIRST[,flag][,key=value]...` as (FIRST, {flag: "", key: value}); a comma in FIRST is written twice.

    Keys in `many` may be repeated: their values then stand in lines.
    Raises UsageError with the words that `option` knows.
    """
    first, *rest = text.replace(",,", "\0").split(",")
    words: dict[str, str] = {}
    for word in rest:
        key, equals, value = word.replace("\0", ",").partition("=")
        if key in words and key in many:
            value = f"{words[key]}\n{value}"
        elif key in words:
            raise UsageError(f"{option}: {key} is given twice in {text.lstrip(',')!r}")
        if key not in (keys if equals else flags):
            known = ", ".join([*flags, *(f"{name}=..." for name in keys)])
            raise UsageError(f"{option}: {word!r} is none of {known or 'nothing: it takes no options'}")
        words[key] = value
    return first.replace("\0", ","), words


def only_words(option: str, text: str, flags: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, str]:
    """`[flag|key=value][,flag|key=value]...` as {flag: "", key: value}. Raises UsageError."""
    return split_spec(option, f",{text}", flags, keys)[1] if text else {}
