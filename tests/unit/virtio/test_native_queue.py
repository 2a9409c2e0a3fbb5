"""The queue in C beside the queue in Python: the same rings give both the same requests, faults and memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykvm._native import ffi, lib
from pykvm.core.memory import GuestMemory
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.native import NativeQueue
from pykvm.virtio.queue import EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, WRITE, Virtqueue

if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.virtio.chain import Chain

SIZE = 8
PAGE = 4096
DESC, AVAIL, USED, TABLE = 0, 0x400, 0x800, 0x1000  # in the first slot
SECOND, ROM, END = 2 * PAGE, 3 * PAGE, 4 * PAGE  # slots: two pages, one that touches them, a read-only one, a hole

Descriptor = tuple[int, int, int, int]
places = st.one_of(
    st.sampled_from([TABLE, TABLE + 16, SECOND - 8, SECOND, ROM - 4, ROM, END - 16, END, 2**64 - 8, 2**64 - 1]),
    st.integers(TABLE, END),
)
lengths = st.one_of(st.sampled_from([0, 1, 16, 32, 17, 512, PAGE, PAGE + 8, 2**32 - 1, 2**32 - 16]), st.integers(1, 64))
flags = st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xFFF8, NEXT | WRITE])
indirect = st.tuples(st.just(TABLE), st.sampled_from([16, 32, 128]), st.just(INDIRECT), st.just(0))
hostile: st.SearchStrategy[Descriptor] = st.tuples(places, lengths, flags, st.integers(0, SIZE + 1))


@st.composite
def tables(draw: st.DrawFn) -> list[Descriptor]:
    """Chains that keep to the rules, whichever descriptor is their head, with up to two entries replaced."""
    table: list[Descriptor] = []
    writing = False
    for i in range(SIZE):
        last = i == SIZE - 1 or draw(st.integers(0, 3)) == 0
        writing = writing or draw(st.booleans())
        gpa, length = draw(st.integers(TABLE + 0x400, ROM - 64)), draw(st.integers(1, 64))
        table.append((gpa, length, (WRITE if writing else 0) | (0 if last else NEXT), i + 1))
        writing = writing and not last
    for index, entry in draw(st.lists(st.tuples(st.integers(0, SIZE - 1), st.one_of(indirect, hostile)), max_size=2)):
        table[index] = entry
    return table


class Side:
    """One of the two, with a memory of its own."""

    def __init__(self, kind: type[Virtqueue], features: int) -> None:
        self.memory = GuestMemory()
        self.memory.add(0, SECOND)
        self.memory.add(SECOND, PAGE)
        self.memory.add(ROM, PAGE, readonly=True)
        self.queue = kind(0, SIZE, self.memory)
        self.queue.desc, self.queue.avail, self.queue.used = DESC, AVAIL, USED
        self.queue.enable(features)

    def close(self) -> bytes:
        """What is in memory at the end."""
        content = self.memory.read(0, END)
        self.queue.release()
        self.memory.close()
        return content

    def gpa(self, address: int) -> int:
        """Of a host address."""
        for slot in self.memory.slots:
            if slot.hva <= address < slot.hva + slot.size:
                return slot.gpa + address - slot.hva
        raise AssertionError(f"{address:#x} is no guest memory")

    def rings(self, table: list[Descriptor], inner: list[Descriptor], heads: list[int], idx: int, event: int) -> None:
        """What the driver wrote."""
        for at, entries in ((DESC, table), (TABLE, inner)):
            after = [(TABLE + 0x400, 16, 0, 0)]  # a good descriptor right behind the table
            for i, entry in enumerate(entries + after):
                self.memory.write(at + 16 * i, struct.pack("<QIHH", *entry))
        self.memory.write(AVAIL, struct.pack(f"<HH{SIZE}HH", event & 1, idx, *heads, event))


class PythonSide(Side):
    """The reference."""

    def __init__(self, features: int) -> None:
        super().__init__(Virtqueue, features)

    def pop(self) -> tuple[object, ...] | None:
        """(head, readable, writable) as (GPA, length), None for nothing, or a fault."""
        try:
            self.chain = self.queue.pop()
        except DriverFault:
            return ("fault",)
        return None if self.chain is None else (self.chain.head, *map(self.parts, _both(self.chain)))

    def parts(self, views: list[memoryview]) -> list[tuple[int, int]]:
        """Where buffers are."""
        return [(self.gpa(int(ffi.cast("uintptr_t", ffi.from_buffer(view)))), len(view)) for view in views]

    def serve(self, written: int) -> None:
        """Fill the writable buffers and give the chain back."""
        assert self.chain is not None
        self.chain.write(b"\xa5" * min(self.chain.writable_size, PAGE))
        self.queue.push(self.chain, written)

    def verdicts(self) -> tuple[object, ...]:
        """Interrupt? More?"""
        try:
            return self.queue.should_interrupt(), self.queue.want_notification()
        except DriverFault:
            return ("fault",)


class NativeSide(Side):
    """The one in C."""

    def __init__(self, features: int) -> None:
        super().__init__(NativeQueue, features)
        assert isinstance(self.queue, NativeQueue)
        self.state: CData = self.queue.state
        self.chain: CData = ffi.new("struct pk_chain *")

    def pop(self) -> tuple[object, ...] | None:
        """As the reference gives it."""
        verdict = lib.pk_queue_pop(self.state, self.chain)
        if verdict != lib.PK_GOT:
            return ("fault",) if verdict == lib.PK_FAULT else None
        parts = [
            (self.gpa(int(ffi.cast("uintptr_t", each.iov_base))), each.iov_len)
            for each in self.chain.iov[0 : self.chain.count]
        ]
        readable, writable = parts[: self.chain.readable], parts[self.chain.readable :]
        assert self.chain.readable_bytes == sum(length for _, length in readable)
        assert self.chain.writable_bytes == sum(length for _, length in writable)
        return (self.chain.head, readable, writable)

    def serve(self, written: int) -> None:
        """Fill and give back."""
        left = PAGE
        for each in self.chain.iov[self.chain.readable : self.chain.count]:
            part = min(each.iov_len, left)
            ffi.memmove(each.iov_base, b"\xa5" * part, part)
            left -= part
        lib.pk_queue_push(self.state, self.chain.head, written)

    def verdicts(self) -> tuple[object, ...]:
        """As the reference gives them."""
        interrupt = bool(lib.pk_queue_should_interrupt(self.state))
        more = lib.pk_queue_want_notification(self.state)
        return ("fault",) if more == lib.PK_FAULT else (interrupt, more == lib.PK_GOT)


def _both(chain: Chain) -> tuple[list[memoryview], list[memoryview]]:
    return chain.readable, chain.writable


@settings(max_examples=400, deadline=None)
@given(
    table=tables(),
    inner=tables(),
    heads=st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
    idx=st.one_of(st.integers(1, SIZE), st.integers(1, SIZE), st.sampled_from([0, SIZE + 1, 0xFFFF])),
    event=st.integers(0, SIZE + 1),
    features=st.sampled_from([0, INDIRECT_DESC, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
)
@example(  # a chain across two slots, by an indirect table
    table=[(TABLE, 32, INDIRECT, 0)] * SIZE,
    inner=[(SECOND - 8, 16, NEXT, 1), (SECOND + 64, 32, WRITE, 0)],
    heads=[0] * SIZE,
    idx=SIZE,
    event=0,
    features=INDIRECT_DESC,
)
def test_c_agrees_with_python(
    table: list[Descriptor], inner: list[Descriptor], heads: list[int], idx: int, event: int, features: int
) -> None:
    """Valid and hostile rings: the same chains in the same order, the same verdicts, the same bytes in memory."""
    sides: tuple[PythonSide, NativeSide] = PythonSide(features), NativeSide(features)
    for side in sides:
        side.rings(table, inner, heads, idx, event)
    for turn in range(SIZE + 2):
        expected, found = (side.pop() for side in sides)
        assert found == expected
        if expected is None or expected[0] == "fault":
            break
        for side in sides:
            side.serve(turn)
        assert sides[0].queue.next_avail == sides[1].queue.next_avail
    assert sides[0].verdicts() == sides[1].verdicts()
    sides[0].chain = None
    assert sides[0].close() == sides[1].close()


def test_python_and_c_take_turns() -> None:
    """A queue in C popped and pushed by Python's methods goes on where C stopped, and the other way round."""
    side = NativeSide(0)
    side.rings([(TABLE + 16 * i, 16, WRITE, 0) for i in range(SIZE)], [], list(range(SIZE)), SIZE, 0)
    for i in range(0, SIZE, 2):
        assert side.pop() == (i, [], [(TABLE + 16 * i, 16)])
        side.serve(1)
        chain = side.queue.pop()
        assert chain is not None and chain.head == i + 1
        side.queue.push(chain, 2)
    assert side.memory.read_u16(USED + 2) == SIZE
    assert [side.memory.read_u32(USED + 4 + 8 * i) for i in range(SIZE)] == list(range(SIZE))
    side.queue.reset()
    assert side.pop() is None


def test_writes_by_c_mark_pages() -> None:
    """What C writes is marked in the slot's bitmap: the page of the used ring."""
    side = NativeSide(0)
    bitmap = ffi.new("uint64_t[]", 1)
    side.memory.slots[0].dirty = bitmap
    side.memory.publish()
    side.rings([(TABLE, 16, WRITE, 0)] * SIZE, [], [0] * SIZE, 1, 0)
    assert side.pop() is not None
    assert bitmap[0] == 0
    lib.pk_queue_push(side.state, 0, 0)
    assert bitmap[0] == 1
    lib.pk_memory_written(side.memory.native.slots, side.chain.iov[0].iov_base, side.chain.iov[0].iov_len)
    assert bitmap[0] == 1 | 1 << TABLE // PAGE
