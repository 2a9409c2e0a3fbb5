"""bzImages by the 64-bit, 32-bit and 16-bit boot protocols, unpacked and not."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    CODECS,
    FIELDS,
    LZ4_BLOCK,
    MIB,
    compress,
    field,
    make_bzimage,
    make_elf,
    make_image,
    make_memory,
    make_options,
    make_vmlinux,
)

from pykvm.boot import bios16, linux16
from pykvm.boot.image import E820_RAM, Boot, BootOptions, ImageFile, Module
from pykvm.boot.linux import LinuxBoot, load_linux
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.paging import walk

VMLINUX = make_vmlinux()
INITRD = ImageFile("initrd", b"070701" + bytes(range(256)) * 40)


def load(data: bytes, size: int = 64 * MIB, **options: Any) -> tuple[GuestMemory, LinuxBoot, bytes]:
    """Load `data`: memory, Boot and zero page. The state is checked as hardware would check it."""
    memory = make_memory(size)
    boot = load_linux(memory, make_image(data), make_options(size, **options))
    assert isinstance(boot, LinuxBoot)
    assert check_guest_state(boot.state) == []
    assert boot.path == "kernel"
    return memory, boot, memory.read(layout.ZERO_PAGE, 4096)


def refuse(data: bytes, match: str, size: int = 64 * MIB, **options: Any) -> ImageError:
    """The ImageError of loading `data`, whose reason matches."""
    with pytest.raises(ImageError, match=match) as caught:
        load_linux(make_memory(size), make_image(data), make_options(size, **options))
    return caught.value


# -- the zero page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unpack", [True, False])
def test_zero_page(unpack: bool) -> None:
    """boot_params has the header, what a loader must write, the memory map and the RSDP, and zeros elsewhere."""
    image = make_bzimage(compress("gzip", VMLINUX))
    memory, boot, page = load(image, unpack=unpack, initrd=INITRD)
    header = bytearray(image[0x1F1:0x26C])
    assert page[0x1EF] == 0, "the sentinel must be 0"
    for name, value in {
        "type_of_loader": 0xFF,
        "cmd_line_ptr": layout.CMDLINE,
        "code32_start": 16 * MIB,
        "ramdisk_size": len(INITRD.data),
        "ramdisk_image": (64 * MIB - len(INITRD.data)) & -4096,
    }.items():
        assert field(page, name) == value, name
        offset, form = FIELDS[name]
        struct.pack_into("<" + form, header, offset - 0x1F1, value)
    struct.pack_into("<H", header, 0x1FA - 0x1F1, 0xFFFF)  # vid_mode: normal
    assert page[0x1F1:0x26C] == header
    assert page[0x26C:0x2D0] == bytes(0x2D0 - 0x26C)
    assert struct.unpack_from("<Q", page, 0x70)[0] == 0xE0000
    assert page[0x1E8] == 4
    entries = list(struct.iter_unpack("<QQI", page[0x2D0 : 0x2D0 + 80]))
    assert entries == list(make_options().e820)
    assert page[0x2D0 + 80 :] == bytes(4096 - 0x2D0 - 80)
    assert memory.read_cstring(layout.CMDLINE) == b"console=ttyS0"
    assert boot.state.gprs["rsi"] == layout.ZERO_PAGE


def test_header_ends_where_its_jump_says() -> None:
    """A header that claims to reach to 0x301 does not run into the memory map."""
    image = bytearray(make_bzimage(jump=0xFFEB))
    image[0x26C:0x400] = b"\xaa" * (0x400 - 0x26C)
    page = load(bytes(image))[2]
    assert page[0x26C:0x290] == b"\xaa" * 0x24
    assert page[0x290:0x2D0] == bytes(0x40)


def test_memory_map_has_at_most_128_entries() -> None:
    """128 entries fill the table exactly; one more is refused instead of cut off."""
    spare = [(1 << 40 | n << 12, 4096, E820_RAM) for n in range(200)]
    full = [*make_options().e820, *spare[:124]]
    page = load(make_bzimage(), e820=full)[2]
    assert page[0x1E8] == 128
    assert struct.unpack_from("<QQI", page, 0x2D0 + 127 * 20) == full[127]
    refuse(make_bzimage(), "129 entries", e820=[*full, spare[124]])


# -- the classic way ----------------------------------------------------------------------------------------------


def test_64_bit_entry() -> None:
    """XLF_KERNEL_64: long mode at load address + 0x200, flat segments 0x10 and 0x18, identity map, interrupts off."""
    code = bytes(range(256)) * 5000
    memory, boot, _ = load(make_bzimage(code=code))
    state = boot.state
    assert boot.protocol == "linux64"
    assert boot.packed_because == "the header names no payload"
    assert boot.entry == state.gprs["rip"] == 16 * MIB + 0x200
    assert memory.read(16 * MIB, len(code)) == code
    assert (state.cs.selector, state.cs.l, state.cs.db) == (0x10, 1, 0)
    assert {segment.selector for segment in state.data_segments} == {0x18}
    assert not state.gprs["rflags"] & 1 << 9
    assert state.gdt.limit >= 0x1F
    for gpa in (boot.entry, layout.ZERO_PAGE, layout.CMDLINE, 16 * MIB + 8 * MIB - 1):
        mapped = walk(memory, gpa, cr0=state.cr0, cr3=state.cr3, cr4=state.cr4, efer=state.efer)
        assert (mapped.gpa, mapped.writable) == (gpa, True)


@pytest.mark.parametrize("fields", [{"xloadflags": 0}, {"version": 0x20B}, {"version": 0x206, "relocatable_kernel": 0}])
def test_32_bit_entry(fields: dict[str, int]) -> None:
    """Without a 64-bit entry point: protected mode, paging off, at the start of the code, EBP, EDI, EBX 0."""
    memory, boot, _ = load(make_bzimage(code=b"\x90" * 4096, **fields))
    state = boot.state
    assert boot.protocol == "linux32"
    assert boot.entry == state.gprs["rip"] == (1 if "relocatable_kernel" in fields else 16) * MIB
    assert memory.read(boot.entry, 4096) == b"\x90" * 4096
    assert (state.cr0 & 0x8000_0001, state.efer) == (1, 0)
    assert (state.cs.selector, state.ds.selector, state.es.selector, state.ss.selector) == (0x10,) + (0x18,) * 3
    assert (state.cs.limit, state.ds.limit, state.cs.db) == (0xFFFF_FFFF, 0xFFFF_FFFF, 1)
    assert not any(state.gprs.get(name, 0) for name in ("rbp", "rdi", "rbx"))
    assert state.gprs["rsi"] == layout.ZERO_PAGE


def test_fixed_kernel_is_loaded_at_1m_and_runs_at_pref_address() -> None:
    """A kernel that is not relocatable moves itself: both places must be RAM, and the initrd avoids both."""
    image = make_bzimage(relocatable_kernel=0, initrd_addr_max=25 * MIB - 1)
    _, boot, page = load(image, initrd=INITRD)
    assert boot.entry == MIB + 0x200
    start = field(page, "ramdisk_image")
    assert start == 25 * MIB - 0x3000
    refuse(image, "guest's memory|not all RAM", size=20 * MIB)


@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        ({}, 64 * MIB, 16 * MIB),
        ({"pref_address": 0}, 64 * MIB, 2 * MIB),
        ({"pref_address": 17 * MIB}, 64 * MIB, 18 * MIB),
        ({"pref_address": 1 << 40}, 64 * MIB, 2 * MIB),
        ({"pref_address": 62 * MIB}, 64 * MIB, 2 * MIB),
        ({"kernel_alignment": 0}, 20 * MIB, MIB),
        ({}, 20 * MIB, 2 * MIB),
        ({"version": 0x209, "xloadflags": 0}, 64 * MIB, 2 * MIB),
    ],
)
def test_load_address(fields: dict[str, int], size: int, expected: int) -> None:
    """A relocatable kernel goes to pref_address, or to the lowest aligned place with room for init_size."""
    _, boot, page = load(make_bzimage(**fields), size)
    assert field(page, "code32_start") == expected
    assert boot.entry & -MIB == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"init_size": 0xFFFF_FFFF}, "no RAM for the 4294967295 bytes"),
        ({"init_size": 63 * MIB}, "no RAM for the"),
        ({"kernel_alignment": 3}, "0x3, which is no power of two"),
        ({"kernel_alignment": 0x8000_0000}, "no RAM for the"),
        ({"relocatable_kernel": 0, "pref_address": 0xFFFF_FFFF_FFFF_F000}, "not below 4 GiB"),
        ({"relocatable_kernel": 0, "init_size": 49 * MIB}, "not all RAM"),
    ],
)
def test_kernel_that_does_not_fit(fields: dict[str, int], reason: str) -> None:
    """Sizes and addresses from the header are held against guest memory."""
    refuse(make_bzimage(**fields), reason)


def test_signed_kernel_is_longer_than_syssize() -> None:
    """What follows the code (a signature) is loaded too and is no error."""
    memory, _, _ = load(make_bzimage() + b"signature")
    assert memory.read(16 * MIB + 0x400, 9) == b"signature"


# -- the header ---------------------------------------------------------------------------------------------------


def test_setup_sects_zero_means_four() -> None:
    """Old kernels leave the field 0."""
    memory, _, _ = load(make_bzimage(code=b"\xf4" * 1024, setup_sects=0))
    assert memory.read(16 * MIB, 1025) == b"\xf4" * 1024 + b"\0"


def test_setup_sects_255() -> None:
    """The largest setup code, 128 KiB, is skipped like any other."""
    memory, _, _ = load(make_bzimage(code=b"\xf4" * 1024, setup_sects=255))
    assert memory.read(16 * MIB, 1024) == b"\xf4" * 1024


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no HdrS signature"),
        (b"\x7fELF" + bytes(1000), "no HdrS signature"),
        (make_bzimage()[:0x206], "truncated setup header: the file has 518 bytes"),
        (make_bzimage()[:0x28F], "truncated setup header"),
        (make_bzimage()[:2048], "truncated: 2048 bytes of setup code, the file has 2048"),
        (make_bzimage()[:2100], "truncated: 1024 bytes of code, the file has 52"),
        (make_bzimage(setup_sects=3)[:0x1F1] + b"\xff" + make_bzimage()[0x1F2:], "truncated: 131072 bytes"),
        (make_bzimage(syssize=0xFFFF_FFFF), "truncated"),
        (make_bzimage(version=0x201), "boot protocol 2.01 is too old"),
        (make_bzimage(version=0x0100), "boot protocol 1.00 is too old"),
    ],
)
def test_broken_headers(data: bytes, reason: str) -> None:
    """Each is refused with the file's name and what is wrong."""
    error = refuse(data, reason)
    assert error.path == "kernel"


