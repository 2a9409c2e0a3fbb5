"""The ELF reader and the loader of plain ELF kernels."""

from __future__ import annotations

import struct
import time

import pytest
from builders import CODE, MIB, PT_INTERP, Section, Segment, elf, file, guest_ram, note, options
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.boot.elf import load_elf, parse_elf, place_segments
from pykvm.boot.image import Boot, ImageFile
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import CR0_PG, EFER_LMA

GOOD = [Segment(MIB, CODE, memsz=0x2000), Segment(2 * MIB, b"data")]


@pytest.mark.parametrize("bits", [32, 64])
def test_headers_are_read(bits: int) -> None:
    """Class, machine, entry and segments come out as they were put in."""
    parsed = parse_elf(file(elf(bits, GOOD, entry=MIB + 1)))
    assert (parsed.bits, parsed.machine, parsed.entry) == (bits, 3 if bits == 32 else 62, MIB + 1)
    assert [(each.paddr, each.filesz, each.memsz) for each in parsed.loads()] == [
        (MIB, 5, 0x2000),
        (2 * MIB, 4, 4),
    ]


def test_a_real_program_is_read() -> None:
    """The running Python's own loadable file parses, with its build-id note."""
    parsed = parse_elf(ImageFile("/proc/self/exe"))
    assert parsed.loads() and parsed.sections() is not None
    assert all(each.name for each in parsed.notes())


@pytest.mark.parametrize("bits", [32, 64])
def test_kernel_starts_in_the_mode_of_its_class(bits: int) -> None:
    """ELF32 gets protected mode, ELF64 long mode; the state is one that hardware enters."""
    with guest_ram() as memory:
        boot = load_elf(memory, file(elf(bits, GOOD, entry=MIB)), options())
        assert (boot.protocol, boot.entry, boot.state.gprs["rip"]) == (f"elf{bits}", MIB, MIB)
        assert bool(boot.state.efer & EFER_LMA) == bool(boot.state.cr0 & CR0_PG) == (bits == 64)
        assert check_guest_state(boot.state) == []
        assert memory.read(MIB, 6) == CODE + b"\0"
        assert memory.read(2 * MIB, 5) == b"data\0"


def test_bss_is_cleared_whatever_was_there() -> None:
    """memsz beyond filesz is zero even in memory that a previous run dirtied; its neighbours stay."""
    with guest_ram() as memory:
        memory.fill(MIB, 4 * MIB, 0xEE)
        small = [Segment(MIB, CODE, memsz=100), Segment(2 * MIB, CODE, memsz=MIB + 0x1234)]
        place_segments(memory, file(image := elf(64, small)), parse_elf(file(image)))
        assert memory.read(MIB + 5, 95) == bytes(95)
        assert memory.read_u8(MIB + 100) == 0xEE
        assert memory.read(2 * MIB + 5, MIB + 0x1234 - 5) == bytes(MIB + 0x1234 - 5)
        assert memory.read_u8(3 * MIB + 0x1234) == 0xEE


def test_virtual_entry_is_translated() -> None:
    """Where vaddr and paddr differ the entry is taken through its segment; a physical one is left alone."""
    high = [Segment(MIB, CODE, vaddr=0xFFFFFFFF80100000)]
    assert parse_elf(file(elf(64, high, entry=0xFFFFFFFF80100002))).physical_entry() == MIB + 2
    assert parse_elf(file(elf(64, high, entry=MIB + 2))).physical_entry() == MIB + 2
    with pytest.raises(ImageError, match="in no loaded segment"):
        parse_elf(file(elf(64, high, entry=2 * MIB))).physical_entry()


def test_an_explicit_entry_wins() -> None:
    """options.entry replaces the header's."""
    with guest_ram() as memory:
        boot = load_elf(memory, file(elf(32, GOOD, entry=0)), options(entry=MIB + 2))
        assert boot.state.gprs["rip"] == MIB + 2


def test_notes_are_read_with_their_padding() -> None:
    """Names and descriptors are padded to 4; several segments and several notes are joined."""
    image = elf(64, [note(b"Xen", 18, b"\1\0\0\0"), note(b"GNU", 3, b"abcde"), *GOOD])
    assert [(each.name, each.type, each.desc) for each in parse_elf(file(image)).notes()] == [
        (b"Xen", 18, b"\1\0\0\0"),
        (b"GNU", 3, b"abcde"),
    ]


