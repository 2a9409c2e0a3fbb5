"""bzImage: Linux, and what presents itself as Linux (memtest86+, iPXE). Layer: boot.

The fast way unpacks the compressed kernel on the host and enters it where its own decompressor would have:
at the ELF's entry, with boot_params in RSI. KASLR does not happen then, because it is the decompressor that does
it; nor are relocations applied, which is right for a kernel that lies where it was linked. The classic way, taken
on request and for payloads that cannot be unpacked here, enters the decompressor as a boot loader would.

Source: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

from pykvm.boot import placement
from pykvm.boot.bulk import clear, prefer_huge_pages, write_sparse
from pykvm.boot.elf import parse_elf
from pykvm.boot.image import Boot, ImageFile
from pykvm.boot.rules import check_ram, refuse_options
from pykvm.boot.setup_header import (
    ENTRY64_OFFSET,
    XLF_CAN_BE_LOADED_ABOVE_4G,
    SetupHeader,
    encode_cmdline,
)
from pykvm.boot.unpack import CorruptPayloadError, UnsupportedPayloadError, find_payload, unpack
from pykvm.boot.zero_page import NO_INITRD, build_zero_page
from pykvm.errors import ImageError
from pykvm.x86 import layout, states

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.boot.elf import ElfSegment
    from pykvm.boot.image import BootOptions
    from pykvm.boot.placement import Range
    from pykvm.boot.zero_page import Initrd
    from pykvm.core.memory import GuestMemory
    from pykvm.x86.segments import CpuState

FOUR_GIB = 1 << 32  # the boot-time identity map and 32-bit mode end here


class LinuxBoot(Boot):
    """A loaded Linux image. `packed_because` says why its kernel was not unpacked; it is empty if it was.

    protocol is linux64-unpacked or linux32-unpacked, or the classic linux64, linux32 or linux16.
    """

    __slots__ = ("packed_because",)

    def __init__(self, protocol: str, path: str, entry: int, state: CpuState, packed_because: str = "") -> None:
        super().__init__(protocol, path, entry, state)
        self.packed_because = packed_because


class _Placed:
    """Where the kernel went.

    bits   32 or 64, of the code at `entry`
    code   GPA of the protected-mode code, for code32_start
    used   what it occupies until it has read its memory map
    """

    __slots__ = ("bits", "code", "entry", "packed_because", "used")

    def __init__(self, bits: int, code: int, entry: int, used: list[Range], packed_because: str = "") -> None:
        self.bits = bits
        self.code = code
        self.entry = entry
        self.used = used
        self.packed_because = packed_because


def load_linux(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load a bzImage, its initrd and command line. ImageError if any of them is broken or does not fit."""
    header = SetupHeader(image)
    refuse_options(image, options, "a Linux kernel", "modules", "mode", "entry", "load_addr")
    if header.protocol == "linux16":
        from pykvm.boot.linux16 import load_linux16

        return load_linux16(memory, header, options)
    ram = placement.ram_ranges(memory, options.e820)
    cmdline = encode_cmdline(image, options.cmdline, min(header.cmdline_size, layout.CMDLINE_MAX))
    require_low_ram(image, ram)
    kernel = _place_kernel(memory, header, ram, options)
    above_4g = bool(header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G) and kernel.bits == 64
    initrd = place_initrd(memory, options.initrd, ram, kernel.used, header.initrd_limit, beyond_limit=above_4g)
    page = build_zero_page(image, header.raw, options, initrd=initrd, code32_start=kernel.code)
    memory.write(layout.ZERO_PAGE, page)
    memory.write(layout.CMDLINE, cmdline)
    state = enter_kernel(memory, kernel.bits, kernel.entry)
    protocol = f"linux{kernel.bits}" + ("" if kernel.packed_because else "-unpacked")
    return LinuxBoot(protocol, image.path, kernel.entry, state, kernel.packed_because)


def enter_kernel(memory: GuestMemory, bits: int, entry: int) -> CpuState:
    """The state of the 64-bit or the 32-bit boot protocol, boot_params at layout.ZERO_PAGE."""
    state = states.long_mode(memory, entry, stack=0) if bits == 64 else states.protected_flat(memory, entry, stack=0)
    state.gprs["rsi"] = layout.ZERO_PAGE
    return state


def require_low_ram(image: ImageFile, ram: Sequence[Range]) -> None:
    """ImageError unless boot-time tables, zero page and command line have RAM under them."""
    end = layout.CMDLINE + layout.CMDLINE_MAX + 1
    if not placement.fits(ram, layout.BOOT_GDT, end):
        raise image.error(f"the machine has no RAM at [{layout.BOOT_GDT:#x}, {end:#x})")


def place_initrd(
    memory: GuestMemory,
    initrd: ImageFile | None,
    ram: Sequence[Range],
    used: Sequence[Range],
    limit: int,
    *,
    beyond_limit: bool = False,
) -> Initrd:
    """Copy the initial RAM disk as high as possible below `limit`; with `beyond_limit` above it if need be.

    Nothing goes below 1 MiB or into `used`. ImageError (of the initrd's file) if there is no such place.
    """
    if initrd is None or not initrd.data:
        return NO_INITRD
    size = len(initrd.data)
    taken = [(0, layout.KERNEL_BASE), *used]
    gpa = placement.highest_fit(ram, taken, size, limit=limit)
    if gpa is None and beyond_limit:
        gpa = placement.highest_fit(ram, taken, size)
    if gpa is None:
        total = sum(high - low for low, high in ram) >> 20
        raise initrd.error(
            f"the initial RAM disk of {size} bytes does not fit into {total} MiB of RAM beside the kernel"
            + ("" if beyond_limit else f" and below {limit:#x}, this kernel's limit")
        )
    prefer_huge_pages(memory, gpa, gpa + size)
    memory.write(gpa, initrd.data)
    return gpa, size