def test_no_ram_below_640k() -> None:
    """Memory without the low part, where boot_params goes, is refused, not written past."""
    memory = GuestMemory()
    memory.add(MIB, 63 * MIB)
    with pytest.raises(ImageError, match="no RAM at"):
        load_linux(memory, make_image(make_bzimage()), BootOptions())


@pytest.mark.parametrize(
    "options", [{"modules": [Module(INITRD)]}, {"entry": 0x100000}, {"mode": "long"}, {"load_addr": MIB}]
)
def test_options_without_a_meaning(options: dict[str, Any]) -> None:
    """What Linux has no use for is refused, not ignored."""
    refuse(make_bzimage(), "loaded as a Linux kernel, which takes no", **options)


# -- command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "limit"),
    [({}, 2047), ({"cmdline_size": 10}, 10), ({"cmdline_size": 0xFFFF_FFFF}, 0xFFFF)],
)
def test_command_line_limit(fields: dict[str, int], limit: int) -> None:
    """cmdline_size bytes fit, one more is refused and the limit is named."""
    memory, _, _ = load(make_bzimage(**fields), cmdline="x" * limit)
    assert memory.read(layout.CMDLINE, limit + 1) == b"x" * limit + b"\0"
    refuse(make_bzimage(**fields), f"{limit + 1} bytes; this kernel takes at most {limit}", cmdline="x" * (limit + 1))