def test_notes_aligned_to_8() -> None:
    """.note.gnu.property pads to 8: the next note starts there."""
    first = struct.pack("<III4s", 4, 4, 5, b"GNU\0") + b"\1\2\3\4\0\0\0\0"
    second = struct.pack("<III4s", 4, 8, 5, b"GNU\0") + bytes(8)
    segment = Segment(0, first + second, type=4, memsz=0, align=8)
    assert [each.desc for each in parse_elf(file(elf(64, [segment, *GOOD]))).notes()] == [b"\1\2\3\4", bytes(8)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"filesz": 1 << 40}, "bytes of notes"),
        ({"filesz": 1 << 20, "offset": 0}, "truncated: a note segment"),
        ({"filesz": 17}, "truncated: the note at"),
    ],
)
def test_truncated_notes_are_refused(fields: dict[str, int], reason: str) -> None:
    """A note segment past the file, or a note past its segment, is an error, not a shorter note."""
    segment = note(b"Xen", 18, b"\1\0\0\0")
    segment.fields |= fields
    with pytest.raises(ImageError, match=reason):
        parse_elf(file(elf(64, [segment, *GOOD]))).notes()


def test_notes_are_bounded_in_time() -> None:
    """A thousand note segments over the same zeros end in an error within a second, not in a list of millions."""
    zeros = Segment(0, bytes(1 << 19), type=4, memsz=0, align=4)
    data = bytearray(elf(64, [zeros, *[Segment(0, b"", type=4, align=4) for _ in range(1000)]]))
    first = data[64 : 64 + 56]
    for index in range(1001):
        data[64 + 56 * index : 64 + 56 * (index + 1)] = first
    start = time.monotonic()
    with pytest.raises(ImageError, match="bytes of notes"):
        parse_elf(file(bytes(data))).notes()
    assert time.monotonic() - start < 1


