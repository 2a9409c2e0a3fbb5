"""vmlinux files: the PVH boot ABI, and boot_params for those without its note."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import MIB, field, make_elf, make_image, make_memory, make_note, make_options, make_vmlinux

from pykvm.boot.elf import parse_elf
from pykvm.boot.image import E820_RAM, Boot, ImageFile, Module
from pykvm.boot.pvh import load_vmlinux, pvh_entry
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state

ENTRY = 16 * MIB + 0x123
NOTES = make_note(b"Xen", 18, struct.pack("<Q", ENTRY))
LINUX = make_note(b"Xen", 6, b"linux\0")
INITRD = ImageFile("initrd", bytes(range(256)) * 40)
HIGH = 0xFFFF_FFFF_8000_0000


def load(data: bytes, **options: Any) -> tuple[GuestMemory, Boot]:
    """Load `data` into 64 MiB; the state is checked as hardware would check it."""
    memory = make_memory()
    boot = load_vmlinux(memory, make_image(data), make_options(**options))
    assert check_guest_state(boot.state) == []
    return memory, boot


def refuse(data: bytes, match: str, **options: Any) -> ImageError:
    """The ImageError of loading `data`, whose reason matches."""
    with pytest.raises(ImageError, match=match) as caught:
        load_vmlinux(make_memory(), make_image(data), make_options(**options))
    return caught.value


def start_info(memory: GuestMemory) -> tuple[int, ...]:
    """magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries, reserved."""
    return struct.unpack("<IIIIQQQQII", memory.read(layout.PVH_START_INFO, 56))


# -- PVH ----------------------------------------------------------------------------------------------------------


def test_pvh_state() -> None:
    """The ABI's state: EBX is start_info, CR0.PE alone, flat 32-bit segments, a busy TSS of limit 0x67, IF off."""
    memory, boot = load(make_vmlinux(notes=NOTES))
    state = boot.state
    assert (boot.protocol, boot.entry, state.gprs["rip"]) == ("pvh", ENTRY, ENTRY)
    assert state.gprs["rbx"] == layout.PVH_START_INFO
    assert (state.cr0 & ~0x10, state.cr4, state.efer) == (1, 0, 0)  # ET is hardwired to 1
    for segment in (state.cs, state.ds, state.es, state.ss):
        assert (segment.base, segment.limit, segment.db) == (0, 0xFFFF_FFFF, 1)
    assert (state.tr.base, state.tr.limit, state.tr.type) == (0, 0x67, 0xB)
    assert not state.gprs["rflags"] & (1 << 8 | 1 << 9 | 1 << 17)
    assert memory.read(16 * MIB, 10) == bytes(range(1, 11))


def test_start_info() -> None:
    """Magic, version 1 with the memory map, command line and RSDP; no modules means a null list."""
    memory, _ = load(make_vmlinux(notes=NOTES), cmdline="root=/dev/vda")
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = start_info(memory)
    assert (magic, version, flags, modules, modlist, reserved) == (0x336EC578, 1, 0, 0, 0, 0)
    assert memory.read_cstring(cmdline) == b"root=/dev/vda"
    assert rsdp == 0xE0000
    table = list(struct.iter_unpack("<QQII", memory.read(memmap, 24 * entries)))
    assert table == [(*entry, 0) for entry in make_options().e820]


def test_modules() -> None:
    """The initrd is the first module; others follow with their own command lines, none overlaps another."""
    others = [Module(ImageFile("m1", b"one"), "first one"), Module(ImageFile("m2", b"two" * 5000))]
    memory, _ = load(make_vmlinux(notes=NOTES), initrd=INITRD, modules=others)
    count, modlist = start_info(memory)[3:5]
    assert count == 3
    entries = list(struct.iter_unpack("<QQQQ", memory.read(modlist, 96)))
    contents = [memory.read(gpa, size) for gpa, size, _, _ in entries]
    assert contents == [INITRD.data, b"one", b"two" * 5000]
    assert entries[0][0] == (64 * MIB - len(INITRD.data)) & -4096
    assert [entry[2] != 0 for entry in entries] == [False, True, False]
    assert memory.read_cstring(entries[1][2]) == b"first one"
    assert all(entry[3] == 0 for entry in entries)


