"""The receiving half of a network device: frames of the backend into the guest's buffers. Layer: virtio.

Source: virtio 1.2, 5.1.6.3 and 5.1.6.4. How large a frame is shows when it has been read: it is read into as many
buffers as the largest may need, and those that stayed empty go back to the ring. A scratch buffer behind them takes
what the guest has no room for.
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
LARGE = net_bits("GUEST_TSO4", "GUEST_TSO6", "GUEST_UFO", "GUEST_USO4", "GUEST_USO6")
LARGEST = HEADER_SIZE + MAX_FRAME
NUM_BUFFERS_OFFSET = 10
LINK_OVERHEAD = 18  # Ethernet header and a VLAN tag

# what `receive` found
TAKEN, DROPPED, EMPTY, NO_ROOM = "taken", "dropped", "empty", "no room"


class Receiver:
    """Takes one frame at a time. `size` is that of the frame last taken, without header."""

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
        self._wanted = LARGEST

    def negotiate(self, features: int, mtu: int) -> None:
        """What the driver agreed to, and the largest frame that it expects."""
        self._mergeable = bool(features & MERGEABLE)
        self._checksums = bool(features & GUEST_CSUM)
        large = features & LARGE or not mtu
        self._wanted = LARGEST if large else HEADER_SIZE + LINK_OVERHEAD + mtu

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
        buffers, room = self._gather(queue)
        if self._waiting is not None:
            return self._deliver_waiting(queue, buffers, room)
        if not buffers:
            return NO_ROOM
        skipped = 0 if self.backend.has_header else HEADER_SIZE
        got = self.backend.receive([*slices(buffers, skipped), self._spill])
        if not got:
            return EMPTY
        total = got + skipped
        if total <= room:
            return self._deliver(queue, total)
        if not self._mergeable or total > LARGEST:
            return DROPPED
        self._waiting = b"".join((*buffers, self._spill[: total - room]))
        return self.receive(queue)

    def _gather(self, queue: Virtqueue) -> tuple[list[memoryview], int]:
        """Buffers for the largest frame, as far as the driver has offered them, and the bytes they hold."""
        room = sum(chain.writable_size for chain in self._chains)
        while (room < self._wanted if self._mergeable else not self._chains) and (chain := queue.pop()) is not None:
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

    def _deliver_waiting(self, queue: Virtqueue, buffers: list[memoryview], room: int) -> str:
        frame = self._waiting
        assert frame is not None
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
