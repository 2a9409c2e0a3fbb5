"""fw_cfg: items, files, and DMA as a hostile guest would use it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.core.memory import GuestMemory
from pykvm.devices.fw_cfg import KEY_FILE_DIR, KEY_MAX_CPUS, KEY_NB_CPUS, KEY_RAM_SIZE, FwCfg
from pykvm.errors import ConfigError

SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16

RAM_END = 0x20000  # two slots that touch at 0x10000
HIGH = 0x1_0000_0000
HIGH_END = HIGH + 0x2000
ROM, ROM_END = 0xFFFC_0000, 0xFFFC_1000
DESCRIPTOR = 0x1000
TARGET = 0x2000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """128 KiB of RAM in two slots, a ROM, and RAM above 4 GiB."""
    made = make_memory()
    yield made
    made.close()


def make_memory() -> GuestMemory:
    """Guest memory with every kind of edge."""
    made = GuestMemory()
    made.add(0, 0x10000)
    made.add(0x10000, 0x10000)
    made.add(ROM, ROM_END - ROM, name="rom", readonly=True)
    made.add(HIGH, HIGH_END - HIGH)
    return made


@pytest.fixture
def device(memory: GuestMemory) -> FwCfg:
    """A device with a read-only and a writable file."""
    made = FwCfg(memory)
    made.add_file("opt/text", b"0123456789")
    made.add_file("opt/slot", bytes(8), writable=True)
    return made


def read_item(device: FwCfg, key: int, length: int) -> bytes:
    """The first bytes of an item through the data port."""
    device.write(SELECTOR, 2, key)
    return bytes(device.read(DATA, 1) for _ in range(length))


def directory(device: FwCfg) -> dict[str, tuple[int, int]]:
    """The file directory: name -> (key, size)."""
    (count,) = struct.unpack(">I", read_item(device, KEY_FILE_DIR, 4))
    entries = [struct.unpack(">IHH56s", bytes(device.read(DATA, 1) for _ in range(64))) for _ in range(count)]
    return {name.rstrip(b"\0").decode(): (key, size) for size, key, _, name in entries}


def dma(device: FwCfg, memory: GuestMemory, control: int, length: int, address: int, at: int = DESCRIPTOR) -> int:
    """One DMA operation with its descriptor at `at`; the control field afterwards."""
    memory.write(at, struct.pack(">IIQ", control, length, address))
    start(device, at)
    return int.from_bytes(memory.read(at, 4), "big")


def start(device: FwCfg, at: int) -> None:
    """Write the descriptor's address to the register, high half first, as a little-endian processor does."""
    high, low = struct.unpack("<II", struct.pack(">Q", at))
    if high:
        device.write(DMA_HIGH, 4, high)
    device.write(DMA_LOW, 4, low)


# -- items ---------------------------------------------------------------------------------------------------


def test_signature_is_selected_at_power_on(device: FwCfg) -> None:
    """The four bytes by which a firmware recognises the device, also before it has selected anything."""
    assert bytes(device.read(DATA, 1) for _ in range(4)) == b"QEMU"


