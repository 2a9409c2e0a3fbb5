"""Multiboot 2: header tags granted and refused, relocation, and the information tags."""

from __future__ import annotations

import struct

import pytest
from builders import (
    CODE,
    E820_16M,
    MIB,
    Section,
    Segment,
    elf,
    file,
    guest_ram,
    multiboot2_header,
    options,
    tag,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.boot.image import Boot, Module
from pykvm.boot.multiboot2 import find_header, load_multiboot2
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import CR0_PE, CR0_PG, EFER_LMA

REQUEST, ADDRESS, ENTRY, CONSOLE, FRAMEBUFFER, ALIGN, EFI_BS, EFI32, EFI64, RELOCATABLE = range(1, 11)


def elf2(*tags: bytes, bits: int = 32, at: int = MIB, **fields: object) -> bytes:
    """An ELF kernel with a multiboot 2 header of these tags."""
    segments = [Segment(at, CODE, memsz=0x3000)]
    return elf(bits, segments, entry=at, prefix=multiboot2_header(*tags), **fields)  # type: ignore[arg-type]


def raw2(*tags: bytes, before: int = 0, **fields: int) -> bytes:
    """A raw image with an address tag that loads all of it at 1 MiB, and an entry tag at its end."""
    addresses = {"header_addr": MIB + before, "load_addr": MIB, "load_end": 0, "bss_end": 0} | fields
    entry = addresses.pop("entry", MIB)
    header = multiboot2_header(tag(ADDRESS, words(*addresses.values())), tag(ENTRY, words(entry)), *tags)
    return bytes(before) + header + CODE


def relocatable(low: int = 0, high: int = 0xFFFFFFFF, align: int = 4096, preference: int = 0) -> bytes:
    """The relocatable tag."""
    return tag(RELOCATABLE, words(low, high, align, preference))


def read_tags(memory: GuestMemory, boot: Boot) -> list[tuple[int, bytes]]:
    """The information structure, checked for its framing: (type, body) of each tag but the last."""
    at = boot.state.gprs["rbx"]
    total, reserved = memory.read_u32(at), memory.read_u32(at + 4)
    assert (at % 8, reserved, total % 8) == (0, 0, 0)
    tags, offset = [], 8
    while True:
        kind, size = memory.read_u32(at + offset), memory.read_u32(at + offset + 4)
        assert 8 <= size <= total - offset
        if kind == 0:
            assert (size, offset + 8) == (8, total)
            return tags
        tags.append((kind, memory.read(at + offset + 8, size - 8)))
        offset += (size + 7) & ~7


def load(data: bytes, **kwargs: object) -> list[tuple[int, bytes]]:
    """Load and return the information tags."""
    with guest_ram() as memory:
        return read_tags(memory, load_multiboot2(memory, file(data), options(**kwargs)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (multiboot2_header(), 0),
        (bytes(32768 - 24) + multiboot2_header(), 32768 - 24),
        (bytes(32768 - 8) + multiboot2_header(), None),
        (bytes(4) + multiboot2_header(), None),
        (multiboot2_header()[:15], None),
        (multiboot2_header()[:12] + bytes(12), None),
        (b"", None),
    ],
)
def test_header_search(data: bytes, expected: int | None) -> None:
    """A header counts if it is aligned to 8, in the first 32 KiB, and its checksum holds."""
    assert find_header(data) == expected


@pytest.mark.parametrize(
    ("name", "data", "entry"),
    [
        ("elf32", elf2(), MIB),
        ("elf64", elf2(bits=64), MIB),
        ("entry tag", elf2(tag(ENTRY, words(MIB + 2)), bits=64), MIB + 2),
        ("raw", raw2(entry=MIB + 56), MIB + 56),
        ("raw from the file's start", raw2(before=64, load_addr=0xFFFFFFFF, entry=MIB), MIB),
    ],
)
def test_every_format_is_entered_in_protected_mode(name: str, data: bytes, entry: int) -> None:
    """32-bit protected mode, the magic in EAX and the information in EBX, whatever the file's class."""
    with guest_ram() as memory:
        boot = load_multiboot2(memory, file(data), options())
        state = boot.state
        assert (boot.protocol, boot.entry, state.gprs["rip"]) == ("multiboot2", entry, entry), name
        assert (state.gprs["rax"], state.gprs["rbx"]) == (0x36D76289, layout.MULTIBOOT_INFO)
        assert state.cr0 & (CR0_PE | CR0_PG) == CR0_PE and not state.efer & EFER_LMA
        assert check_guest_state(state) == []
        assert dict(read_tags(memory, boot))[21] == words(MIB)


def test_raw_image_is_where_its_addresses_say() -> None:
    """The address tag's load and bss ends are honoured."""
    with guest_ram() as memory:
        memory.fill(MIB, 0x4000, 0xEE)
        data = raw2(load_end=MIB + 56, bss_end=MIB + 0x2000)
        load_multiboot2(memory, file(data), options())
        assert memory.read(MIB, 56) == data[:56]
        assert not any(memory.read(MIB + 56, 0x2000 - 56))
        assert memory.read_u8(MIB + 0x2000) == 0xEE


def test_information_tags() -> None:
    """Command line, loader name, memory sizes, memory map and load base are always there."""
    tags = dict(load(elf2(), cmdline="a=1 b"))
    assert tags[1] == b"a=1 b\0"
    assert tags[2] == b"pykvm\0"
    assert tags[4] == words(639, 15 * 1024)
    assert tags[6][:8] == words(24, 0)
    assert [struct.unpack_from("<QQII", tags[6], 8 + 24 * index) for index in range(3)] == [
        (*entry, 0) for entry in E820_16M
    ]
    assert set(tags) == {1, 2, 4, 6, 21}


def test_modules_have_tags_of_their_own() -> None:
    """One tag per module, initrd first, with start, end and the module's own arguments."""
    with guest_ram() as memory:
        modules = [Module(file(b"M" * 5000, "m"), "x=1"), Module(file(b"N", "n"))]
        boot = load_multiboot2(memory, file(elf2()), options(initrd=file(b"I"), modules=modules))
        found = [(*struct.unpack_from("<II", body), body[8:]) for kind, body in read_tags(memory, boot) if kind == 3]
        assert [text for _, _, text in found] == [b"\0", b"x=1\0", b"\0"]
        assert [memory.read(start, end - start) for start, end, _ in found] == [b"I", b"M" * 5000, b"N"]
        assert all(start % 4096 == 0 and start >= MIB + 0x3000 for start, _, _ in found)


def rsdp(revision: int, rsdt: int) -> bytes:
    """A root system description pointer (checksums do not matter to a loader)."""
    return struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"PYKVM ", revision, rsdt, 36, 0xE1000, 0)


