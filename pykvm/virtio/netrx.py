"""The receiving half of a network device: frames of the backend into the guest's buffers. Layer: virtio.

Source: virtio 1.2, 5.1.6.3 and 5.1.6.4. How large a frame is shows when it has been read: it is read into as many
buffers as the last one needed, with a scratch buffer behind them. What lands there is copied into further buffers; if
the guest has too few of them, the frame waits in host memory. Buffers that stayed empty go back to the ring.
native/net.c does the same for taps.
"""

from __future__ import annotations

from pykvm.virtio.chain import slices
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.netbackend import HEADER_SIZE, IOV_MAX, MAX_FRAME, net_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.netbackend import NetBackend
    from pykvm.virtio.queue import Virtqueue

GUEST_CSUM, MERGEABLE = net_bits("GUEST_CSUM"), net_bits("MRG_RXBUF")
LARGEST = HEADER_SIZE + MAX_FRAME
NUM_BUFFERS_OFFSET = 10

# what `receive` found
TAKEN, DROPPED, EMPTY, NO_ROOM = "taken", "dropped", "empty", "no room"


class Receiver:
    """Takes one frame at a time.

    size      that of the frame last taken, without header
    expected  what the next one will have, with header
    """

    def __init__(self, backend: NetBackend) -> None:
        self.backend = backend
        self.size = 0
        self._spill = memoryview(bytearray(LARGEST + 1))
        self.reset()

    def reset(self) -> None:
        """Forget the chains that were taken from the ring, and the frame that waits."""
        self._chains: list[Chain] = []
        self._waiting: bytes | None = None  # with header: the guest's buffers are too few for it yet
        self._mergeable = self._checksums = False
        self.expected = HEADER_SIZE

    def change(self, backend: NetBackend) -> None:
        """Take frames from another backend; one of the old backend that waits is lost."""
        self.backend = backend
        self._waiting = None

    def negotiate(self, features: int) -> None:
        """What the driver agreed to."""
        self._mergeable = bool(features & MERGEABLE)
        self._checksums = bool(features & GUEST_CSUM)

    @property
    def is_holding(self) -> bool:
        """Whether a frame waits for more buffers."""
        return self._waiting is not None

    def take_over(self, frame: bytes, expected: int) -> None:
        """Go on where C stopped: with a frame (and its header) that waits for more buffers, or b""."""
        self._waiting = frame or self._waiting
        self.expected = max(expected, HEADER_SIZE)

    def drain(self) -> str:
        """Take a frame and drop it."""
        return DROPPED if self.backend.receive([self._spill]) else EMPTY

    def give_back(self, queue: Virtqueue) -> None:
        """Return chains that were taken from the ring and not used."""
        for _ in self._chains:
            queue.unpop()
        self._chains.clear()

    def receive(self, queue: Virtqueue) -> str:
        """Put one frame into the guest's buffers. Raises DriverFault, BackendGone. Call `give_back` in the end."""
        if self._waiting is not None:
            return self._deliver_waiting(queue, self._waiting)
        buffers, room = self._gather(queue, self.expected)
        if not buffers:
            return NO_ROOM
        skipped = 0 if self.backend.has_header else HEADER_SIZE
        got = self.backend.receive([*slices(buffers, skipped), self._spill])
        if not got:
            return EMPTY
        self.expected = total = got + skipped
        return self._deliver(queue, total) if total <= room else self._deliver_spilled(queue, buffers, room, total)

    def _gather(self, queue: Virtqueue, wanted: int) -> tuple[list[memoryview], int]:
        """Buffers of at least `wanted` bytes, as far as the driver has offered them, and the bytes they hold.

        Without mergeable buffers a frame has one chain.
        """
        room = sum(chain.writable_size for chain in self._chains)
        while (room < wanted if self._mergeable else not self._chains) and (chain := queue.pop()) is not None:
            if chain.readable:
                raise DriverFault(f"queue {queue.index}: device-readable buffer to receive into (5.1.6.3.1)")
            if chain.writable_size < HEADER_SIZE:
                raise DriverFault(f"queue {queue.index}: {chain.writable_size} bytes have no room for a header")
            self._chains.append(chain)
            room += chain.writable_size
        buffers = [buffer for chain in self._chains for buffer in chain.writable]
        if len(buffers) >= IOV_MAX:  # readv takes no more, and one is the scratch buffer
            del buffers[IOV_MAX - 1 :]
            room = sum(map(len, buffers))
        return buffers, room

    def _deliver_spilled(self, queue: Virtqueue, buffers: list[memoryview], room: int, total: int) -> str:
        """A frame that was longer than the buffers, with the rest of it in the spill."""
        if not self._mergeable or total > LARGEST:
            return DROPPED
        self._waiting = b"".join((*buffers, self._spill[: total - room]))
        return self.receive(queue)

    def _deliver_waiting(self, queue: Virtqueue, frame: bytes) -> str:
        buffers, room = self._gather(queue, len(frame))
        if room < len(frame):
            if len(self._chains) < queue.size:
                return NO_ROOM
            self._waiting = None  # the whole ring is too small for it
            return DROPPED
        done = 0
        for buffer in slices(buffers, 0, len(frame)):
            buffer[:] = frame[done : done + len(buffer)]
            done += len(buffer)
        self._waiting = None
        return self._deliver(queue, len(frame))

    def _deliver(self, queue: Virtqueue, total: int) -> str:
        """Hand `total` bytes, header included, that are in the buffers of the first chains to the driver."""
        used: list[tuple[Chain, int]] = []
        left = total
        while left > 0:
            chain = self._chains[len(used)]
            part = min(left, chain.writable_size)
            used.append((chain, part))
            left -= part
        head = used[0][0]
        if not self.backend.has_header:
            head.write(bytes(NUM_BUFFERS_OFFSET))
        elif not self._checksums:
            head.write(b"\0")  # no flag has a meaning then, and the kernel sets one all the same (5.1.6.4.1)
        head.write(len(used).to_bytes(2, "little"), NUM_BUFFERS_OFFSET)
        for chain, part in used:
            queue.push(chain, part)
        del self._chains[: len(used)]
        self.size = total - HEADER_SIZE
        return TAKEN
