"""Multiboot 1: where headers are honoured, what is loaded, and every field of the information structure."""

from __future__ import annotations

import struct

import pytest
from builders import CODE, E820_16M, MIB, Section, Segment, elf, file, guest_ram, multiboot_header, options
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.boot.image import Boot, Module
from pykvm.boot.multiboot import find_header, load_multiboot
from pykvm.core.memory import GuestMemory
from pykvm.errors import ImageError
from pykvm.x86 import layout
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import CR0_PE, CR0_PG, EFER_LMA

KLUDGE = 1 << 16
ELF32 = elf(32, [Segment(MIB, CODE, memsz=0x3000)], prefix=multiboot_header(3))


def raw(*, flags: int = KLUDGE, before: int = 0, body: bytes = CODE, **fields: int) -> bytes:
    """A raw image whose header, `before` bytes into it, loads all of it at 1 MiB."""
    addresses = {
        "header_addr": MIB + before, "load_addr": MIB, "load_end": 0, "bss_end": 0, "entry": MIB + before + 32,
    } | fields  # fmt: skip
    return bytes(before) + multiboot_header(flags, *addresses.values()) + body


class Info:
    """The multiboot information in guest memory, read back by the offsets of the specification."""

    def __init__(self, memory: GuestMemory, boot: Boot) -> None:
        self.memory = memory
        self.at = boot.state.gprs["rbx"]
        self.flags = self.u32(0)

    def u32(self, offset: int) -> int:
        return self.memory.read_u32(self.at + offset)

    def string(self, offset: int) -> bytes:
        return self.memory.read_cstring(self.u32(offset), 1 << 16)

    def modules(self) -> list[tuple[int, int, bytes, int]]:
        rows = [self.memory.read(self.u32(24) + 16 * index, 16) for index in range(self.u32(20))]
        parsed = [struct.unpack("<IIII", row) for row in rows]
        return [(start, end, self.memory.read_cstring(text), zero) for start, end, text, zero in parsed]

    def mmap(self) -> list[tuple[int, int, int]]:
        at, end, entries = self.u32(48), self.u32(48) + self.u32(44), []
        while at < end:
            size, base, length, kind = struct.unpack("<IQQI", self.memory.read(at, 24))
            entries.append((base, length, kind))
            at += size + 4
        assert at == end
        return entries


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (multiboot_header(), 0),
        (bytes(8192 - 12) + multiboot_header(), 8192 - 12),
        (bytes(8192 - 8) + multiboot_header(), None),
        (bytes(2) + multiboot_header(), None),
        (multiboot_header(checksum=1), None),
        (multiboot_header(checksum=1) + multiboot_header(), 12),
        (multiboot_header()[:11], None),
        (b"", None),
    ],
)
def test_header_search(data: bytes, expected: int | None) -> None:
    """A header counts if it is aligned to 4, complete within 8 KiB, and its checksum holds."""
    assert find_header(data) == expected


@pytest.mark.parametrize(
    ("name", "data", "entry"),
    [
        ("elf32", ELF32, MIB),
        ("elf64", elf(64, [Segment(MIB, CODE)], prefix=multiboot_header(0)), MIB),
        ("elf64 linked high", elf(64, [Segment(MIB, CODE, vaddr=0xFFFFFFFF80100000)],
                                  entry=0xFFFFFFFF80100000, prefix=multiboot_header()), MIB),
        ("raw", raw(), MIB + 32),
        ("raw, header at the limit", raw(before=8192 - 32), MIB + 8192),
        ("elf with addresses", elf(32, [Segment(4 * MIB, CODE)], prefix=multiboot_header(
            KLUDGE, MIB + 88, MIB, 0, 0, MIB + 120)), MIB + 120),
    ],
)  # fmt: skip
def test_every_format_the_specification_allows(name: str, data: bytes, entry: int) -> None:
    """ELF by program headers, anything by the header's addresses: 32-bit protected mode with the magic in EAX."""
    with guest_ram() as memory:
        boot = load_multiboot(memory, file(data), options())
        state = boot.state
        assert (boot.protocol, boot.entry, state.gprs["rip"]) == ("multiboot", entry, entry), name
        assert (state.gprs["rax"], state.gprs["rbx"]) == (0x2BADB002, layout.MULTIBOOT_INFO)
        assert state.cr0 & (CR0_PE | CR0_PG) == CR0_PE and not state.efer & EFER_LMA
        assert check_guest_state(state) == []
        assert memory.read(entry, 2) in (CODE[:2], data[entry - MIB : entry - MIB + 2])