def _place_kernel(memory: GuestMemory, header: SetupHeader, ram: Sequence[Range], options: BootOptions) -> _Placed:
    because = "on request"
    if options.unpack:
        try:
            return _place_unpacked(memory, header, ram)
        except UnsupportedPayloadError as error:
            because = str(error)
    return _place_classic(memory, header, ram, options, because)


# -- the fast way ----------------------------------------------------------------------------------


def _place_unpacked(memory: GuestMemory, header: SetupHeader, ram: Sequence[Range]) -> _Placed:
    image = header.image
    payload = find_payload(header)
    if payload.size > sum(high - low for low, high in ram):
        raise image.error(f"the kernel unpacks to {payload.size} bytes: more than the guest's RAM")
    placed: list[_Placed] = []

    def open_sink(head: bytes) -> _SegmentSink:
        kernel, loads = _plan_vmlinux(header, head, payload.size, ram)
        for each in loads:
            clear(memory, each.paddr, each.paddr + each.memsz)
            prefer_huge_pages(memory, each.paddr, each.paddr + each.memsz)
        placed.append(kernel)
        return _SegmentSink(memory, loads)

    try:
        unpack(payload, open_sink)
    except CorruptPayloadError as error:
        raise image.error(f"the compressed kernel is corrupt: {error}") from error
    return placed[0]


class _SegmentSink:
    """Takes the bytes of an ELF file in any order and puts those of its segments in their place."""

    def __init__(self, memory: GuestMemory, loads: Sequence[ElfSegment]) -> None:
        self._memory = memory
        self._loads = loads

    def __call__(self, offset: int, piece: bytes | bytearray) -> None:
        for each in self._loads:
            low = max(offset, each.offset)
            high = min(offset + len(piece), each.offset + each.filesz)
            if low < high:
                part = piece if high - low == len(piece) else piece[low - offset : high - offset]
                write_sparse(self._memory, each.paddr + low - each.offset, part)


def _plan_vmlinux(
    header: SetupHeader, head: bytes, size: int, ram: Sequence[Range]
) -> tuple[_Placed, list[ElfSegment]]:
    """Check the unpacked kernel by its first bytes; it stays where it was linked to be."""
    image = header.image
    try:
        elf = parse_elf(ImageFile(image.path, head))
        loads = elf.loads()
        entry = elf.physical_entry()
    except ImageError as error:
        raise image.error(f"the unpacked kernel {error.reason}") from error
    end_of_last = layout.KERNEL_BASE
    for each in loads:
        span = f"segment [{each.paddr:#x}, {each.paddr + each.memsz:#x}) of the unpacked kernel"
        if each.filesz > each.memsz or each.offset + each.filesz > size:
            raise image.error(f"the {span} has {each.filesz:#x} bytes at {each.offset:#x}")
        if each.paddr < end_of_last:
            raise image.error(f"the {span} overlaps another or the first MiB")
        end_of_last = each.paddr + each.memsz
        if end_of_last > FOUR_GIB or not placement.fits(ram, each.paddr, end_of_last):
            raise image.error(f"the {span} is not in guest RAM")
    start = loads[0].paddr
    end = max(end_of_last, min(start + header.init_size, FOUR_GIB))
    return _Placed(elf.bits, loads[0].paddr, entry, [(start, end)]), loads


# -- the classic way ----------------------------------------------------------------------------------


def _place_classic(
    memory: GuestMemory, header: SetupHeader, ram: Sequence[Range], options: BootOptions, because: str
) -> _Placed:
    code = header.code
    need = max(len(code), header.init_size)
    load = _load_address(header, ram, need)
    used = [(load, load + len(code))]
    runtime = load if header.relocatable_kernel else header.pref_address or load
    used.append((runtime, runtime + need))
    for start, end in used:
        if end > FOUR_GIB:
            raise header.image.error(f"the kernel wants [{start:#x}, {end:#x}), which is not below 4 GiB")
        check_ram(memory, header.image, (start, end), options.e820)
        prefer_huge_pages(memory, start, end)
        clear(memory, start, end)
    memory.write(load, code)
    bits, offset = (64, ENTRY64_OFFSET) if header.protocol == "linux64" else (32, 0)
    return _Placed(bits, load, load + offset, used, because)


def _load_address(header: SetupHeader, ram: Sequence[Range], need: int) -> int:
    """pref_address if the kernel is relocatable and RAM is there, else the lowest aligned place in RAM."""
    if not header.relocatable_kernel:
        return layout.KERNEL_BASE
    align = header.kernel_alignment
    if align & (align - 1):
        raise header.image.error(f"has a kernel_alignment of {align:#x}, which is no power of two")
    align = max(align, placement.PAGE)
    starts = [header.pref_address] if header.pref_address >= layout.KERNEL_BASE else []
    starts += [max(low, layout.KERNEL_BASE) for low, _ in ram]
    for start in starts:
        load = (start + align - 1) & -align
        if load + need <= FOUR_GIB and placement.fits(ram, load, load + need):
            return load
    raise header.image.error(f"there is no RAM for the {need} bytes that the kernel needs")