def test_command_line_before_2_06_has_255_bytes() -> None:
    """cmdline_size is not read where it does not exist (such a kernel is entered in real mode)."""
    image = make_bzimage(version=0x205, cmdline_size=2000)
    load(image, cmdline="x" * 255)
    refuse(image, "256 bytes; this kernel takes at most 255", cmdline="x" * 256)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_command_line_that_is_no_string(text: str) -> None:
    """NULs and lone surrogates are refused."""
    refuse(make_bzimage(), "command line", cmdline=text)


def test_command_line_bytes_are_not_changed() -> None:
    """Bytes of the host's command line that are no UTF-8 reach the guest as they are."""
    memory, _, _ = load(make_bzimage(), cmdline=b"a=\xff\xc3\xa4".decode("utf-8", "surrogateescape"))
    assert memory.read_cstring(layout.CMDLINE) == b"a=\xff\xc3\xa4"


# -- initrd -------------------------------------------------------------------------------------------------------


def test_initrd_is_as_high_as_the_limit_allows() -> None:
    """Page-aligned below initrd_addr_max, which is the last address that may be occupied."""
    memory, _, page = load(make_bzimage(initrd_addr_max=32 * MIB - 1), initrd=INITRD)
    start = field(page, "ramdisk_image")
    assert start == (32 * MIB - len(INITRD.data)) & -4096
    assert memory.read(start, len(INITRD.data)) == INITRD.data