@pytest.mark.parametrize(
    ("revision", "rsdt", "expected"),
    [(0, 0xE0040, {14: 20}), (2, 0, {15: 36}), (2, 0xE0040, {14: 20, 15: 36}), (0, 0, {})],
)
def test_rsdp_is_copied(revision: int, rsdt: int, expected: dict[int, int]) -> None:
    """The old tag if there is an RSDT, the new one from ACPI 2.0 on."""
    table = rsdp(revision, rsdt)
    with guest_ram() as memory:
        memory.write(0xE0000, table)
        boot = load_multiboot2(memory, file(elf2()), options(rsdp=0xE0000))
        found = {kind: body for kind, body in read_tags(memory, boot) if kind in (14, 15)}
        assert found == {kind: table[:size] for kind, size in expected.items()}


@pytest.mark.parametrize("address", [0xE0000, 16 * MIB - 4, 1 << 40])
def test_an_rsdp_that_is_none_is_not_copied(address: int) -> None:
    """No signature, or no memory there: no tag."""
    assert not {14, 15} & dict(load(elf2(), rsdp=address)).keys()


def test_symbols_are_loaded() -> None:
    """The ELF sections tag has every header; symbols and strings are in memory above the modules."""
    sections = [Section(0, b""), Section(2, b"symtab" * 100), Section(3, b"\0names")]
    with guest_ram() as memory:
        boot = load_multiboot2(memory, file(elf2(bits=64, sections=sections)), options(initrd=file(b"i" * 5000)))
        body = dict(read_tags(memory, boot))[9]
        assert struct.unpack_from("<III", body) == (3, 64, 2)
        headers = [struct.unpack_from("<IIQQQQIIQQ", body, 12 + 64 * index) for index in range(3)]
        assert memory.read(headers[1][3], 600) == b"symtab" * 100
        assert memory.read(headers[2][3], 6) == b"\0names"
        assert headers[1][3] >= MIB + 0x3000 + 5000


