"""Accesses that C answers without Python: the action table and its rings. Layer: core.

The table only speeds up what the devices would do anyway: with it empty the guest sees the same.
"""

from __future__ import annotations

import os

from pykvm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData

RING_SIZE = 16384


class Ring:
    """Bytes that guests wrote to an APPEND range and Python has not taken yet.

    `eventfd` becomes readable when the ring stops being empty; `drain` empties the ring and keeps the order.
    """

    def __init__(self, size: int = RING_SIZE) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.handle: CData = lib.pk_ring_new(size, self.eventfd)
        if self.handle == ffi.NULL:
            os.close(self.eventfd)
            raise MemoryError("console ring")
        self._buffer = ffi.new("uint8_t[]", size)
        self._size = size

    def drain(self) -> bytes:
        """Everything in the ring, oldest first; nothing once it is closed."""
        if self.handle == ffi.NULL:
            return b""
        count = lib.pk_ring_drain(self.handle, self._buffer, self._size)
        return bytes(ffi.buffer(self._buffer, count)) if count else b""

    @property
    def appended(self) -> int:
        """Bytes that ever went through."""
        return int(self.handle.appended)

    def close(self) -> None:
        """Free the ring; no vCPU may run any more."""
        handle, self.handle = self.handle, ffi.NULL
        if handle != ffi.NULL:
            lib.pk_ring_free(handle)
            os.close(self.eventfd)


class Action:
    """One entry of the table. `enabled` may be switched at any time; `hits` counts answered accesses."""

    def __init__(self, entry: CData) -> None:
        self.entry = entry

    @property
    def enabled(self) -> bool:
        """Whether C answers; if not, the access goes to Python."""
        return bool(self.entry.enabled)

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self.entry.enabled = on

    @property
    def hits(self) -> int:
        """Accesses answered so far."""
        return int(self.entry.hits)


class ActionTable:
    """The table of one machine, shared by its vCPUs. Every change publishes a new C table; old ones live on with it."""

    def __init__(self) -> None:
        self.table: CData = ffi.NULL
        self.suspended = False  # from the next start on everything goes to Python
        self._entries: list[CData] = []
        self._keep: list[object] = []
        self._rings: list[Ring] = []

    def append(self, address: int, *, mmio: bool = False, ring: Ring | None = None) -> tuple[Action, Ring]:
        """Byte writes to `address` go to a ring (a new one, or one shared with other addresses)."""
        if ring is None:
            ring = Ring()
            self._rings.append(ring)
        return self._add(lib.PK_APPEND, range(address, address + 1), mmio, True, ring=ring), ring

    def constant(self, addresses: range, value: int, *, mmio: bool = False) -> Action:
        """Reads inside `addresses` give `value`, truncated to their size."""
        return self._add(lib.PK_CONSTANT, addresses, mmio, False, value=value)

    def count(self, addresses: range, *, mmio: bool = False) -> Action:
        """Writes inside `addresses` are counted and dropped."""
        return self._add(lib.PK_COUNT, addresses, mmio, True)

    def load(self, address: int, word: CData, *, mmio: bool = False) -> Action:
        """Four-byte reads of `address` give *word (a uint32_t * that lives as long as the table)."""
        return self._add(lib.PK_LOAD, range(address, address + 4), mmio, False, word=word)

    def clear(self, address: int, word: CData, *, keep: int = 0, mmio: bool = False) -> Action:
        """Four-byte writes to `address` clear those bits of *word, but none of `keep`."""
        return self._add(lib.PK_CLEAR, range(address, address + 4), mmio, True, value=keep, word=word)

    def _add(
        self,
        kind: int,
        addresses: range,
        mmio: bool,
        write: bool,
        *,
        value: int = 0,
        ring: Ring | None = None,
        word: CData = ffi.NULL,
    ) -> Action:
        entry = ffi.new("struct pk_action *")
        entry.base, entry.len, entry.kind = addresses.start, len(addresses), kind
        entry.mmio, entry.write, entry.value = mmio, write, value
        entry.word = word
        if ring is not None:
            entry.ring = ring.handle
        entry.enabled = 1
        self._entries.append(entry)
        self._publish()
        return Action(entry)

    def _publish(self) -> None:
        pointers = ffi.new("struct pk_action *[]", self._entries)
        table = ffi.new("struct pk_table *", (pointers, len(self._entries)))
        self._keep += [pointers, table]  # a vCPU may still be reading an older table
        self.table = table

    def close(self) -> None:
        """Free the rings; no vCPU may run any more."""
        self.table = ffi.NULL
        for ring in self._rings:
            ring.close()
        self._rings.clear()
        self._entries.clear()
        self._keep.clear()
