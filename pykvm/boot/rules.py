"""What every loader refuses, in the same words: bad places, bad entries, options without a meaning. Layer: boot."""

from __future__ import annotations

from pykvm.boot.placement import fits, overlapping, ram_ranges
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.core.memory import GuestMemory

    Range = tuple[int, int]

# (start, end, what it is): boot-time structures that a kernel's image must not cover
GDT_AREA = (layout.BOOT_GDT, layout.BOOT_GDT + 0x80, "the boot-time GDT")
PAGE_TABLES = (layout.BOOT_PML4, layout.BOOT_PD + 0x4000, "the boot-time page tables")

_OPTION_NAMES = {
    "cmdline": "command line",
    "initrd": "initial RAM disk",
    "modules": "modules",
    "entry": "entry point",
    "load_addr": "load address",
    "mode": "mode",
}


def refuse_options(image: ImageFile, options: BootOptions, kind: str, *names: str) -> None:
    """ImageError if one of the options `names` is given: a file of this `kind` has no use for it."""
    given = [_OPTION_NAMES[name] for name in names if getattr(options, name) not in (None, "", ())]
    if given:
        raise image.error(f"is loaded as {kind}, which takes no {' and no '.join(given)}")


def check_ram(memory: GuestMemory, image: ImageFile, span: Range, e820: Sequence[tuple[int, int, int]]) -> None:
    """ImageError unless all of `span` is RAM."""
    start, end = span
    if fits(ram_ranges(memory, e820), start, end):
        return
    total = memory.size
    if end - start > total:
        raise image.error(f"is larger than the guest's memory ({end - start} bytes, memory has {total})")
    raise image.error(f"[{start:#x}, {end:#x}), where it must be loaded, is not all RAM")


def check_clear(image: ImageFile, occupied: Iterable[Range], structures: Iterable[tuple[int, int, str]]) -> None:
    """ImageError if one of the `occupied` ranges covers one of the boot-time `structures`."""
    ranges = list(occupied)
    for start, end, what in structures:
        if overlapping(ranges, start, end):
            raise image.error(f"occupies [{start:#x}, {end:#x}), which holds {what}")


def check_backed(memory: GuestMemory, image: ImageFile, structures: Iterable[tuple[int, int, str]]) -> None:
    """ImageError unless the guest has memory where the boot-time `structures` go."""
    for start, end, what in structures:
        if not memory.contains(start, end - start):
            raise image.error(f"cannot be started without memory at [{start:#x}, {end:#x}) for {what}")


def check_entry(memory: GuestMemory, image: ImageFile, entry: int) -> None:
    """ImageError unless `entry` is in guest memory and below 4 GiB, where every boot state can reach it."""
    if not 0 <= entry < 1 << 32:
        raise image.error(f"the entry point {entry:#x} is not below 4 GiB")
    if not memory.contains(entry):
        raise image.error(f"the entry point {entry:#x} is outside guest memory")


def encode_string(image: ImageFile, text: str) -> bytes:
    """`text` as a guest gets it: UTF-8 with a NUL. ImageError if it cannot be one string."""
    try:
        # surrogateescape: bytes of the host's command line that are no UTF-8 reach the guest unchanged
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise image.error("its command line is not valid Unicode") from None
    if b"\0" in encoded:
        raise image.error("its command line contains a NUL character")
    return encoded + b"\0"