def test_symbols_that_do_not_fit_are_left_out() -> None:
    """More section headers than the information area holds, or a table that lies: the kernel starts without."""
    many = [Section(2, b"") for _ in range(1100)]
    assert 9 not in dict(load(elf2(bits=64, sections=many)))
    assert 9 not in dict(load(elf2(bits=64, sections=[Section(2, b"", size=1 << 50)])))


GRANTED = [
    ("requests", tag(REQUEST, words(1, 2, 3, 4, 6, 9, 21))),
    ("optional unknown request", tag(REQUEST, words(5, 7, 8, 999), flags=1)),
    ("optional unknown tag", tag(999, b"whatever", flags=1)),
    ("console, not required", tag(CONSOLE, words(2))),
    ("console, optional", tag(CONSOLE, words(1), flags=1)),
    ("framebuffer", tag(FRAMEBUFFER, words(1024, 768, 32))),
    ("module alignment", tag(ALIGN)),
    ("EFI boot services", tag(EFI_BS)),
    ("EFI entries", tag(EFI32, words(0x1234)) + tag(EFI64, words(0x1234))),
    ("sizes that need padding", tag(REQUEST, words(1)) + tag(ENTRY, words(MIB + 3))),
]


@pytest.mark.parametrize(("name", "tags"), GRANTED, ids=[name for name, _ in GRANTED])
def test_tags_that_are_granted(name: str, tags: bytes) -> None:
    """Requests that are met, recommendations, EFI tags on a machine without EFI, and optional tags load."""
    assert load(elf2(tags)), name