def test_raw_load_end_and_bss() -> None:
    """load_end_addr ends what is copied, bss_end_addr what is cleared."""
    with guest_ram() as memory:
        memory.fill(MIB, 0x4000, 0xEE)
        data = raw(body=b"A" * 100 + b"B" * 100, load_end=MIB + 132, bss_end=MIB + 0x2000)
        load_multiboot(memory, file(data), options())
        assert memory.read(MIB + 32, 101) == b"A" * 100 + b"\0"
        assert not any(memory.read(MIB + 132, 0x2000 - 132))
        assert memory.read_u8(MIB + 0x2000) == 0xEE


def test_raw_may_skip_the_start_of_the_file() -> None:
    """Loading starts at the header's offset minus (header_addr - load_addr)."""
    with guest_ram() as memory:
        data = b"skip" * 4 + raw(entry=MIB + 32)
        load_multiboot(memory, file(data), options())
        assert memory.read(MIB, 4) == b"\x02\xb0\xad\x1b"


def test_information_is_complete() -> None:
    """Memory sizes, command line, memory map, loader name: each with its flag, the rest without."""
    with guest_ram() as memory:
        memory.fill(layout.MULTIBOOT_INFO, 512, 0xEE)
        boot = load_multiboot(memory, file(ELF32, "k.elf"), options(cmdline="a=1 b"))
        info = Info(memory, boot)
        assert info.flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
        assert (info.u32(4), info.u32(8)) == (639, 15 * 1024)
        assert info.string(16) == b"k.elf a=1 b"
        assert info.string(64) == b"pykvm"
        assert info.mmap() == list(E820_16M)
        assert info.modules() == []
        assert [info.u32(offset) for offset in (12, *range(28, 44, 4), 52, 56, 60, 68, 88, 112)] == [0] * 11


def test_without_an_e820_the_slots_are_the_map() -> None:
    """Writable slots are RAM, read-only ones reserved; mem_lower ends at 640 KiB."""
    with guest_ram() as memory:
        memory.add(0xFFFF0000, 0x10000, readonly=True, name="firmware")
        info = Info(memory, load_multiboot(memory, file(ELF32), options(e820=())))
        assert info.mmap() == [(0, 16 * MIB, 1), (0xFFFF0000, 0x10000, 2)]
        assert (info.u32(4), info.u32(8)) == (640, 15 * 1024)


def test_modules_have_pages_and_strings_of_their_own() -> None:
    """The initrd is the first; each is page-aligned, above the kernel's bss, in order, with its own string."""
    contents = [b"I" * 5000, b"", b"M" * 4096, b"N"]
    with guest_ram() as memory:
        modules = [Module(file(contents[1], "empty")), Module(file(contents[2], "m"), "x=1 y"),
                   Module(file(contents[3], "n"), "ä")]  # fmt: skip
        boot = load_multiboot(memory, file(ELF32), options(initrd=file(contents[0], "initrd"), modules=modules))
        found = Info(memory, boot).modules()
        assert [text for _, _, text, _ in found] == [b"initrd", b"empty", b"m x=1 y", "n ä".encode()]
        assert [memory.read(start, end - start) for start, end, _, _ in found] == contents
        assert all(start % 4096 == 0 and start >= MIB + 0x3000 for start, _, _, _ in found)
        assert [start for start, *_ in found] == sorted({start for start, *_ in found})
        assert {zero for *_, zero in found} == {0}


def test_modules_skip_holes_in_the_memory_map() -> None:
    """A module goes only where all of it is RAM."""
    e820 = ((0, 0x9FC00, 1), (MIB, 0x10000, 1), (MIB + 0x10000, 0x1000, 3), (MIB + 0x11000, MIB, 1))
    with guest_ram() as memory:
        boot = load_multiboot(memory, file(ELF32), options(e820=e820, initrd=file(b"x" * 0xE000)))
        assert [start for start, *_ in Info(memory, boot).modules()] == [MIB + 0x11000]


def test_modules_stay_below_the_pci_hole() -> None:
    """With RAM only above 4 GiB left there is no room."""
    e820 = ((0, 2 * MIB, 1), (1 << 32, 8 * MIB, 1))
    with guest_ram() as memory:
        memory.add(1 << 32, 8 * MIB)
        with pytest.raises(ImageError, match="no room for 1048576 bytes"):
            load_multiboot(memory, file(ELF32), options(e820=e820, initrd=file(bytes(MIB), "initrd")))