def test_tables_are_bounded() -> None:
    """Command lines of modules that do not fit into the 64 KiB of tables are refused."""
    modules = [Module(ImageFile("m", b"x"), "y" * 40000)] * 2
    refuse(make_vmlinux(notes=NOTES), "bytes of tables; 65536 are there", modules=modules)
    load(make_vmlinux(notes=NOTES), modules=modules[:1])


@pytest.mark.parametrize(("notes", "limit"), [(NOTES, 0xFFFF), (NOTES + LINUX, 2047)])
def test_command_line_limit(notes: bytes, limit: int) -> None:
    """Linux, known by its note, cuts what is longer than 2047 bytes: that is an error here; others have room."""
    memory, _ = load(make_vmlinux(notes=notes), cmdline="x" * limit)
    assert memory.read_cstring(layout.CMDLINE, 0x10000) == b"x" * limit
    refuse(make_vmlinux(notes=notes), f"takes at most {limit}", cmdline="x" * (limit + 1))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(0, "0x0 is in no loaded segment"), (17 * MIB, "in no loaded"), (0xFFFF_FFFF, "in no loaded segment")],
)
def test_entry_outside_the_kernel(entry: int, reason: str) -> None:
    """The note's entry point must be in a segment; so must one that the user gives."""
    refuse(make_vmlinux(notes=make_note(b"Xen", 18, struct.pack("<I", entry))), reason)
    refuse(make_vmlinux(notes=NOTES), reason, entry=entry)


def test_entry_option_overrides_the_note() -> None:
    """`--entry` is honoured."""
    assert load(make_vmlinux(notes=NOTES), entry=16 * MIB + 8)[1].state.gprs["rip"] == 16 * MIB + 8


@pytest.mark.parametrize(
    "desc", [struct.pack("<I", ENTRY), struct.pack("<Q", ENTRY), struct.pack("<Q", 5 << 32 | ENTRY)]
)
def test_note_of_4_or_8_bytes(desc: bytes) -> None:
    """The ABI's note has 4 bytes, Linux's 8; the entry is the low 32 bits of either."""
    assert pvh_entry(parse_elf(make_image(make_vmlinux(notes=make_note(b"Xen", 18, desc))))) == ENTRY


@pytest.mark.parametrize(
    "note",
    [make_note(b"Xen", 18, b"\1\2\3"), make_note(b"GNU", 18, bytes(8)), make_note(b"Xen", 17, bytes(8)), b""],
)
def test_what_is_no_pvh_note(note: bytes) -> None:
    """Too short, of another owner, of another type, absent."""
    assert pvh_entry(parse_elf(make_image(make_vmlinux(notes=note)))) is None


def test_truncated_note_is_refused() -> None:
    """A note that runs past its segment is an error, not skipped."""
    refuse(make_vmlinux(notes=struct.pack("<III", 4, 1000, 18) + b"Xen\0"), "truncated: the note")


def test_segment_over_boot_tables() -> None:
    """A kernel linked over the boot-time structures is refused; one elsewhere in low memory is not."""
    refuse(make_elf([(0x6000, 0x6000, b"x", 1)], 0x6000, notes=make_note(b"Xen", 18, b"\0\x60\0\0")), "holds boot-time")
    low = make_elf([(0x40000, 0x40000, b"\xf4", 1)], 0x40000, bits=32, notes=make_note(b"Xen", 18, b"\0\0\4\0"))
    assert load(low)[1].entry == 0x40000


def test_initrd_that_does_not_fit() -> None:
    """The error is the initrd's."""
    error = refuse(make_vmlinux(notes=NOTES), "does not fit", initrd=ImageFile("big", bytes(60 * MIB)))
    assert error.path == "big"