REFUSED = [
    ("no header", bytes(100), "no multiboot 2 header"),
    ("other architecture", multiboot2_header(architecture=4), "architecture 4"),
    ("header past the file", multiboot2_header(length=4096), "header of 4096 bytes is not all"),
    ("header too short", multiboot2_header(length=8) + CODE, "header of 8 bytes is not all"),
    ("header past 32 KiB", multiboot2_header(length=40000) + bytes(50000), "is not all in the first 32 KiB"),
    ("tag of size 0", elf2(tag(5, size=0)), "tag 5 has a wrong size \\(0\\)"),
    ("tag past the header", elf2(tag(5, size=4096)), "tag 5 has a wrong size"),
    ("short address tag", elf2(tag(ADDRESS, words(1, 2))), "tag 2 has a wrong size"),
    ("short relocatable tag", elf2(tag(RELOCATABLE, words(1))), "tag 10 has a wrong size"),
    ("unknown tag", elf2(tag(999)), "requires tag 999"),
    ("framebuffer info", elf2(tag(REQUEST, words(6, 8))), "tags \\[8\\]"),
    ("RSDP of a machine without ACPI", elf2(tag(REQUEST, words(15, 14))), "tags \\[14, 15\\]"),
    ("symbols of a raw image", raw2(tag(REQUEST, words(9))), "tags \\[9\\]"),
    ("console", elf2(tag(CONSOLE, words(3))), "there is no display"),
    ("no entry tag", multiboot2_header(tag(ADDRESS, words(MIB, MIB, 0, 0))), "without an entry address tag"),
    ("load above header", raw2(load_addr=MIB + 8), "load_addr 0x100008 is above header_addr"),
    ("header before the file's start", raw2(before=64, header_addr=32, load_addr=0xFFFFFFFF), "is below the header"),
    ("before the file", raw2(load_addr=MIB - 8), "before the start of the file"),
    ("entry outside", raw2(entry=0x1234), "is not in the loaded image"),
    ("no format", multiboot2_header() + CODE, "is not an ELF file"),
    ("past memory", elf2(at=16 * MIB), "is outside guest memory"),
    ("on the information", elf2(at=0x1F000), "the multiboot information"),
    ("wrong alignment", elf2(relocatable(align=3)), "no power of two"),
    ("nowhere to go", elf2(relocatable(low=16 * MIB)), "no RAM for its 0x3000 bytes in \\[0x1000000, 0xffffffff\\]"),
    ("empty range", elf2(relocatable(low=4 * MIB, high=2 * MIB)), "no RAM for its"),
    ("aligned too well", elf2(relocatable(low=2 * MIB, align=1 << 31)), "no RAM for its"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_bad_files_are_refused_with_a_reason(name: str, data: bytes, reason: str) -> None:
    """Each is an ImageError that names the file, and no byte of memory is touched."""
    with guest_ram() as memory:
        memory.fill(0, 16 * MIB, 0x5A)
        with pytest.raises(ImageError, match=reason) as caught:
            load_multiboot2(memory, file(data, "bad"), options())
        assert caught.value.path == "bad", name
        assert memory.read(0, 16 * MIB).count(0x5A) == 16 * MIB


@pytest.mark.parametrize(
    ("at", "constraint", "base"),
    [
        (MIB, relocatable(), MIB),
        (MIB, relocatable(low=3 * MIB), 3 * MIB),
        (MIB, relocatable(low=3 * MIB + 1, align=0), 3 * MIB + 4096),
        (MIB, relocatable(low=3 * MIB + 1, align=1 << 21), 4 * MIB),
        (5 * MIB, relocatable(preference=1), MIB),
        (MIB, relocatable(preference=2), 16 * MIB - 0x3000),
        (MIB, relocatable(preference=2, high=8 * MIB - 1), 8 * MIB - 0x3000),
        (8 * MIB, relocatable(high=8 * MIB + 0x2FFE), MIB),
        (8 * MIB, relocatable(high=8 * MIB + 0x2FFF), 8 * MIB),
        (64 * MIB, relocatable(), MIB),
        (0x10000, relocatable(), MIB),
        (0, relocatable(align=1 << 20), MIB),
    ],
)
def test_relocatable_images_go_where_they_may(at: int, constraint: bytes, base: int) -> None:
    """Linked address if it is allowed and free; else the lowest or, if preferred, the highest place in range."""
    with guest_ram() as memory:
        boot = load_multiboot2(memory, file(elf2(constraint, at=at)), options(initrd=None))
        assert (boot.entry, boot.state.gprs["rip"]) == (base, base)
        assert memory.read(base, len(CODE)) == CODE
        assert dict(read_tags(memory, boot))[21] == words(base)


def test_too_long_strings_are_refused() -> None:
    """All tags share 64 KiB."""
    with pytest.raises(ImageError, match="exceed 64 KiB"):
        load(elf2(), cmdline="x" * 70000)


def test_options_of_other_formats_are_refused() -> None:
    """An explicit entry replaces the image's; a load address has no meaning here."""
    with guest_ram() as memory:
        assert load_multiboot2(memory, file(elf2()), options(entry=MIB + 2)).state.gprs["rip"] == MIB + 2
        with pytest.raises(ImageError, match="takes no load address"):
            load_multiboot2(memory, file(elf2()), options(load_addr=MIB))


SEEDS = [
    elf2(tag(REQUEST, words(1, 6)), relocatable(), bits=64, sections=[Section(2, b"symbols")]),
    raw2(tag(CONSOLE, words(0)), before=8),
    raw2(relocatable(preference=2)),
]
WORDS = st.sampled_from([0, 1, 8, MIB, 0x7FFFFFFF, 0xFFFFFFFF]) | st.integers(0, (1 << 32) - 1)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 60), WORDS), max_size=5),
    cut=st.integers(0, 40),
)
def test_mutated_files_load_or_are_refused(seed: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    """Valid images with any words changed and any length give a Boot or an ImageError, nothing else."""
    data = bytearray(seed)
    for index, value in edits:
        at = index * 4 % (len(data) - 4)
        data[at : at + 4] = value.to_bytes(4, "little")
    header = find_header(seed)
    assert header is not None
    length = struct.unpack_from("<I", data, header + 8)[0]
    data[header : header + 16] = multiboot2_header(length=length)[:16]  # the checksum holds: the rest is tested
    with guest_ram() as memory:
        try:
            boot = load_multiboot2(memory, file(bytes(data[: len(data) - cut])), options(initrd=file(b"initrd")))
        except ImageError:
            return
        assert check_guest_state(boot.state) == []
        assert 3 in dict(read_tags(memory, boot))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), length=st.integers(0, 300))
def test_arbitrary_tags_load_or_are_refused(data: bytes, length: int) -> None:
    """Garbage in place of the tags gives a Boot or an ImageError."""
    with guest_ram() as memory:
        try:
            boot = load_multiboot2(memory, file(multiboot2_header(length=length)[:16] + data), options())
        except ImageError:
            return
        assert check_guest_state(boot.state) == []