def test_no_initrd_leaves_the_fields_zero() -> None:
    """Linux takes 0 for "none"; so does an empty file."""
    for initrd in (None, ImageFile("empty", b"")):
        page = load(make_bzimage(ramdisk_image=5, ramdisk_size=6), initrd=initrd)[2]
        assert (field(page, "ramdisk_image"), field(page, "ramdisk_size")) == (0, 0)


@pytest.mark.parametrize("unpack", [True, False])
def test_initrd_keeps_clear_of_the_kernel(unpack: bool) -> None:
    """It fits between 1 MiB and the kernel if init_size leaves no room above, and not in the first MiB."""
    data = make_bzimage(compress("gzip", VMLINUX), init_size=16 * MIB)
    _, _, page = load(data, 32 * MIB, initrd=INITRD, unpack=unpack)
    assert field(page, "ramdisk_image") == 16 * MIB - 0x3000
    error = refuse(data, "does not fit", 32 * MIB, initrd=ImageFile("big.cpio", bytes(16 * MIB)), unpack=unpack)
    assert error.path == "big.cpio"


@pytest.mark.parametrize("limit", [0, 0xFFF, MIB - 1])
def test_initrd_limit_without_room(limit: int) -> None:
    """A limit below everything that may be used is an error of the initrd, and the limit is named."""
    error = refuse(make_bzimage(initrd_addr_max=limit, xloadflags=1), "this kernel's limit", initrd=INITRD)
    assert error.path == "initrd"


def test_initrd_larger_than_memory() -> None:
    """It is refused before anything of it is copied."""
    refuse(make_bzimage(), "initial RAM disk of 67108864 bytes", initrd=ImageFile("initrd", bytes(64 * MIB)))


