"""The split virtqueue, device side, and every bounds check on what a driver writes into it. Layer: virtio.

Source: virtio 1.2, 2.7 (Split Virtqueues); each check names its section. All that the driver controls is read once
and then checked; whatever breaks a rule raises DriverFault, and the transport asks for a reset.

    queue.enable(features)
    while (chain := queue.pop()) is not None:
        queue.push(chain, written)
    if queue.should_interrupt(): ...
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.errors import GuestAddressError
from pykvm.virtio.chain import Chain
from pykvm.virtio.fault import DriverFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.memory import GuestMemory

MAX_SIZE = 1024  # of a queue that pykvm offers; also the most descriptors of a chain: IOV_MAX, what readv takes
MAX_BYTES = (1 << 32) - 1  # of a chain: 2.7.4.1 forbids more than 2^32, and used.len has 32 bits

DESC_SIZE, USED_SIZE, RING_HEADER = 16, 8, 4
INDIRECT_DESC = 1 << lib.VIRTIO_RING_F_INDIRECT_DESC
EVENT_IDX = 1 << lib.VIRTIO_RING_F_EVENT_IDX
NEXT, WRITE, INDIRECT = lib.VRING_DESC_F_NEXT, lib.VRING_DESC_F_WRITE, lib.VRING_DESC_F_INDIRECT


class Virtqueue:
    """One queue. The transport sets size and addresses, then enables it; a device pops and pushes chains.

    Not thread-safe: the transport's lock guards it.
    """

    def __init__(self, index: int, max_size: int, memory: GuestMemory) -> None:
        if not 1 <= max_size <= MAX_SIZE or max_size & max_size - 1:
            raise ValueError(f"queue size {max_size} is no power of two up to {MAX_SIZE}")
        self.index = index
        self.max_size = max_size
        self.memory = memory
        self.generation = 0  # counts resets: a chain of an earlier life is not pushed
        self.reset()

    def reset(self) -> None:
        """Back to the state before the driver set it up."""
        self.size = self.max_size
        self.desc = self.avail = self.used = 0  # GPAs of the three parts (2.7)
        self.enabled = False
        self.generation += 1
        self.next_avail = 0  # free-running 16-bit indexes, as in the rings
        self.next_used = 0
        self.signalled = 0  # next_used when the driver was last interrupted
        self._event_idx = self._indirect = False
        self._desc = self._avail = self._used = self._used_idx = memoryview(b"")

    # -- set-up -------------------------------------------------------------------------------------------------

    def enable(self, features: int) -> None:
        """Map the rings at the addresses that the driver gave. Raises DriverFault."""
        if not 1 <= self.size <= self.max_size or self.size & self.size - 1:
            raise DriverFault(f"queue {self.index} of {self.size} entries: no power of two up to its maximum (2.7)")
        size = self.size
        # 2.7: alignment 16, 2 and 4; 6 bytes of header and event field around each ring
        desc = self._ring("descriptor table", self.desc, DESC_SIZE * size, 16)
        avail = self._ring("available ring", self.avail, RING_HEADER + 2 * size + 2, 2)
        used = self._ring("used ring", self.used, RING_HEADER + USED_SIZE * size + 2, 4, write=True)
        self._reject_overlap(size)
        self._desc = desc.cast("Q")
        self._avail = avail.cast("H")
        self._used = used[: RING_HEADER + USED_SIZE * size].cast("I")
        self._used_idx = used.cast("H")
        self._event_idx = bool(features & EVENT_IDX)
        self._indirect = bool(features & INDIRECT_DESC)
        self.enabled = True
        self.want_notification()

    def _ring(self, what: str, gpa: int, length: int, alignment: int, *, write: bool = False) -> memoryview:
        if gpa % alignment:
            raise DriverFault(f"queue {self.index}: {what} at {gpa:#x} is not aligned to {alignment} (2.7)")
        try:
            (view,) = self.memory.views(gpa, length, write=write)
        except GuestAddressError as error:
            raise DriverFault(f"queue {self.index}: {what}: {error}") from None
        except ValueError:
            raise DriverFault(f"queue {self.index}: {what} at {gpa:#x} lies in two memory slots") from None
        return view

    def _reject_overlap(self, size: int) -> None:
        parts = sorted(
            (
                (self.desc, DESC_SIZE * size),
                (self.avail, RING_HEADER + 2 * size),
                (self.used, RING_HEADER + USED_SIZE * size),
            )
        )
        for i in (1, 2):
            if sum(parts[i - 1]) > parts[i][0]:
                raise DriverFault(f"queue {self.index}: its parts overlap at {parts[i][0]:#x} (2.7)")

    def release(self) -> None:
        """Drop the views of guest memory; the queue is done for."""
        self.enabled = False
        self._desc = self._avail = self._used = self._used_idx = memoryview(b"")

    # -- from the driver ----------------------------------------------------------------------------------------

    def pending(self) -> int:
        """How many chains the driver has made available (2.7.6). Raises DriverFault."""
        waiting = (self._avail[1] - self.next_avail) & 0xFFFF
        if waiting > self.size:
            raise DriverFault(f"queue {self.index}: avail.idx is {waiting} ahead of {self.size} entries (2.7.13.3)")
        return waiting

    def pop(self) -> Chain | None:
        """The next chain, or None when the driver has offered no more. Raises DriverFault."""
        if not self.enabled or not self.pending():
            return None
        head = self._avail[2 + (self.next_avail & self.size - 1)]
        chain = self._walk(head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return chain

    def unpop(self) -> None:
        """Give the chain popped last back to the available ring (a device that has no use for it yet)."""
        self.next_avail = (self.next_avail - 1) & 0xFFFF

    def again(self, head: int) -> Chain:
        """The chain popped earlier that begins at `head`, as the driver has it now. Raises DriverFault."""
        return self._walk(head)

    def _walk(self, head: int) -> Chain:
        table, limit, index, indirect = self._desc, self.size, head, False
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        count = total = 0
        while True:
            if index >= limit:
                raise DriverFault(f"queue {self.index}: descriptor {index} of {limit} (2.7.5)")
            gpa, word = table[2 * index], table[2 * index + 1]
            length, flags, following = word & 0xFFFFFFFF, word >> 32 & 0xFFFF, word >> 48
            if flags & INDIRECT:
                if indirect or flags & NEXT or not self._indirect:
                    raise DriverFault(f"queue {self.index}: indirect descriptor where none may be (2.7.5.3.1)")
                table, limit, index, indirect = self._indirect_table(gpa, length), length // DESC_SIZE, 0, True
                continue
            count, total = count + 1, total + length
            if count > (MAX_SIZE if indirect else self.size) or total > MAX_BYTES:
                raise DriverFault(f"queue {self.index}: chain of more than {self.size} descriptors or 4 GiB (2.7.5)")
            if writable and not flags & WRITE:
                raise DriverFault(f"queue {self.index}: device-readable after device-writable buffer (2.7.4.2)")
            self._add_buffer(gpa, length, bool(flags & WRITE), writable if flags & WRITE else readable)
            if not flags & NEXT:
                return Chain(head, readable, writable, self.generation)
            index = following

    def _indirect_table(self, gpa: int, length: int) -> memoryview:
        """The descriptors in an indirect table: of any size, but never looked at past MAX_SIZE of them in one chain."""
        if not length or length % DESC_SIZE:
            raise DriverFault(f"queue {self.index}: indirect table of {length} bytes (2.7.5.3.1)")
        try:
            return self.memory.view(gpa, length).cast("Q")
        except GuestAddressError as error:
            raise DriverFault(f"queue {self.index}: indirect table: {error}") from None

    def _add_buffer(self, gpa: int, length: int, write: bool, buffers: list[memoryview]) -> None:
        if not length:
            raise DriverFault(f"queue {self.index}: buffer of no bytes at {gpa:#x}")
        try:
            buffers += self.memory.views(gpa, length, write=write)
        except GuestAddressError as error:
            raise DriverFault(f"queue {self.index}: {error}") from None

    # -- to the driver ------------------------------------------------------------------------------------------

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back with `written` bytes in its writable buffers (2.7.8); dropped after a reset."""
        if chain.generation != self.generation or not self.enabled:
            return
        at = 1 + 2 * (self.next_used & self.size - 1)
        self._used[at] = chain.head
        self._used[at + 1] = written
        self.next_used = (self.next_used + 1) & 0xFFFF
        self._used_idx[1] = self.next_used  # x86 keeps the order of stores: the entry is visible before the index

    def should_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (2.7.7, 2.7.10)."""
        if not self.enabled or self.next_used == self.signalled:
            return False
        old, self.signalled = self.signalled, self.next_used
        lib.pk_fence()  # used.idx must be out before the driver's wish is read
        if self._event_idx:
            event = self._avail[2 + self.size]
            return (self.next_used - event - 1) & 0xFFFF < (self.next_used - old) & 0xFFFF
        return not self._avail[0] & lib.VRING_AVAIL_F_NO_INTERRUPT

    def want_notification(self) -> bool:
        """Ask for a notification of the next chain; True if one came meanwhile, for which there will be none."""
        if not self.enabled:
            return False
        if self._event_idx:
            self._used_idx[2 + 4 * self.size] = self.next_avail  # avail_event (2.7.10)
        lib.pk_fence()
        return self.pending() > 0