def test_symbols_are_loaded() -> None:
    """Flag 5: the section headers, and every section that no segment holds, are in memory."""
    sections = [
        Section(0, b""),
        Section(1, b"", addr=MIB, size=0x3000),
        Section(2, b"symtab" * 3000),
        Section(8, b"", size=1 << 30),
        Section(3, b"\0strtab"),
    ]
    data = elf(32, [Segment(MIB, CODE, memsz=0x3000)], prefix=multiboot_header(), sections=sections)
    with guest_ram() as memory:
        boot = load_multiboot(memory, file(data), options(initrd=file(b"i" * 5000)))
        info = Info(memory, boot)
        assert info.flags & 1 << 5
        count, size, addr, names = (info.u32(offset) for offset in range(28, 44, 4))
        assert (count, size, names) == (5, 40, 4)
        headers = [struct.unpack("<10I", memory.read(addr + 40 * index, 40)) for index in range(5)]
        assert headers[1][3] == MIB
        assert headers[3][3] == 0
        assert memory.read(headers[2][3], 18000) == b"symtab" * 3000
        assert memory.read(headers[4][3], 7) == b"\0strtab"
        assert min(headers[2][3], headers[4][3], addr) >= info.modules()[-1][1]
        assert memory.read(info.modules()[0][0], 5000) == b"i" * 5000


@pytest.mark.parametrize(
    "sections",
    [
        [Section(2, b"x", size=1 << 31)],
        [Section(2, b"x", offset=1 << 31)],
        [Section(2, b"", offset=0, size=200) for _ in range(50)],
    ],
)
def test_damaged_symbols_are_left_out(sections: list[Section]) -> None:
    """A section table that lies costs the kernel its symbols, not its start."""
    data = elf(32, [Segment(MIB, CODE)], prefix=multiboot_header(), sections=sections)
    with guest_ram() as memory:
        assert not Info(memory, load_multiboot(memory, file(data), options())).flags & 1 << 5


def test_symbols_never_fail_for_lack_of_memory() -> None:
    """When the sections do not fit, the kernel still starts."""
    data = elf(32, [Segment(MIB, CODE)], prefix=multiboot_header(), sections=[Section(2, bytes(3 * MIB))])
    with guest_ram() as memory:
        e820 = ((0, 2 * MIB, 1),)
        assert not Info(memory, load_multiboot(memory, file(data), options(e820=e820))).flags & 1 << 5


def test_video_mode_is_a_recommendation() -> None:
    """Flag bit 2 starts the kernel without a display, as GRUB and QEMU do; no video field is set."""
    data = multiboot_header(KLUDGE | 4, MIB, MIB, 0, 0, MIB + 48) + struct.pack("<4I", 0, 800, 600, 32) + CODE
    with guest_ram() as memory:
        assert not Info(memory, load_multiboot(memory, file(data), options())).flags & (1 << 11 | 1 << 12)