def test_initrd_above_4g() -> None:
    """With XLF_CAN_BE_LOADED_ABOVE_4G an initrd that fits nowhere else goes high, its address in both halves."""
    memory = make_memory()
    memory.add(5 << 30, 64 * MIB)
    e820 = [*make_options().e820, (5 << 30, 64 * MIB, E820_RAM)]
    initrd = ImageFile("initrd", b"x" * (60 * MIB))
    load_linux(memory, make_image(make_bzimage()), make_options(e820=e820, initrd=initrd))
    page = memory.read(layout.ZERO_PAGE, 4096)
    low, high = field(page, "ramdisk_image"), struct.unpack_from("<I", page, 0xC0)[0]
    assert high << 32 | low == (5 << 30) + 4 * MIB
    assert struct.unpack_from("<I", page, 0xC4)[0] == 0
    for fields in ({"xloadflags": 1}, {"xloadflags": 2}):
        with pytest.raises(ImageError, match="does not fit"):
            load_linux(memory, make_image(make_bzimage(**fields)), make_options(e820=e820, initrd=initrd))


def test_initrd_before_protocol_2_03_stays_below_896m() -> None:
    """The field is not there yet: its bytes are not taken for a limit."""
    memory = make_memory(1 << 30)
    image = make_image(make_bzimage(version=0x202, initrd_addr_max=5))
    load_linux(memory, image, make_options(1 << 30, initrd=INITRD))
    start = field(memory.read(linux16.SETUP_BASE, 1024), "ramdisk_image")
    assert start == (0x3800_0000 - len(INITRD.data)) & -4096


# -- the unpacked way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_unpacked_kernel(codec: str) -> None:
    """Every segment is where it was linked to be, bss is zero, and the 64-bit entry is the ELF's."""
    memory = make_memory()
    memory.fill(16 * MIB, MIB, 0xEE)  # what an earlier kernel left there
    image = make_image(make_bzimage(compress(codec, VMLINUX)))
    boot = load_linux(memory, image, make_options())
    assert isinstance(boot, LinuxBoot)
    assert (boot.protocol, boot.packed_because) == ("linux64-unpacked", "")
    assert boot.entry == boot.state.gprs["rip"] == 16 * MIB
    assert check_guest_state(boot.state) == []
    text = bytes(range(1, 250)) * 300
    data_at = (16 * MIB + len(text) + 0xFFF) & -0x1000
    assert memory.read(16 * MIB, len(text)) == text
    assert memory.read(data_at, 4800) == b"per-cpu " * 600
    assert memory.read(data_at + 0x2000, 0x4000) == b"data" * 1000 + bytes(0x4000 - 4000)


@pytest.mark.parametrize("memfd", [False, True])
def test_zero_pages_of_the_kernel_replace_what_was_there(memfd: bool) -> None:
    """Pages of zeros are not copied, yet they are zero afterwards, also in memory that was used before."""
    text = b"\x01" * 4096 + bytes(3 * 4096) + b"\x02" * 100 + bytes(8 * MIB) + b"\x03" * 5000
    memory = make_memory(memfd=memfd)
    memory.fill(16 * MIB, 9 * MIB, 0xEE)
    image = make_image(make_bzimage(compress("lz4", make_vmlinux(text=text)), init_size=16 * MIB))
    load_linux(memory, image, make_options())
    assert memory.read(16 * MIB, len(text)) == text


