"""fw_cfg: the store of named blobs that a firmware configures itself from. Layer: devices.

Twelve ports: selector (0, 16 bits, write only), data (1, the selected item's next bytes) and the DMA
address (4, two big-endian halves). It is the one legacy device that reads and writes guest memory.

Source: QEMU, docs/specs/fw_cfg.rst; item keys: include/standard-headers/linux/qemu_fw_cfg.h and
hw/nvram/fw_cfg.c.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from pykvm.core.device import Device
from pykvm.core.state import BOOL, U16, U64, Bytes, ListOf, Row, Shape, Text
from pykvm.errors import ConfigError, GuestAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from pykvm.core.outcome import Outcome
    from pykvm.core.state import State

    class Slot(Protocol):
        """What the device asks of a memory slot."""

        @property
        def end(self) -> int: ...
        @property
        def readonly(self) -> bool: ...

    class Memory(Protocol):
        """What the device asks of GuestMemory; accesses out of bounds raise GuestAddressError."""

        def read(self, gpa: int, length: int) -> bytes: ...
        def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None: ...
        def fill(self, gpa: int, length: int, byte: int = 0) -> None: ...
        def slot_at(self, gpa: int) -> Slot | None: ...


SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8
DMA_SIGNATURE = b"QEMU CFG"
VERSION_TRADITIONAL, VERSION_DMA = 1, 2

DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 0x01, 0x02, 0x04, 0x08, 0x10

# Keys of items without a name; those with an architecture's own meaning have bit 15 set
KEY_SIGNATURE, KEY_ID, KEY_RAM_SIZE, KEY_NOGRAPHIC, KEY_NB_CPUS = 0x00, 0x01, 0x03, 0x04, 0x05
KEY_KERNEL_ADDR, KEY_KERNEL_SIZE, KEY_INITRD_ADDR, KEY_INITRD_SIZE = 0x07, 0x08, 0x0A, 0x0B
KEY_MAX_CPUS, KEY_KERNEL_DATA, KEY_INITRD_DATA = 0x0F, 0x11, 0x12
KEY_CMDLINE_ADDR, KEY_CMDLINE_SIZE, KEY_CMDLINE_DATA = 0x13, 0x14, 0x15
KEY_SETUP_ADDR, KEY_SETUP_SIZE, KEY_SETUP_DATA = 0x16, 0x17, 0x18
KEY_FILE_DIR, KEY_FILE_FIRST, KEY_FILE_LAST = 0x19, 0x20, 0x3FFF
KEY_IRQ0_OVERRIDE = 0x8002  # ISA interrupt 0 arrives at IOAPIC pin 2
KEY_WRITE_CHANNEL = 0x4000  # in the selector: asks for write mode, which no longer exists; not part of the key

MAX_NAME = 55  # and a NUL
MAX_ITEM = 0xFFFF_FFFF

# etc/system-states: a byte for each of S0 to S5, bit 7 if the state exists, below it SLP_TYP
SYSTEM_STATES = bytes([0x80, 0, 0, 0, 0, 0x80])


class Item:
    """One blob. `data` changes only when it is `writable`; `initial` is what a reset restores."""

    __slots__ = ("data", "initial", "on_write", "writable")

    def __init__(self, data: bytes, writable: bool, on_write: Callable[[int, bytes], None] | None) -> None:
        self.initial = data
        self.data: bytes | bytearray = bytearray(data) if writable else data
        self.writable = writable
        self.on_write = on_write


NO_ITEM = Item(b"", False, None)


class FwCfg(Device):
    """The device. `memory` is the guest's, for DMA. Items are added before the machine runs."""

    name = "fw_cfg"
    length = 12
    shape = Shape(
        1,
        selected=U16,
        offset=U64,
        dma_address=U64,
        items=ListOf(Row(U16, BOOL, Bytes(0, MAX_ITEM), Bytes(0, MAX_ITEM)), 0, 1 << 14),  # key, writable, initial, now
        files=ListOf(Row(Text(MAX_NAME), U16), 0, KEY_FILE_LAST),
    )

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = allocate_lock()
        self._items: dict[int, Item] = {}
        self._files: dict[str, int] = {}
        self._saved_items: list[object] | None = None  # what `save` gave or `restore` got, while it is still true
        self._item = NO_ITEM
        self._selected = KEY_SIGNATURE
        self._offset = 0
        self._dma_address = 0
        self.add_item(KEY_SIGNATURE, b"QEMU")
        self.add_item(KEY_ID, struct.pack("<I", VERSION_TRADITIONAL | VERSION_DMA))
        self._write_directory()
        self._select(KEY_SIGNATURE)

    # -- filling it ----------------------------------------------------------------------------------------

    def add_item(self, key: int, data: bytes) -> None:
        """Store `data`, at most 4 GiB - 1 long, under `key`; what was there is replaced."""
        if not 0 <= key <= 0xFFFF or key & KEY_WRITE_CHANNEL:
            raise ConfigError("fw_cfg", f"{key:#x} is no key")
        self._store(key, Item(data, False, None))

    def add_file(
        self,
        name: str,
        data: bytes,
        *,
        writable: bool = False,
        on_write: Callable[[int, bytes], None] | None = None,
    ) -> int:
        """Store `data` as the file `name` (1 to 55 ASCII characters), replacing one of that name; its key.

        A guest may write a `writable` file by DMA, never resize it; `on_write(offset, data)` hears of each
        write, on the vCPU's thread.
        """
        if not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.isprintable():
            raise ConfigError("fw_cfg", f"file name {name!r} is not 1 to {MAX_NAME} printable ASCII characters")
        key = self._files.get(name, KEY_FILE_FIRST + len(self._files))
        if key > KEY_FILE_LAST:
            raise ConfigError("fw_cfg", f"no key is left for file {name!r}")
        self._store(key, Item(data, writable, on_write))
        self._files[name] = key
        self._write_directory()
        return key

    def _store(self, key: int, item: Item) -> None:
        if len(item.data) > MAX_ITEM:
            raise ConfigError("fw_cfg", f"item {key:#x} of {len(item.data)} bytes is larger than 4 GiB - 1")
        self._items[key] = item
        self._saved_items = None

    def _write_directory(self) -> None:
        entries = [struct.pack(">I", len(self._files))]
        for name, key in sorted(self._files.items()):
            entries.append(struct.pack(">IHH56s", len(self._items[key].data), key, 0, name.encode()))
        self._items[KEY_FILE_DIR] = Item(b"".join(entries), False, None)

    def add_machine(self, *, ram_size: int, cpus: int, e820: Iterable[tuple[int, int, int]]) -> None:
        """What every firmware asks: RAM in bytes, processors, the memory map as (GPA, length, type), habits.

        Without a display SeaBIOS takes COM1 for its screen. When nothing can be booted it says so and stays,
        instead of starting anew every minute.
        """
        self.add_item(KEY_RAM_SIZE, struct.pack("<Q", ram_size))
        self.add_item(KEY_NOGRAPHIC, struct.pack("<H", 1))
        self.add_item(KEY_NB_CPUS, struct.pack("<H", cpus))
        self.add_item(KEY_MAX_CPUS, struct.pack("<H", cpus))
        self.add_item(KEY_IRQ0_OVERRIDE, b"\1")  # for the MP table that SeaBIOS makes itself
        self.add_file("etc/e820", b"".join(struct.pack("<QQI", *entry) for entry in e820))
        self.add_file("etc/system-states", SYSTEM_STATES)
        self.add_file("etc/boot-fail-wait", struct.pack("<i", -1))

    def add_linux(
        self,
        *,
        setup: tuple[int, bytes],
        kernel: tuple[int, bytes],
        cmdline: tuple[int, bytes],
        initrd: tuple[int, bytes] | None = None,
    ) -> None:
        """The parts of a bzImage for a firmware that boots Linux, each as (32-bit load address, bytes).

        `setup` is the real-mode part with its header already filled in (the firmware jumps to it
        unchanged), `cmdline` ends in a NUL.
        """
        parts = (
            (KEY_SETUP_ADDR, KEY_SETUP_SIZE, KEY_SETUP_DATA, setup),
            (KEY_KERNEL_ADDR, KEY_KERNEL_SIZE, KEY_KERNEL_DATA, kernel),
            (KEY_CMDLINE_ADDR, KEY_CMDLINE_SIZE, KEY_CMDLINE_DATA, cmdline),
            (KEY_INITRD_ADDR, KEY_INITRD_SIZE, KEY_INITRD_DATA, initrd or (0, b"")),
        )
        for address_key, size_key, data_key, (address, data) in parts:
            self.add_item(address_key, struct.pack("<I", address))
            self.add_item(size_key, struct.pack("<I", len(data)))
            self.add_item(data_key, data)

    # -- the guest's side ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The next `size` bytes of the item at DATA, the signature at the DMA register, zero elsewhere."""
        if offset == DATA:
            with self._lock:
                at = self._offset
                self._offset += size
                return int.from_bytes(self._item.data[at : at + size], "little")
        if offset >= DMA_HIGH:
            at = offset - DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """Select an item, or take an address for DMA; whatever else is written has no effect."""
        with self._lock:
            if offset == SELECTOR and size == 2:
                self._select(value)
            elif offset == DMA_HIGH and size == 4:
                self._dma_address = _swap(value, 4) << 32
            elif (offset, size) in ((DMA_LOW, 4), (DMA_HIGH, 8)):
                descriptor = self._dma_address | _swap(value, size)
                self._dma_address = 0
                self._dma(descriptor)
        return None

    def reset(self) -> None:
        """Forget the selection, and what the guest wrote."""
        with self._lock:
            for item in self._items.values():
                if item.writable:
                    item.data = bytearray(item.initial)
            self._dma_address = 0
            self._select(KEY_SIGNATURE)

    def _select(self, key: int) -> None:
        self._selected = key & ~KEY_WRITE_CHANNEL
        self._item = self._items.get(self._selected, NO_ITEM)
        self._offset = 0

    def save(self) -> State:
        """The items too: a firmware's are made of files that may be others by the time of the restore."""
        with self._lock:
            if self._saved_items is None or any(item.writable for item in self._items.values()):
                self._saved_items = [[k, i.writable, i.initial, bytes(i.data)] for k, i in self._items.items()]
            return {
                "selected": self._selected,
                "offset": min(self._offset, MAX_ITEM),
                "dma_address": self._dma_address,
                "items": self._saved_items,
                "files": [[name, key] for name, key in self._files.items()],
            }

    def restore(self, state: State) -> None:
        """Continue with these items; who listens to writes of one still does."""
        with self._lock:
            if state["items"] is not self._saved_items or any(item.writable for item in self._items.values()):
                self._restore_items(state)
            self._select(state["selected"])
            self._offset, self._dma_address = state["offset"], state["dma_address"]

    def _restore_items(self, state: State) -> None:
        listeners = {key: item.on_write for key, item in self._items.items()}
        self._items.clear()
        for key, writable, initial, data in state["items"]:
            item = self._items[key] = Item(initial, writable, listeners.get(key))
            item.data = bytearray(data) if writable else data
        self._files = dict(state["files"])
        self._saved_items = state["items"]

    # -- DMA -----------------------------------------------------------------------------------------------

    def _dma(self, descriptor: int) -> None:
        """One operation: FWCfgDmaAccess is control (32), length (32), address (64), all big-endian."""
        try:
            control, length, address = struct.unpack(">IIQ", self._memory.read(descriptor, 16))
        except GuestAddressError:
            self._finish(descriptor, False)
            return
        if control & DMA_SELECT:
            self._select(control >> 16)
        done = True
        if control & DMA_READ:
            done = self._dma_read(address, length)
        elif control & DMA_WRITE:
            done = self._dma_write(address, length)
        elif control & DMA_SKIP:
            self._offset += length
        self._finish(descriptor, done)

    def _finish(self, descriptor: int, done: bool) -> None:
        """Report into the control field, if that is in RAM at all."""
        if self._is_ram(descriptor, 4):
            self._memory.write(descriptor, struct.pack(">I", 0 if done else DMA_ERROR))

    def _dma_read(self, address: int, length: int) -> bool:
        """Item to guest; past the item's end come zeros. All or nothing, and only into RAM."""
        if not self._is_ram(address, length):
            return False
        part = memoryview(self._item.data)[self._offset : self._offset + length]
        self._memory.write(address, part)
        self._memory.fill(address + len(part), length - len(part))
        self._offset += length
        return True

    def _dma_write(self, address: int, length: int) -> bool:
        """Guest to item: only inside a writable item."""
        item, at = self._item, self._offset
        if not item.writable or at + length > len(item.data):
            return False
        try:
            data = self._memory.read(address, length)
        except GuestAddressError:
            return False
        assert isinstance(item.data, bytearray)
        item.data[at : at + length] = data
        self._offset += length
        if item.on_write is not None:
            item.on_write(at, data)
        return True

    def _is_ram(self, gpa: int, length: int) -> bool:
        """Whether the guest itself could write all of [gpa, gpa + length)."""
        end = gpa + length
        while gpa < end:
            slot = self._memory.slot_at(gpa)
            if slot is None or slot.readonly:
                return False
            gpa = slot.end
        return True


def _swap(value: int, size: int) -> int:
    """A value written by a little-endian processor to a big-endian register."""
    return int.from_bytes(value.to_bytes(size, "little"), "big")