REFUSED = [
    ("no header", bytes(100), "no multiboot header"),
    ("unknown required flags", multiboot_header(0x38), "unknown features \\(flags 0x38\\)"),
    ("flat without addresses", multiboot_header(0) + CODE, "is not an ELF file"),
    ("addresses cut off", multiboot_header(KLUDGE) + bytes(19), "truncated multiboot header"),
    ("addresses past 8 KiB", bytes(8180) + multiboot_header(KLUDGE, 0, 0, 0, 0, 0), "truncated multiboot header"),
    ("load above header", raw(load_addr=MIB + 4), "load_addr 0x100004 is above header_addr"),
    ("before the file", raw(load_addr=MIB - 16, header_addr=MIB), "before the start of the file"),
    ("wild header_addr", raw(header_addr=0xFFFFFFFF), "before the start of the file"),
    ("end below start", raw(load_end=MIB - 1), "load_end_addr 0xfffff is below"),
    ("end past the file", raw(load_end=MIB + 4096), "truncated: its multiboot header asks for 4096 bytes"),
    ("bss inside data", raw(bss_end=MIB + 8), "bss_end_addr 0x100008 is below"),
    ("bss past memory", raw(bss_end=0xFFFFFFFF), "is not all RAM"),
    ("nothing to load", raw(load_end=MIB), "nothing to load"),
    ("entry outside", raw(entry=4 * MIB), "entry point 0x400000 is not in the loaded image"),
    ("on the information", raw(load_addr=0x1F000, header_addr=0x1F000, bss_end=0x20000, entry=0x1F020),
     "the multiboot information"),
    ("on the GDT", raw(load_addr=0x500, header_addr=0x500, entry=0x520), "the boot-time GDT"),
    ("on the ACPI tables", raw(load_addr=0xE0000, header_addr=0xE0000, entry=0xE0020), "is not all RAM"),
    ("past memory", raw(load_addr=16 * MIB, header_addr=16 * MIB, entry=16 * MIB),
     "entry point 0x1000000 is outside guest memory"),
    ("above 4 GiB", elf(64, [Segment(MIB, CODE), Segment(1 << 32, CODE)], prefix=multiboot_header()),
     "a segment above 4 GiB"),
    ("overlapping segments", elf(32, [Segment(MIB, CODE), Segment(MIB, CODE)], prefix=multiboot_header()),
     "overlaps another"),
    ("truncated segment", ELF32[:-1], "truncated: the segment"),
    ("another machine", elf(32, [Segment(MIB, CODE)], machine=40, prefix=multiboot_header()), "ELF machine 40"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_bad_files_are_refused_with_a_reason(name: str, data: bytes, reason: str) -> None:
    """Each is an ImageError that names the file, before the kernel's memory is touched."""
    with guest_ram() as memory:
        memory.fill(0, 16 * MIB, 0x5A)
        with pytest.raises(ImageError, match=reason) as caught:
            load_multiboot(memory, file(data, "bad"), options())
        assert caught.value.path == "bad", name
        assert memory.read(0, 16 * MIB).count(0x5A) == 16 * MIB


def test_a_machine_without_room_for_the_information_is_refused() -> None:
    """A raw kernel may fit in 64 KiB of memory, the multiboot information does not."""
    memory = GuestMemory()
    memory.add(0, 0x10000)
    data = raw(header_addr=0x2000, load_addr=0x2000, entry=0x2020)
    with pytest.raises(ImageError, match=r"without memory at .* for the multiboot information"):
        load_multiboot(memory, file(data), options(e820=()))
    memory.close()


def test_too_long_strings_are_refused() -> None:
    """All strings and tables share 64 KiB."""
    with guest_ram() as memory, pytest.raises(ImageError, match="exceed 64 KiB"):
        load_multiboot(memory, file(ELF32), options(cmdline="x" * 70000))


@pytest.mark.parametrize("cmdline", ["a\0b", "\ud800"])
def test_strings_that_no_guest_can_get_are_refused(cmdline: str) -> None:
    """A NUL inside, or what no encoding has, is an error and not a shorter string."""
    with guest_ram() as memory, pytest.raises(ImageError, match="command line"):
        load_multiboot(memory, file(ELF32), options(cmdline=cmdline))


def test_bytes_of_the_host_command_line_arrive_unchanged() -> None:
    """Arguments that are no UTF-8 (surrogateescape) reach the guest as the bytes they were."""
    with guest_ram() as memory:
        boot = load_multiboot(memory, file(ELF32, "k"), options(cmdline=b"\xff\xfe".decode("utf-8", "surrogateescape")))
        assert Info(memory, boot).string(16) == b"k \xff\xfe"


def test_a_module_that_does_not_fit_is_named() -> None:
    """The error names the module, not the kernel."""
    with guest_ram() as memory, pytest.raises(ImageError, match="no room for") as caught:
        load_multiboot(memory, file(ELF32), options(initrd=file(bytes(16 * MIB), "huge")))
    assert caught.value.path == "huge"


def test_an_explicit_entry_wins() -> None:
    """options.entry replaces the image's; a load address has no meaning here."""
    with guest_ram() as memory:
        assert load_multiboot(memory, file(ELF32), options(entry=MIB + 2)).state.gprs["rip"] == MIB + 2
        with pytest.raises(ImageError, match="takes no load address"):
            load_multiboot(memory, file(ELF32), options(load_addr=MIB))


WORDS = st.sampled_from([0, 1, MIB, 0x7FFFFFFF, 0xFFFFFFFF]) | st.integers(0, 1 << 32)
SEEDS = [raw(before=16), ELF32, elf(64, [Segment(MIB, CODE)], prefix=multiboot_header(), sections=[Section(2, b"s")])]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    words=st.lists(st.tuples(st.integers(0, 60), WORDS), max_size=5),
    cut=st.integers(0, 40),
)
def test_mutated_files_load_or_are_refused(seed: bytes, words: list[tuple[int, int]], cut: int) -> None:
    """Valid images with any words changed and any length give a Boot or an ImageError, nothing else."""
    data = bytearray(seed)
    for index, value in words:
        at = index * 4 % (len(data) - 4)
        data[at : at + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
    header = find_header(seed)
    assert header is not None
    flags = struct.unpack_from("<I", data, header + 4)[0]
    data[header : header + 12] = multiboot_header(flags)  # keep the checksum: the rest is what is tested
    with guest_ram() as memory:
        try:
            boot = load_multiboot(memory, file(bytes(data[: len(data) - cut])), options(initrd=file(b"initrd")))
        except ImageError:
            return
        assert check_guest_state(boot.state) == []
        assert Info(memory, boot).modules()[0][2] == b"kernel"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_after_a_header_load_or_are_refused(data: bytes) -> None:
    """Garbage behind a valid header gives a Boot or an ImageError."""
    with guest_ram() as memory:
        try:
            boot = load_multiboot(memory, file(multiboot_header(KLUDGE) + data), options())
        except ImageError:
            return
        assert check_guest_state(boot.state) == []