def test_kernel_of_many_lz4_blocks() -> None:
    """A kernel over several 8 MiB blocks, its segments crossing their borders, comes out whole."""
    text = b"".join(struct.pack("<Q", n) * 512 for n in range(3 * LZ4_BLOCK // 4096))
    memory, boot, _ = load(make_bzimage(compress("lz4", make_vmlinux(text=text)), init_size=32 * MIB))
    assert boot.protocol == "linux64-unpacked"
    assert memory.read(16 * MIB, len(text)) == text


def test_relocations_after_the_elf_are_left_out() -> None:
    """CONFIG_RELOCATABLE appends a table to vmlinux inside the payload: it is no segment and goes nowhere."""
    memory, boot, _ = load(make_bzimage(compress("xz", VMLINUX + b"reloc" * 1000)))
    assert boot.protocol == "linux64-unpacked"
    assert b"reloc" not in memory.read(16 * MIB, 2 * MIB)


def test_unpack_on_request_only() -> None:
    """unpack=False takes the classic way and says so."""
    _, boot, _ = load(make_bzimage(compress("gzip", VMLINUX)), unpack=False)
    assert (boot.protocol, boot.packed_because) == ("linux64", "on request")
    assert boot.entry == 16 * MIB + 0x200


def test_lzo_falls_back() -> None:
    """A compression that cannot be undone here is left to the kernel, and the reason is kept."""
    _, boot, _ = load(make_bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100)))
    assert (boot.protocol, boot.packed_because) == ("linux64", "lzo compression")


def test_32_bit_kernel_unpacked() -> None:
    """An ELF32 in the payload is entered in protected mode."""
    payload = compress("gzip", make_vmlinux(bits=32))
    _, boot, _ = load(make_bzimage(payload, xloadflags=0))
    assert boot.protocol == "linux32-unpacked"
    assert boot.entry == boot.state.gprs["rip"] == 16 * MIB
    assert boot.state.efer == 0


HIGH = 0xFFFF_FFFF_8000_0000


@pytest.mark.parametrize(
    ("elf", "reason"),
    [
        (b"MZ" + bytes(5000), "the unpacked kernel is not an ELF file"),
        (b"\x7fELF\x02\x01", "the unpacked kernel truncated ELF header"),
        (make_elf([], 0), "the unpacked kernel the entry point 0x0 is in no"),
        (make_elf([(16 * MIB, HIGH, b"x" * 10, 5)], 16 * MIB), "has 0xa bytes"),
        (make_elf([(16 * MIB, HIGH, b"x", 48 * MIB + 1)], 16 * MIB), "not in guest RAM"),
        (make_elf([(1 << 33, HIGH, b"x", 1)], 1 << 33), "not in guest RAM"),
        (make_elf([((1 << 64) - 4096, HIGH, b"x", 4096)], (1 << 64) - 4096), "not in guest RAM"),
        (make_elf([(0x7000, HIGH, b"x", 1)], 0x7000), "overlaps another or the first MiB"),
        (make_elf([(MIB, HIGH, b"x", 4097), (MIB + 4096, HIGH, b"y", 1)], MIB), "overlaps another"),
        (make_elf([(16 * MIB, HIGH, b"x", 1)], 17 * MIB), "the entry point 0x1100000 is in no"),
        (make_elf([(16 * MIB, HIGH, b"x" * 9000, 9000)], 16 * MIB)[:-5000], "has 0x2328 bytes"),
    ],
)
def test_hostile_elf_in_the_payload(elf: bytes, reason: str) -> None:
    """The ELF headers inside are checked like any others; nothing falls back, for the kernel is broken."""
    refuse(make_bzimage(compress("gzip", elf)), reason)


