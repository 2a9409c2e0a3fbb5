"""Flat binaries: bytes without a header, loaded at one address and entered at another. Layer: boot.

mode        loaded at                       entered at
real        0x10000, or load_addr           CS = load_addr / 16, IP = entry or 0 (as kvmtool does)
protected   1 MiB, or load_addr             EIP = entry or the load address; flat 32-bit segments, paging off
long        1 MiB, or load_addr             RIP = entry or the load address; first 4 GiB mapped to themselves
"""

from __future__ import annotations

from pykvm.boot.image import Boot
from pykvm.boot.rules import GDT_AREA, PAGE_TABLES, check_backed, check_clear, check_entry, check_ram, refuse_options
from pykvm.errors import ConfigError
from pykvm.x86 import layout
from pykvm.x86.states import long_mode, protected_flat, real_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.core.memory import GuestMemory
    from pykvm.x86.segments import CpuState

MODES = ("real", "protected", "long")

_REAL_STACK = 0x8000  # SP as in kvmtool
_REAL_STACK_ROOM = 0x1000  # what an image must leave under SP


def load_flat(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load a flat binary in `options.mode` (real when None) at `options.load_addr`, entered at `options.entry`."""
    mode = options.mode or "real"
    if mode not in MODES:
        raise ConfigError("mode", f"{mode!r} is none of {', '.join(MODES)}")
    if not image.data:
        raise image.error("is empty")
    refuse_options(image, options, "a flat binary", "cmdline", "initrd", "modules")
    base = options.load_addr
    if base is None:
        base = layout.FLAT_REAL_BASE if mode == "real" else layout.KERNEL_BASE
    span = (base, base + len(image.data))
    check_ram(memory, image, span, options.e820)
    if mode == "real":
        state = _real_state(image, base, options.entry or 0)
        entry = state.cs.base + state.gprs["rip"]
    else:
        entry = base if options.entry is None else options.entry
        check_entry(memory, image, entry)
        structures = (GDT_AREA, PAGE_TABLES) if mode == "long" else (GDT_AREA,)
        check_backed(memory, image, structures)
        check_clear(image, [span], structures)
        state = (long_mode if mode == "long" else protected_flat)(memory, entry)
    memory.write(base, image.data)
    return Boot(f"flat-{mode}", image.path, entry, state)


def _real_state(image: ImageFile, base: int, ip: int) -> CpuState:
    """CS:IP in the image; SS = CS and SP = 0x8000 as kvmtool has it, unless the image would reach that stack.

    A larger image gets the stack below 0x8000 in segment 0 instead, which is under every default load address.
    """
    if base % 16 or base > 0xFFFF0:
        raise image.error(f"the load address {base:#x} is no real-mode segment: a multiple of 16 below 1 MiB is")
    if not 0 <= ip <= 0xFFFF:
        raise image.error(f"the entry point {ip:#x} is no real-mode IP (0 to 0xffff)")
    if len(image.data) <= _REAL_STACK - _REAL_STACK_ROOM:
        return real_mode(base >> 4, ip, sp=_REAL_STACK)
    return real_mode(base >> 4, ip, ss=0, sp=layout.BOOT_STACK_TOP)