def test_identification_offers_dma(device: FwCfg) -> None:
    """Both interfaces are announced, and the DMA register reads as its signature."""
    assert read_item(device, 1, 4) == b"\x03\0\0\0"
    assert device.read(DMA_HIGH, 4).to_bytes(4, "little") == b"QEMU"
    assert device.read(DMA_LOW, 4).to_bytes(4, "little") == b" CFG"
    assert device.read(DMA_HIGH, 8).to_bytes(8, "little") == b"QEMU CFG"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_wide_reads_take_consecutive_bytes(device: FwCfg, size: int) -> None:
    """String-preserving: a wide read is the next bytes in memory order, zeros past the end."""
    key, length = directory(device)["opt/text"]
    device.write(SELECTOR, 2, key)
    data = b"".join(device.read(DATA, size).to_bytes(size, "little") for _ in range(12 // size))
    assert data == b"0123456789\0\0"
    assert length == 10


@pytest.mark.parametrize("key", [0x0002, 0x1234, 0x3FFF, 0x4002, 0x7FFF, 0x8000, 0xBFFF, 0xFFFF])
def test_unknown_keys_read_as_zeros(device: FwCfg, key: int) -> None:
    """An item that nobody added is an empty one."""
    assert read_item(device, key, 16) == bytes(16)


def test_write_channel_bit_is_not_part_of_the_key(device: FwCfg) -> None:
    """Bit 14 asked for write mode once; the item is the same."""
    assert read_item(device, 0x4000, 4) == b"QEMU"


def test_selector_takes_16_bit_writes_only(device: FwCfg) -> None:
    """Byte writes to selector and data port have no effect since QEMU 2.4, nor have reads of the selector."""
    device.read(DATA, 2)
    for offset, size in ((0, 1), (1, 1), (0, 4), (1, 2), (2, 2)):
        device.write(offset, size, 1)
    assert device.read(SELECTOR, 1) == 0
    assert device.read(DATA, 2).to_bytes(2, "little") == b"MU"


def test_machine_items(device: FwCfg) -> None:
    """RAM size, processors and memory map in the firmware's formats."""
    device.add_machine(ram_size=5 << 30, cpus=3, e820=[(0, 0x9FC00, 1), (HIGH, 0x1000, 2)])
    assert read_item(device, KEY_RAM_SIZE, 8) == struct.pack("<Q", 5 << 30)
    assert read_item(device, KEY_NB_CPUS, 2) == read_item(device, KEY_MAX_CPUS, 2) == b"\x03\0"
    assert read_item(device, 0x8002, 2) == b"\1\0"
    files = directory(device)
    assert read_item(device, files["etc/system-states"][0], 7) == b"\x80\0\0\0\0\x80\0"
    assert read_item(device, files["etc/boot-fail-wait"][0], 5) == b"\xff\xff\xff\xff\0"
    key, size = files["etc/e820"]
    assert size == 40
    assert read_item(device, key, 40) == struct.pack("<QQI", 0, 0x9FC00, 1) + struct.pack("<QQI", HIGH, 0x1000, 2)


def test_directory_is_sorted_and_keys_stay(device: FwCfg) -> None:
    """Files added later do not change the keys of earlier ones, and firmware sees them in order of name."""
    before = directory(device)
    device.add_file("bootorder", b"\0")
    after = directory(device)
    assert list(after) == ["bootorder", "opt/slot", "opt/text"]
    assert {name: after[name] for name in before} == before


def test_adding_again_replaces(device: FwCfg) -> None:
    """A machine that is reset loads its files again, under the same keys."""
    key, _ = directory(device)["opt/text"]
    assert device.add_file("opt/text", b"new") == key
    assert directory(device)["opt/text"] == (key, 3)
    assert read_item(device, key, 4) == b"new\0"


@pytest.mark.parametrize("name", ["", "x" * 56, "caf\u00e9", "a\0b", "a\nb"])
def test_bad_file_names_are_refused(device: FwCfg, name: str) -> None:
    """The directory has room for 55 characters and a NUL."""
    with pytest.raises(ConfigError, match="file name"):
        device.add_file(name, b"")


@pytest.mark.parametrize("key", [-1, 0x4000, 0x10000])
def test_bad_keys_are_refused(device: FwCfg, key: int) -> None:
    """A key has 16 bits, and bit 14 is not one of them."""
    with pytest.raises(ConfigError, match="no key"):
        device.add_item(key, b"")


def test_linux_parts_have_address_size_and_data(device: FwCfg) -> None:
    """What QEMU's Linux option ROM and qboot read; an absent initrd has size zero."""
    device.add_linux(setup=(0x10000, b"setup"), kernel=(0x100000, b"kernel!"), cmdline=(0x20000, b"quiet\0"))
    for first, address, data in ((0x16, 0x10000, b"setup"), (0x13, 0x20000, b"quiet\0")):
        assert read_item(device, first, 4) == struct.pack("<I", address)
        assert read_item(device, first + 1, 4) == struct.pack("<I", len(data))
        assert read_item(device, first + 2, len(data)) == data
    assert read_item(device, 0x07, 4) == struct.pack("<I", 0x100000)
    assert read_item(device, 0x08, 4) == struct.pack("<I", 7)
    assert read_item(device, 0x11, 8) == b"kernel!\0"
    assert read_item(device, 0x0B, 4) == bytes(4)


# -- DMA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TARGET, 0x10000 - 5, RAM_END - 10, HIGH_END - 10])
def test_dma_reads_an_item(device: FwCfg, memory: GuestMemory, target: int) -> None:
    """Select and read in one operation; a buffer may span slots and may end exactly at the end of RAM."""
    key, _ = directory(device)["opt/text"]
    assert dma(device, memory, key << 16 | SELECT | READ, 10, target) == 0
    assert memory.read(target, 10) == b"0123456789"


@pytest.mark.parametrize("at", [0, 0x10000 - 8, RAM_END - 16, HIGH, HIGH_END - 16, 0x1003])
def test_descriptor_may_lie_anywhere_in_ram(device: FwCfg, memory: GuestMemory, at: int) -> None:
    """Above 4 GiB, misaligned, across two slots, and up to the last byte."""
    assert dma(device, memory, READ | SELECT, 4, TARGET, at) == 0
    assert memory.read(TARGET, 4) == b"QEMU"


def test_dma_by_one_64_bit_write(device: FwCfg, memory: GuestMemory) -> None:
    """The register as a whole works like its two halves."""
    memory.write(HIGH, struct.pack(">IIQ", READ, 4, TARGET))
    device.write(DMA_HIGH, 8, int.from_bytes(HIGH.to_bytes(8, "big"), "little"))
    assert memory.read(TARGET, 4) == b"QEMU"


def test_dma_register_is_cleared_by_an_operation(device: FwCfg, memory: GuestMemory) -> None:
    """The high half counts for one operation only."""
    start(device, HIGH)
    assert dma(device, memory, READ | SELECT, 4, TARGET) == 0
    assert memory.read(TARGET, 4) == b"QEMU"


def test_dma_read_past_the_end_gives_zeros(device: FwCfg, memory: GuestMemory) -> None:
    """The rest of the buffer is zeroed, not left alone."""
    memory.fill(TARGET, 32, 0xAA)
    key, _ = directory(device)["opt/text"]
    assert dma(device, memory, key << 16 | SELECT | READ, 16, TARGET) == 0
    assert memory.read(TARGET, 17) == b"0123456789" + bytes(6) + b"\xaa"


def test_dma_skip_and_data_port_share_the_offset(device: FwCfg, memory: GuestMemory) -> None:
    """Both interfaces work on one selection."""
    key, _ = directory(device)["opt/text"]
    assert dma(device, memory, key << 16 | SELECT | SKIP, 4, 0) == 0
    assert device.read(DATA, 1) == ord("4")
    assert dma(device, memory, READ, 3, TARGET) == 0
    assert memory.read(TARGET, 3) == b"567"


def test_dma_write_reaches_the_owner(memory: GuestMemory) -> None:
    """The item changes, its size does not, and on_write hears of offset and bytes; a reset restores it."""
    heard: list[tuple[int, bytes]] = []
    device = FwCfg(memory)
    key = device.add_file("opt/slot", b"........", writable=True, on_write=lambda *write: heard.append(write))
    memory.write(TARGET, b"abcd")
    assert dma(device, memory, key << 16 | SELECT | SKIP, 2, 0) == 0
    assert dma(device, memory, WRITE, 4, TARGET) == 0
    assert heard == [(2, b"abcd")]
    assert read_item(device, key, 8) == b"..abcd.."
    device.reset()
    assert read_item(device, key, 8) == b"........"


def test_read_wins_over_write(device: FwCfg, memory: GuestMemory) -> None:
    """With both bits set the specification wants a read."""
    memory.fill(TARGET, 8, 0xAA)
    key, _ = directory(device)["opt/slot"]
    assert dma(device, memory, key << 16 | SELECT | READ | WRITE | SKIP, 8, TARGET) == 0
    assert memory.read(TARGET, 8) == bytes(8)


def test_operation_without_a_verb_only_selects(device: FwCfg, memory: GuestMemory) -> None:
    """The length is then without meaning."""
    assert dma(device, memory, 0 << 16 | SELECT, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF) == 0
    assert device.read(DATA, 4).to_bytes(4, "little") == b"QEMU"


BAD_BUFFERS = [
    (0xFFFF_FFFF, TARGET),  # longer than RAM
    (0xFFFF_FFFF, HIGH),
    (1, RAM_END),  # begins at the end of RAM
    (2, RAM_END - 1),  # crosses it
    (16, HIGH_END - 8),
    (16, 0xFEE0_0000),  # a device
    (16, 0x1_0000_0000 - 8),  # from nothing into RAM
    (16, (1 << 64) - 8),  # wraps
    (0xFFFF_FFFF, (1 << 64) - 1),
]


@pytest.mark.parametrize(("length", "address"), BAD_BUFFERS)
@pytest.mark.parametrize("verb", [READ, WRITE])
def test_buffers_outside_ram_are_an_error(
    device: FwCfg, memory: GuestMemory, verb: int, length: int, address: int
) -> None:
    """The operation fails as a whole: the error bit is set and no byte of guest or item changes."""
    memory.fill(TARGET, 0x1000, 0xAA)
    key, _ = directory(device)["opt/slot"]
    began = monotonic()
    assert dma(device, memory, key << 16 | SELECT | verb, length, address) == ERROR
    assert monotonic() - began < 1
    assert memory.read(TARGET, 0x1000) == b"\xaa" * 0x1000
    assert read_item(device, key, 8) == bytes(8)


def test_rom_is_not_written_by_dma(device: FwCfg, memory: GuestMemory) -> None:
    """A guest that cannot write its firmware cannot have it written either."""
    memory.write(ROM, b"firmware")
    assert dma(device, memory, SELECT | READ, 4, ROM) == ERROR
    assert dma(device, memory, SELECT | READ, 0x2000, ROM - 0x1000) == ERROR
    assert memory.read(ROM, 8) == b"firmware"


def test_descriptor_in_rom_is_read_but_not_answered(device: FwCfg, memory: GuestMemory) -> None:
    """There is nowhere to put the result."""
    descriptor = struct.pack(">IIQ", READ | SELECT, 4, TARGET)
    memory.write(ROM, descriptor)
    start(device, ROM)
    assert memory.read(TARGET, 4) == b"QEMU"
    assert memory.read(ROM, 16) == descriptor


@pytest.mark.parametrize("at", [RAM_END, 0xFEE0_0000, HIGH_END, (1 << 64) - 8, HIGH - 8, ROM_END - 8])
def test_descriptor_outside_ram_is_ignored(device: FwCfg, memory: GuestMemory, at: int) -> None:
    """Nothing can be reported there, and nothing else happens."""
    before = memory.read(0, RAM_END)
    start(device, at)
    assert memory.read(0, RAM_END) == before


@pytest.mark.parametrize("inside", [4, 8, 15])
def test_descriptor_across_the_end_of_ram_reports_an_error(device: FwCfg, memory: GuestMemory, inside: int) -> None:
    """Its control field is still in RAM and says so."""
    at = RAM_END - inside
    memory.write(at, struct.pack(">IIQ", READ | SELECT, 4, TARGET)[:inside])
    start(device, at)
    assert memory.read(at, 4) == struct.pack(">I", ERROR)
    assert memory.read(TARGET, 4) == bytes(4)


def test_descriptor_may_be_its_own_buffer(device: FwCfg, memory: GuestMemory) -> None:
    """The result is written last, so the operation still ends visibly."""
    assert dma(device, memory, SELECT | READ, 16, DESCRIPTOR) == 0


@pytest.mark.parametrize(("skip", "length"), [(0, 9), (8, 1), (1, 8), (0, 0xFFFF)])
def test_writes_never_resize_an_item(device: FwCfg, memory: GuestMemory, skip: int, length: int) -> None:
    """A write that would pass the end is dropped whole."""
    key, _ = directory(device)["opt/slot"]
    memory.fill(TARGET, 0x10000, 0xAA)
    assert dma(device, memory, key << 16 | SELECT | SKIP, skip, 0) == 0
    assert dma(device, memory, WRITE, length, TARGET) == ERROR
    assert read_item(device, key, 9) == bytes(9)


@pytest.mark.parametrize("key", [0x00, 0x01, 0x19, 0x1234, 0x20])
def test_read_only_and_unknown_items_are_not_written(device: FwCfg, memory: GuestMemory, key: int) -> None:
    """Signature, id, directory, an unknown key and a read-only file."""
    before = read_item(device, key, 4)
    memory.fill(TARGET, 4, 0xAA)
    assert dma(device, memory, key << 16 | SELECT | WRITE, 4, TARGET) == ERROR
    assert read_item(device, key, 4) == before


def test_endless_skips_are_bounded(device: FwCfg, memory: GuestMemory) -> None:
    """The offset may run far past the end: reads give zeros, at once."""
    for _ in range(8):
        assert dma(device, memory, SKIP, 0xFFFF_FFFF, 0) == 0
    assert device.read(DATA, 4) == 0
    assert dma(device, memory, READ, 4, TARGET) == 0


ADDRESSES = st.one_of(
    st.integers(0, RAM_END + 64),
    st.integers(HIGH - 64, HIGH_END + 64),
    st.integers(ROM - 64, ROM_END + 64),
    st.integers(0, (1 << 64) - 1),
)
LENGTHS = st.one_of(st.integers(0, 64), st.integers(0, RAM_END), st.integers(0xFFFF_FF00, 0xFFFF_FFFF))
CONTROLS = st.builds(
    lambda key, verb: key << 16 | verb,
    st.sampled_from([0, 1, 0x19, 0x20, 0x21, 0x4020, 0x8001, 0xFFFF]),
    st.integers(0, 0xFFFF) | st.integers(0, 31),
)


@settings(deadline=2000, max_examples=300)
@given(st.lists(st.tuples(ADDRESSES, CONTROLS, LENGTHS, ADDRESSES), min_size=1, max_size=4))
def test_any_dma_is_survived(operations: list[tuple[int, int, int, int]]) -> None:
    """Any descriptors anywhere: no exception, a result of zero or error where it fits, items intact."""
    memory = make_memory()
    try:
        device = FwCfg(memory)
        device.add_file("opt/text", b"0123456789")
        device.add_file("opt/slot", bytes(8), writable=True)
        for at, control, length, address in operations:
            fits = memory.contains(at, 16) and not any(ROM <= each < ROM_END for each in (at, at + 3))
            if memory.contains(at, 16):
                memory.write(at, struct.pack(">IIQ", control, length, address))
            start(device, at)
            if fits:
                assert int.from_bytes(memory.read(at, 4), "big") in (0, ERROR)
        assert read_item(device, 0x20, 11) == b"0123456789\0"
        assert read_item(device, 0x21, 9)[8:] == b"\0"
        assert read_item(device, 0, 4) == b"QEMU"
    finally:
        memory.close()


@pytest.mark.parametrize("offset", range(12))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_access_width_is_harmless(device: FwCfg, offset: int, size: int) -> None:
    """Any access that lies in the region gives a value of its size and raises nothing."""
    if offset + size > FwCfg.length:
        return
    for value in (0, (1 << 8 * size) - 1):
        assert device.write(offset, size, value) is None
        assert 0 <= device.read(offset, size) < 1 << 8 * size