@pytest.mark.parametrize("codec", CODECS[:-1])
def test_corrupt_payload_is_an_error(codec: str) -> None:
    """The guest could not unpack it either: no classic boot of a broken kernel."""
    payload = compress(codec, VMLINUX)
    cut = payload[: len(payload) // 2] + payload[-4:]
    refuse(make_bzimage(cut), "the compressed kernel is corrupt")


def test_payload_larger_than_memory() -> None:
    """A declared size beyond the guest's RAM is refused before a byte is unpacked."""
    payload = compress("gzip", VMLINUX)[:-4] + struct.pack("<I", 64 * MIB)
    refuse(make_bzimage(payload), "unpacks to 67108864 bytes: more than the guest's RAM")


# -- the 16-bit protocol ------------------------------------------------------------------------------------------

LKRN = {"version": 0x207, "code32_start": 0, "relocatable_kernel": 0, "xloadflags": 0, "initrd_addr_max": 0xFFFF_FFFF}


@pytest.mark.parametrize("fields", [LKRN, {"version": 0x205}, {"version": 0x202}])
def test_16_bit_entry(fields: dict[str, int]) -> None:
    """Images without a 32-bit entry point: setup code at 0x90000, entered as 9020:0000 by way of the BIOS."""
    image = make_bzimage(code=b"\xf4" * 2000, **fields)
    memory, boot, _ = load(image, initrd=INITRD, cmdline="quiet")
    assert (boot.protocol, boot.packed_because) == ("linux16", "it is entered in real mode")
    state = boot.state
    assert (state.cs.selector, boot.entry) == (0xF000, 0xF0000 + state.gprs["rip"])
    assert {(s.selector, s.base) for s in state.data_segments} == {(0x9000, 0x90000)}
    assert state.gprs["rsp"] == 0x9800
    assert state.cr0 & 1 == 0
    assert b"\xea\x00\x00\x20\x90" in memory.read(boot.entry, 256), "it goes on with a jump to 9020:0000"
    setup = memory.read(0x90000, 2048)
    assert setup[:0x1F1] == image[:0x1F1]
    assert field(setup, "type_of_loader") == 0xFF
    assert field(setup, "loadflags") == 0x81
    assert field(setup, "heap_end_ptr") == 0x9600
    assert field(setup, "code32_start") == fields.get("code32_start", 0x100000)
    assert memory.read_cstring(field(setup, "cmd_line_ptr")) == b"quiet"
    assert memory.read(field(setup, "ramdisk_image"), field(setup, "ramdisk_size")) == INITRD.data
    assert memory.read(MIB, 2000) == b"\xf4" * 2000


def test_zimage_goes_low() -> None:
    """Without LOADED_HIGH the code goes to 64 KiB, and not over the setup code."""
    memory, boot, _ = load(make_bzimage(code=b"\xf4" * 2000, loadflags=0, code32_start=0x1000))
    assert boot.protocol == "linux16"
    assert memory.read(0x10000, 2000) == b"\xf4" * 2000
    assert field(memory.read(0x90000, 1024), "code32_start") == 0x1000
    refuse(make_bzimage(code=b"\xf4" * (0x80000 + 16), loadflags=0), "too large for low memory")


def test_16_bit_limits() -> None:
    """Setup code over 32 KiB and command lines over 2047 bytes do not fit into the real-mode segment."""
    load(make_bzimage(setup_sects=63, **LKRN))
    refuse(make_bzimage(setup_sects=64, **LKRN), "33280 bytes of setup code; real mode has room for 32768")
    refuse(make_bzimage(cmdline_size=4096, **LKRN), "takes at most 2047", cmdline="x" * 2048)


def test_bios_has_vectors_data_area_and_memory_map() -> None:
    """Every interrupt ends in the BIOS; the sizes of INT 12h and INT 15h are the machine's."""
    memory, _, _ = load(make_bzimage(**LKRN))
    vectors = list(struct.iter_unpack("<HH", memory.read(0, 1024)))
    assert all(segment == 0xF000 and 0xE010 < offset < 0xE000 + len(bios16.CODE) for offset, segment in vectors)
    assert len({offset for offset, _ in vectors[0x10:0x1B]}) > 6
    assert memory.read_u16(0x413) == 639
    assert memory.read_u16(0x40E) == 0x9FC0
    count, above_1m, below_16m, blocks = struct.unpack("<4H", memory.read(bios16.BASE, 8))
    assert (count, above_1m, below_16m, blocks) == (4, 63 << 10, 15 << 10, 48 << 4)
    table = memory.read(bios16.BASE + len(bios16.CODE), 80)
    assert list(struct.iter_unpack("<QQI", table)) == list(make_options().e820)


def test_bios_needs_memory_below_1m() -> None:
    """A machine without RAM in the BIOS area cannot start a real-mode kernel, and that is said."""
    memory = GuestMemory()
    memory.add(0, 0xA0000)
    memory.add(MIB, 63 * MIB)
    with pytest.raises(ImageError, match="lacks the memory for a BIOS"):
        load_linux(memory, make_image(make_bzimage(**LKRN)), BootOptions())


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("ld"), reason="binutils are not installed")
def test_bios_bytes_are_the_assembled_source(tmp_path: Path) -> None:
    """CODE in bios16.py is what bios16.S says."""
    source = Path(bios16.__file__).with_suffix(".S")
    binary = tmp_path / "bios16.bin"
    subprocess.run(["as", "--32", "-o", tmp_path / "bios16.o", source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext=0xe000", "-e", "0", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, tmp_path / "bios16.o"], check=True)
    assert binary.read_bytes() == bios16.CODE


# -- real images, where Debian's packages are installed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "protocol"),
    [
        ("/boot/memtest86+x64.bin", "linux64"),
        ("/boot/memtest86+ia32.bin", "linux32"),
        ("/boot/ipxe.lkrn", "linux16"),
    ],
)
def test_debian_images(path: str, protocol: str) -> None:
    """memtest86+ offers both modes, iPXE neither; all are loaded by the protocol that their header asks for."""
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    boot = load_linux(make_memory(), ImageFile(path), make_options())
    assert boot.protocol == protocol
    assert check_guest_state(boot.state) == []


# -- fuzzing ------------------------------------------------------------------------------------------------------

SEEDS = [
    make_bzimage(compress("gzip", VMLINUX), init_size=MIB),
    make_bzimage(compress("lz4", VMLINUX), init_size=MIB),
    make_bzimage(make_vmlinux(text=b"\x90" * 100), init_size=MIB),
    make_bzimage(**LKRN),
    make_bzimage(loadflags=0),
]
INTERESTING = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(SEEDS), st.booleans(), st.sampled_from([0, MIB, 2 * MIB, 20 * MIB]))
def test_mutated_images_boot_or_are_refused(data: st.DataObject, seed: bytes, unpack: bool, initrd: int) -> None:
    """Any header field may hold anything, any byte may be flipped, the file may end anywhere."""
    image = bytearray(seed)
    for name in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3)):
        offset, form = FIELDS[name]
        size = struct.calcsize(form)
        value = data.draw(INTERESTING | st.integers(0, (1 << 8 * size) - 1)) & ((1 << 8 * size) - 1)
        if name != "magic":
            image[offset : offset + size] = value.to_bytes(size, "little")
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(image) - 1), st.integers(0, 255)), max_size=3)):
        image[at] = value
    del image[data.draw(st.just(len(image)) | st.integers(0, len(image))) :]
    memory = make_memory(32 * MIB)
    disk = ImageFile("initrd", bytes(initrd)) if initrd else None
    try:
        boot = load_linux(memory, make_image(bytes(image)), make_options(32 * MIB, unpack=unpack, initrd=disk))
    except ImageError:
        return
    finally:
        memory.close()
    assert isinstance(boot, Boot)
    assert check_guest_state(boot.state) == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2048), st.text(max_size=40))
def test_arbitrary_files_are_refused(data: bytes, cmdline: str) -> None:
    """Any bytes with a signature in the right place give a Boot or an ImageError."""
    image = data[:0x202].ljust(0x202, b"\0") + b"HdrS" + data[0x202:]
    memory = make_memory(2 * MIB)
    try:
        load_linux(memory, make_image(image), make_options(2 * MIB, cmdline=cmdline))
    except ImageError:
        pass
    finally:
        memory.close()
