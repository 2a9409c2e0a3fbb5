"""The symbols of what a machine boots. Layer: debug."""

from __future__ import annotations

from pykvm.debug.symbols import Symbols
from pykvm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.config import BootConfig


def boot_symbols(boot: BootConfig | None) -> Symbols:
    """Those of the kernel, if it is an ELF file that has some; else none."""
    if boot is None or boot.kernel is None:
        return Symbols()
    try:
        return Symbols.from_elf(boot.kernel)
    except ImageError:  # a flat image or a bzImage
        return Symbols()
