"""What a virtio device is: id, features, configuration, and a handler that gets requests. Layer: virtio.

A device is a class; this one answers each request with its text in capitals:

    class Shout(VirtioDevice):
        device_id = 0x30
        queue_sizes = (64,)

        def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
            return chain.write(chain.read(4096).upper())

`Pc(kernel, devices=[Shout()])` puts it on a virtio-mmio transport. Handlers run on the machine's I/O thread under the
transport's lock, one at a time; register and configuration accesses come from vCPU threads under the same lock. A
handler may raise DriverFault: the device then stops with NEEDS_RESET. Any other exception stops the machine and
reaches whoever waits for it.
"""

from __future__ import annotations

from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.console import Console
    from pykvm.core.iothread import IoThread
    from pykvm.core.memory import GuestMemory
    from pykvm.core.state import Shape, State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.queue import Virtqueue
    from pykvm.virtio.rate import RateLimit, Throttle


class VirtioDevice:
    """Base class of virtio devices.

    name         in messages and statistics
    device_id    virtio 1.2, 5: VIRTIO_ID_* of the kernel header
    features     device-specific feature bits offered; the transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX
    queue_sizes  the maximum size of each queue, powers of two up to 1024
    external     a back end in another process serves the queues: nothing here polls their kick eventfds
    outside      the queues of which that is true, where it is not true of all: the others are served here
    own_thread   handlers run on an I/O thread of this device alone, for one whose requests may block
    shared_memory  guest memory has to be memfds that another process can map (MachineConfig.memfd)
    memory_size  bytes of guest physical memory that the device brings along: the board calls `place` for it
    native       C serves the queues as well: they and the lock are those of pykvm.virtio.native
    limit        a RateLimit that `on_notify` keeps to, or None
    shape        what `save` gives (core.state; STATELESS for nothing beside the queues); None: it cannot be saved
    """

    name = "virtio"
    device_id = 0
    features = 0
    queue_sizes: Sequence[int] = ()
    external = False
    outside: Sequence[int] = ()
    own_thread = False
    shared_memory = False
    memory_size = 0
    native = False
    limit: RateLimit | None = None
    throttle: Throttle | None = None  # made by `bind` from `limit`

    shape: Shape | None = None

    transport: VirtioMmio  # set by `bind`
    io: IoThread
    memory: GuestMemory
    queues: list[Virtqueue]

    def bind(self, transport: VirtioMmio) -> None:
        """The device was put on a transport: before the first run, once."""
        self.transport = transport
        self.io, self.memory, self.queues = transport.io, transport.memory, transport.queues
        if self.limit is not None:
            from pykvm.virtio.rate import Throttle

            self.throttle = Throttle(self.limit, self.io.call_later, transport.notify)

    def another_limit(self) -> RateLimit | None:
        """For `twin`: the same rate limit, which the copy pays for itself."""
        return self.limit.again() if self.limit is not None else None

    def limit_numbers(self) -> list[int]:
        """For `recipe`: the rate limit (pykvm.virtio.rate.numbers_of)."""
        from pykvm.virtio.rate import numbers_of

        return numbers_of(self.limit)

    def place(self, memory: GuestMemory, gpa: int) -> None:
        """Put a slot of `memory_size` bytes at `gpa`, before `bind`."""
        raise NotImplementedError

    def join(self, console: Console) -> None:
        """The machine's console is `console`: for devices whose output belongs in there."""

    # -- what a device overrides --------------------------------------------------------------------------------

    def config(self) -> bytes:
        """The device's configuration space as it is now (virtio 1.2, 2.5); reads past its end give zeros."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote `data` into the configuration space, all inside it; ignored by default."""

    def activate(self, features: int) -> None:
        """The driver said DRIVER_OK with these negotiated features; the queues that it set up are enabled."""

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Serve one request: the bytes written into `chain`, or None to complete it later by `complete`."""
        raise NotImplementedError

    def on_notify(self, queue: Virtqueue) -> None:
        """The driver notified `queue`: by default its requests go to `on_request`, one after the other.

        At most one queue's worth is served a call, then the I/O thread turns to other work first: a driver that keeps
        adding requests starves nobody. A device over its rate limit leaves the rest in the ring until a timer rings.
        """
        throttle = self.throttle
        for _ in range(queue.size):
            if throttle is not None and not throttle.ready(queue.index):
                break
            chain = queue.pop()
            if chain is None:
                if not queue.want_notification():
                    break
                continue
            if throttle is not None:
                throttle.charge(chain.readable_size + chain.writable_size)
            written = self.on_request(queue, chain)
            if written is not None:
                queue.push(chain, written)
        else:
            self.transport.notify(queue.index)
        self.transport.interrupt(queue)

    def stop(self) -> None:
        """The device stopped with NEEDS_RESET: nothing is served until a reset."""

    def reset(self) -> None:
        """The driver or the machine reset the device: forget requests in flight. The queues are reset afterwards."""

    def close(self) -> None:
        """Release host resources; the machine is closing, and its I/O thread has ended."""

    # -- snapshots ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish the requests in flight, under the lock; none comes before the state was saved."""

    def unfinished(self, queue: Virtqueue) -> int:
        """How many of the chains popped last the device still has: one that is restored finds them in the ring."""
        return 0

    def save(self) -> State:
        """Its own state, beside registers and queues."""
        return self.shape.take(self) if self.shape is not None else {}

    def restore(self, state: State) -> None:
        """Continue from it; the device was reset, and `activate` follows if the driver is ready."""
        if self.shape is not None:
            self.shape.put(self, state)

    def freeze(self) -> None:
        """Under the transport's lock: stop what works beside it, with no request left, until `thaw` or `restore`."""

    def thaw(self) -> None:
        """Go on after `freeze`, if `restore` has not seen to that. Raises nothing."""

    def check_snapshot(self, *, to_file: bool) -> None:
        """Raise SnapshotError when a snapshot in memory, or one for a file, would not be what it seems."""

    def twin(self) -> VirtioDevice:
        """A device for a fork of the machine. Raises SnapshotError where there cannot be one."""
        raise SnapshotError(f"{self.name} cannot be forked: leave it out")

    def recipe(self) -> tuple[str, dict[str, object]]:
        """(kind, options) of what makes it again, for a snapshot file. Raises SnapshotError where nothing does."""
        raise SnapshotError(f"{self.name} cannot be saved to a file: leave it out")

    # -- what a device calls ------------------------------------------------------------------------------------

    def complete(self, queue: Virtqueue, chain: Chain, written: int = 0) -> None:
        """Finish a request for which `on_request` returned None, from the I/O thread."""
        with self.transport.lock:
            queue.push(chain, written)
            self.transport.interrupt(queue)

    def config_changed(self) -> None:
        """`config()` gives something new: tell the driver (2.5.3), from any thread that may take the lock."""
        self.transport.config_changed()