@pytest.mark.parametrize("options", [{"mode": "long"}, {"load_addr": MIB}])
def test_options_without_a_meaning(options: dict[str, Any]) -> None:
    """They are refused, not ignored."""
    refuse(make_vmlinux(notes=NOTES), "which takes no", **options)


# -- without the note ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [64, 32])
def test_vmlinux_without_a_note(bits: int) -> None:
    """boot_params in RSI, in the mode of the file's class, at the physical entry point."""
    memory, boot = load(make_vmlinux(bits=bits), initrd=INITRD, cmdline="quiet")
    assert (boot.protocol, boot.entry) == (f"vmlinux{bits}", 16 * MIB)
    assert boot.state.gprs["rsi"] == layout.ZERO_PAGE
    assert bool(boot.state.efer & 1 << 10) == (bits == 64)
    page = memory.read(layout.ZERO_PAGE, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert (field(page, "boot_flag"), field(page, "version"), field(page, "type_of_loader")) == (0xAA55, 0x20C, 0xFF)
    assert (field(page, "loadflags"), field(page, "cmd_line_ptr")) == (1, layout.CMDLINE)
    assert memory.read(field(page, "ramdisk_image"), field(page, "ramdisk_size")) == INITRD.data
    assert page[0x1E8] == 4
    assert struct.unpack_from("<Q", page, 0x70)[0] == 0xE0000
    assert memory.read_cstring(layout.CMDLINE) == b"quiet"


def test_vmlinux_without_a_note_takes_no_modules() -> None:
    """boot_params has room for one initrd only."""
    refuse(make_vmlinux(), "takes no modules", modules=[Module(INITRD)])


def test_initrd_prefers_the_first_2_gib() -> None:
    """Without a header to say otherwise the limit is the one of every Linux; beyond it only if it must be."""
    memory = make_memory()
    memory.add(0x7F00_0000, 32 * MIB)
    e820 = [*make_options().e820, (0x7F00_0000, 32 * MIB, E820_RAM)]
    load_vmlinux(memory, make_image(make_vmlinux()), make_options(e820=e820, initrd=INITRD))
    assert field(memory.read(layout.ZERO_PAGE, 4096), "ramdisk_image") == (0x8000_0000 - len(INITRD.data)) & -4096


# -- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elf",
    [
        make_elf([(16 * MIB, HIGH, b"x" * 10, 5)], 16 * MIB),
        make_elf([(60 * MIB, HIGH, b"x", 5 * MIB)], 60 * MIB),
        make_elf([((1 << 64) - 1, HIGH, b"x", 100)], 16 * MIB),
        make_elf([(16 * MIB, HIGH, b"x", 8192), (16 * MIB + 4096, HIGH, b"y", 1)], 16 * MIB),
        make_elf([(16 * MIB, HIGH, b"x", 1)], 1 << 40),
        make_elf([], 0),
        make_vmlinux(notes=NOTES)[:-20],
        make_vmlinux()[:100],
        b"",
    ],
)
def test_hostile_elf(elf: bytes) -> None:
    """filesz > memsz, outside RAM, wrapping, overlapping, entry nowhere, truncated: all refused."""
    refuse(elf, "^kernel: .+")


SEEDS = [make_vmlinux(text=b"\x90" * 64, notes=NOTES + LINUX), make_vmlinux(text=b"\x90" * 64, bits=32, notes=NOTES)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(SEEDS))
def test_mutated_files_boot_or_are_refused(data: st.DataObject, seed: bytes) -> None:
    """Whatever bytes of headers and notes change, the answer is a Boot or an ImageError."""
    image = bytearray(seed)
    headers = st.integers(0, 300) | st.integers(len(image) - 64, len(image) - 1)
    for at, value in data.draw(st.lists(st.tuples(headers, st.integers(0, 255)), min_size=1, max_size=4)):
        image[at] = value
    memory = make_memory(32 * MIB)
    try:
        pvh_entry(parse_elf(make_image(bytes(image))))
        boot = load_vmlinux(memory, make_image(bytes(image)), make_options(32 * MIB))
    except ImageError:
        return
    finally:
        memory.close()
    assert check_guest_state(boot.state) == []
