"""Guest memory by linear address, as the guest's own code sees it. Layer: live objects.

Each access goes through the page tables that a vCPU has at that moment, page by page; an access is done whole or not
at all.
"""

from __future__ import annotations

from pykvm.debug.code import translate
from pykvm.errors import LinearAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.memory import GuestMemory
    from pykvm.x86.segments import CpuState

    Where = int | str  # a linear address, or what Symbols.resolve takes

PAGE = 4096
CSTRING_PIECE = 256


class LinearMemory:
    """`vm.linear`. An address is a number, or a symbol as in "counter" and "table+8".

    Every accessor raises LinearAddressError where a byte is not mapped or not guest memory, MachineStateError while
    the vCPU runs, SymbolError. The host may write what is read-only to the guest.
    """

    def __init__(
        self, memory: GuestMemory, state: Callable[[], CpuState], resolve: Callable[[Where], int] | None = None
    ) -> None:
        self._memory = memory
        self._state = state
        self._resolve = resolve

    def _pieces(self, where: Where, length: int) -> list[tuple[int, int]]:
        """(GPA, length) of each page's part of [where, where + length)."""
        address = self._resolve(where) if self._resolve is not None else int(where)
        if length < 0:
            raise LinearAddressError(address, length, "is not an address range")
        state, at, end = self._state(), address, address + length
        pieces: list[tuple[int, int]] = []
        while at < end:
            part = min(PAGE - at % PAGE, end - at)
            walk = translate(self._memory, state, at)
            if walk.gpa is None or not self._memory.contains(walk.gpa, part):
                raise LinearAddressError(address, length, walk.reason or "is mapped to where no memory is")
            pieces.append((walk.gpa, part))
            at += part
        return pieces

    def read(self, where: Where, length: int) -> bytes:
        """A copy of `length` bytes."""
        return b"".join(self._memory.read(gpa, part) for gpa, part in self._pieces(where, length))

    def write(self, where: Where, data: bytes | bytearray) -> None:
        """Store `data`."""
        done = 0
        for gpa, part in self._pieces(where, len(data)):
            self._memory.write(gpa, data[done : done + part])
            done += part

    def gpa(self, where: Where) -> int:
        """The guest physical address of one byte."""
        return self._pieces(where, 1)[0][0]

    def read_uint(self, where: Where, size: int) -> int:
        """A little-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.read(where, size), "little")

    def write_uint(self, where: Where, size: int, value: int) -> None:
        """Store a little-endian unsigned integer of `size` bytes."""
        self.write(where, value.to_bytes(size, "little"))

    def read_u8(self, where: Where) -> int:
        """A byte."""
        return self.read_uint(where, 1)

    def read_u16(self, where: Where) -> int:
        """A 16-bit value."""
        return self.read_uint(where, 2)

    def read_u32(self, where: Where) -> int:
        """A 32-bit value."""
        return self.read_uint(where, 4)

    def read_u64(self, where: Where) -> int:
        """A 64-bit value."""
        return self.read_uint(where, 8)

    def read_cstring(self, where: Where, limit: int = 4096) -> bytes:
        """The bytes up to a NUL (not included), or the first `limit` ones."""
        address = self._resolve(where) if self._resolve is not None else int(where)
        found = bytearray()
        while len(found) < limit:
            at = address + len(found)
            piece = self.read(at, min(CSTRING_PIECE - at % CSTRING_PIECE, limit - len(found)))
            end = piece.find(0)
            if end >= 0:
                return bytes(found + piece[:end])
            found += piece
        return bytes(found)