BAD_HEADERS = [
    (b"", "is not an ELF file"),
    (b"\x7fELF", "wrong ELF class"),
    (b"\x7fELF\x03" + bytes(60), "wrong ELF class"),
    (elf(32, GOOD)[:51], "truncated ELF header: 51 of 52"),
    (elf(64, GOOD)[:63], "truncated ELF header: 63 of 64"),
    (b"\x7fELF\x02\x02" + elf(64, GOOD)[6:], "big-endian"),
    (elf(64, GOOD, machine=183), "is for ELF machine 183"),
    (elf(64, GOOD, type=1), "relocatable object"),
    (elf(64, GOOD, type=4), "core dump"),
    (elf(64, GOOD, phentsize=32), "program headers of 32 bytes"),
    (elf(64, GOOD, phnum=0xFFFF), "has 65535 program headers"),
    (elf(64, GOOD, phnum=1000), "truncated: the program headers end"),
    (elf(64, GOOD, phoff=1 << 63), "truncated: the program headers end"),
    (elf(64, [], phnum=0), "no loadable segment"),
    (elf(64, [Segment(0, b"", memsz=0)]), "no loadable segment"),
    (elf(64, [Segment(MIB, CODE, memsz=4)]), "filesz 0x5 > memsz 0x4"),
    (elf(64, [Segment(MIB, CODE, filesz=500, memsz=500)]), "truncated: the segment at 0x100000"),
    (elf(64, [Segment(MIB, CODE, offset=1 << 63)]), "truncated: the segment at 0x100000"),
    (elf(64, [Segment((1 << 64) - 4096, CODE, memsz=8192)]), "wraps the address space"),
    (elf(32, [Segment((1 << 32) - 4096, CODE, memsz=8192)]), "wraps the address space"),
    (elf(64, [Segment(MIB, CODE), Segment(MIB + 4, CODE)]), "overlaps another"),
    (elf(64, [Segment(MIB, CODE, memsz=MIB), Segment(MIB, CODE, memsz=MIB)]), "overlaps another"),
    (elf(64, [Segment(15 * MIB, CODE, memsz=MIB + 1)], entry=15 * MIB), "is not all RAM"),
    (elf(64, [Segment(0x9F000, CODE, memsz=0x2000)], entry=0x9F000), "is not all RAM"),
    (elf(64, [Segment(1 << 40, CODE)], entry=1 << 40), "is not below 4 GiB"),
    (elf(64, [Segment(0x9000, CODE)], entry=0x9000), "boot-time page tables"),
    (elf(32, [Segment(0x500, CODE)], entry=0x500), "boot-time GDT"),
    (elf(64, GOOD, entry=16 * MIB), "in no loaded segment"),
    (elf(64, [Segment(0, b"/lib/ld.so\0", type=PT_INTERP), *GOOD]), "dynamically linked program"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_HEADERS, ids=[reason for _, reason in BAD_HEADERS])
def test_bad_files_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    """Each hostile or mistaken header is an ImageError that names the file, and no byte is loaded."""
    with guest_ram() as memory:
        memory.fill(0, 16 * MIB, 0x5A)
        with pytest.raises(ImageError, match=reason) as caught:
            load_elf(memory, file(data, "bad.elf"), options())
        assert caught.value.path == "bad.elf"
        assert memory.read(0, 16 * MIB).count(0x5A) == 16 * MIB


def test_page_tables_do_not_matter_to_protected_mode() -> None:
    """ELF32 may load where only long mode needs tables."""
    with guest_ram() as memory:
        assert load_elf(memory, file(elf(32, [Segment(0x9000, CODE)], entry=0x9000)), options()).entry == 0x9000


@pytest.mark.parametrize("extra", [{"cmdline": "x"}, {"initrd": file(b"x")}, {"load_addr": MIB}])
def test_options_without_a_meaning_are_refused(extra: dict[str, object]) -> None:
    """A plain ELF kernel could not find its command line or initrd: better an error than silence."""
    with guest_ram() as memory, pytest.raises(ImageError, match="which takes no"):
        load_elf(memory, file(elf(64, GOOD)), options(**extra))


@pytest.mark.parametrize("bits", [32, 64])
def test_the_headers_of_the_file_need_no_ram(bits: int) -> None:
    """What `ld -Ttext 0x100000` makes: a segment with the file's headers at 0xff000, where no RAM is, is left out."""
    headers = Segment(MIB - 4096, b"", offset=0, filesz=0x74, memsz=0x74)
    with guest_ram() as memory:
        load_elf(memory, file(elf(bits, [headers, *GOOD])), options())
        assert not any(memory.read(MIB - 4096, 4096))
        assert memory.read(MIB, 5) == CODE
        load_elf(memory, file(data := elf(bits, [headers, *GOOD])), options(e820=()))
        assert memory.read(MIB - 4096, 0x74) == data[:0x74]
        more = Segment(MIB - 4096, b"", offset=0, filesz=0x174, memsz=0x174)
        with pytest.raises(ImageError, match="is not all RAM"):
            load_elf(memory, file(elf(bits, [more, *GOOD], prefix=bytes(0x200))), options())


def test_a_machine_without_low_memory_is_refused() -> None:
    """Without memory for the boot-time tables there is no start, and no other exception than ImageError."""
    memory = GuestMemory()
    memory.add(MIB, 4 * MIB)
    with pytest.raises(ImageError, match="cannot be started without memory at"):
        load_elf(memory, file(elf(64, GOOD)), options(e820=()))
    memory.close()


def test_the_end_of_memory_is_usable() -> None:
    """A segment that ends exactly with RAM is legal."""
    with guest_ram() as memory:
        load_elf(memory, file(elf(64, [Segment(15 * MIB, CODE, memsz=MIB)], entry=15 * MIB)), options())


def test_sections_are_all_or_nothing() -> None:
    """A complete table is returned; one that is truncated or of a wrong entry size is as good as none."""
    image = elf(64, GOOD, sections=[Section(0, b""), Section(2, b"symbols"), Section(3, b"\0name\0")])
    sections = parse_elf(file(image)).sections()
    assert [(each.type, each.size) for each in sections] == [(0, 0), (2, 7), (3, 6)]
    assert parse_elf(file(image[:-1])).sections() == []
    assert parse_elf(file(elf(64, GOOD, shentsize=40, shnum=1))).sections() == []


def test_huge_addresses_of_elf64_are_left_to_the_guest() -> None:
    """Segments above 4 GiB load if there is RAM; only the entry must be where the identity map reaches."""
    with guest_ram() as memory:
        memory.add(layout.HIGH_RAM, MIB)
        image = elf(64, [Segment(MIB, CODE), Segment(layout.HIGH_RAM, b"high")], entry=MIB)
        load_elf(memory, file(image), options(e820=()))
        assert memory.read(layout.HIGH_RAM, 4) == b"high"


VALID = elf(64, [note(b"Xen", 4, b"x"), *GOOD], sections=[Section(2, b"symbols")])


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.integers(0, len(VALID)),
)
def test_mutated_files_load_or_are_refused(edits: list[tuple[int, bytes]], cut: int) -> None:
    """A valid file with any bytes changed and any length gives a Boot or an ImageError, nothing else."""
    data = bytearray(VALID)
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    image = file(bytes(data[: len(VALID) - (cut if edits else 0)]))
    with guest_ram() as memory:
        try:
            parse_elf(image).notes()
            boot = load_elf(memory, image, options())
        except ImageError:
            return
        assert isinstance(boot, Boot)
        assert check_guest_state(boot.state) == []
