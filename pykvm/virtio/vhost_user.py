"""A device whose queues another process serves: the front end of vhost-user. Layer: virtio.

Source: "Vhost-user Protocol" (QEMU docs/interop/vhost-user.rst), sections "Starting and stopping rings", "Multiple
queue support" and "Ring states"; virtio 1.2 for what the guest sees.

The back end gets guest memory as descriptors (so RAM has to be memfds: `shared_memory`), and the eventfds of the
transport: kicks and interrupts pass pykvm by. Messages are sent under the transport's lock, each with a deadline. When
the back end dies while the machine runs, `source` may provide a new one: it goes on at the first request that the dead
one had not finished. If there is none, the device stops with NEEDS_RESET and one line in the log.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from pykvm import log
from pykvm._native import lib
from pykvm.errors import ConfigError, GuestAddressError, SnapshotError
from pykvm.virtio import vhostmsg as msg
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.queue import RING_HEADER, USED_SIZE
from pykvm.virtio.vhostmsg import BackendError, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.virtio.backend import BackendSource
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.queue import Virtqueue

VERSION_1 = 1 << lib.VIRTIO_F_VERSION_1
DEVICE_BITS = (1 << 24) - 1  # virtio 1.2, 2.2: bits 0 to 23 are the device type's
RING_BITS = VERSION_1 | 1 << lib.VIRTIO_RING_F_INDIRECT_DESC | 1 << lib.VIRTIO_RING_F_EVENT_IDX
LOGGED_WORDS, WORD_LENGTH = 10, 300  # lines of one back end that are passed on, and the characters of each
DRAIN_S, DRAIN_STEP_S = 10.0, 0.001  # how long requests may take after their ring was stopped
RESTARTS, RESTART_WINDOW_S = 3, 60.0  # more deaths than that in that time are a back end that does not work


class VhostUser(VirtioDevice):
    """Base class of devices with a vhost-user back end; `source` starts or reaches it.

    Raises ConfigError when there is no back end, or one that cannot be used.
    """

    external = True
    own_thread = True  # a new back end takes a moment, one that hangs some seconds
    shared_memory = True
    settle_s = 1.0  # how long a snapshot may wait for requests that are served one by one; those of some never end
    has_config = False  # whether the back end holds the configuration space (VHOST_USER_PROTOCOL_F_CONFIG)

    def __init__(self, source: BackendSource) -> None:
        self.source = source
        self._active = 0  # queues that the back end serves
        self._agreed = 0
        self._driver_features = 0
        self._frozen = False  # the rings are stopped for a snapshot
        self._deaths: list[float] = []
        self._words = 0
        self._connection: Connection | None = None
        self._error_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.features = self._connect()
        except BackendError as error:
            why = source.last_words() or str(error)
            self._release()
            raise ConfigError(source.option, f"{source.name} cannot be used: {why}") from None
        except BaseException:
            self._release()
            raise

    # -- the connection -----------------------------------------------------------------------------------------

    def _connect(self) -> int:
        """Reach a back end and agree on the protocol; the features that it offers. Raises BackendError."""
        connection = self._connection = Connection(self.source.connect())
        (offered,) = msg.U64.unpack(connection.request(msg.GET_FEATURES))
        if not offered & VERSION_1:
            raise BackendError("it does not know virtio 1 (VIRTIO_F_VERSION_1)")
        self._agreed = 0
        if offered & msg.F_PROTOCOL_FEATURES:
            (protocol,) = msg.U64.unpack(connection.request(msg.GET_PROTOCOL_FEATURES))
            self._agreed = protocol & (msg.P_MQ | msg.P_REPLY_ACK | (msg.P_CONFIG if self.has_config else 0))
            connection.send(msg.SET_PROTOCOL_FEATURES, msg.U64.pack(self._agreed))
            connection.reply_ack = bool(self._agreed & msg.P_REPLY_ACK)
        if self.has_config and not self._agreed & msg.P_CONFIG:
            raise BackendError("it does not tell its configuration (VHOST_USER_PROTOCOL_F_CONFIG)")
        connection.send(msg.SET_OWNER)
        self._protocol = bool(offered & msg.F_PROTOCOL_FEATURES)
        if self._agreed & msg.P_MQ:
            (queues,) = msg.U64.unpack(connection.request(msg.GET_QUEUE_NUM))
            if queues < len(self.queue_sizes):
                raise BackendError(f"it has {queues} queues, the device {len(self.queue_sizes)}")
        self.greet(connection)
        return int(offered & (DEVICE_BITS | RING_BITS))

    def greet(self, connection: Connection) -> None:
        """A new back end: for devices that ask it more, at once. May raise BackendError."""

    def bind(self, transport: VirtioMmio) -> None:
        """Watch the back end. Raises ConfigError when guest memory cannot be handed over."""
        super().bind(transport)
        if not self.memory.memfd:
            raise ConfigError("memfd", f"{self.name} shares memory with {self.source.name}: it needs memfd=True")
        self._watch()
        self.io.add_reader(self._error_event, self._on_error)

    def _watch(self) -> None:
        if self._connection is not None:
            self.io.add_reader(self._connection.fileno(), self._on_readable)
            if self.source.voice >= 0:
                self.io.add_reader(self.source.voice, self._on_words)

    def _on_words(self) -> None:
        """Pass on what the back end says while it works, say of a damaged image: it is not for the guest to know."""
        with self.transport.lock:
            lines = self.source.listen() if self.source.voice >= 0 else []
            if lines is None:
                self.io.remove_reader(self.source.voice)
        for line in lines or ():
            self._words += 1
            if self._words <= LOGGED_WORDS:  # it may be the guest that makes it talk
                log.warning("vhost-user back end", device=self.name, says=line[:WORD_LENGTH])

    def _on_readable(self) -> None:
        with self.transport.lock:  # whoever waits for a reply holds it: what is there now was not asked for
            why = self._connection.idle_fault() if self._connection is not None else None
            if why is not None:
                self._lost(why)

    def _on_error(self) -> None:
        os.eventfd_read(self._error_event)
        with self.transport.lock:
            if self._connection is not None:
                self._lost("it reports an error of a queue")

    # -- death and return ---------------------------------------------------------------------------------------

    def _lost(self, why: str) -> None:
        """Under the lock: the back end cannot be used any more; go on with a new one, or stop."""
        self._hang_up()
        words = self.source.last_words() or why
        now = monotonic()
        self._deaths = [then for then in self._deaths if now - then < RESTART_WINDOW_S] + [now]
        if self.source.restarts and len(self._deaths) <= RESTARTS:
            try:
                if self.features & ~self._connect():
                    raise BackendError("the new one has fewer features")
                self._watch()
                if self.transport.live:
                    self._start(self._driver_features, resumed=True)
            except (BackendError, ConfigError) as error:
                self._hang_up()
                words = f"{words}; starting it again failed: {error}"
            else:
                log.warning(
                    "vhost-user back end died and was started again",
                    device=self.name,
                    why=words,
                    note=self.source.advice,
                )
                return
        self.transport.needs_reset(f"{self.source.name} is gone: {words}. {self.source.remedy}")

    def _hang_up(self, *, well: bool = False) -> None:
        """Drop the connection, and the process behind it, which is `well` or perhaps dying."""
        connection, self._connection, self._active = self._connection, None, 0
        if connection is not None:
            if hasattr(self, "io"):
                self.io.remove_reader(connection.fileno())
                if self.source.voice >= 0:
                    self.io.remove_reader(self.source.voice)
            connection.close()
        if well:
            self.source.end()
        else:
            self.source.stop()

    # -- starting and stopping rings ----------------------------------------------------------------------------

    def activate(self, features: int) -> None:
        """The driver is ready: hand memory and queues over."""
        self._driver_features, self._frozen = features, False
        if self._connection is None:
            self._lost("it was not there when the driver came")
            return
        try:
            self._start(features)
        except BackendError as error:
            self._lost(str(error))

    def _start(self, features: int, *, resumed: bool = False) -> None:
        connection = self._connection
        assert connection is not None
        protocol = msg.F_PROTOCOL_FEATURES if self._protocol else 0
        connection.send(msg.SET_FEATURES, msg.U64.pack(features | protocol))
        self._send_memory(connection)
        for queue in self.queues:
            if queue.enabled:
                self._start_queue(connection, queue, self._unfinished(queue) if resumed else queue.next_avail)
        if not connection.reply_ack:
            connection.request(msg.GET_FEATURES)  # messages are handled in order: its reply says that all were
        self._active = len(self.queues)

    def _send_memory(self, connection: Connection) -> None:
        """Every slot that the guest may write; rings and buffers elsewhere are the back end's to refuse."""
        slots = [slot for slot in self.memory.slots if slot.shared_fd >= 0 and not slot.readonly]
        if len(slots) > msg.MAX_REGIONS:
            raise BackendError(f"the machine has {len(slots)} memory slots, the protocol {msg.MAX_REGIONS}")
        table = msg.MEM_TABLE.pack(len(slots), 0)
        for slot in slots:
            table += msg.MEM_REGION.pack(slot.gpa, slot.size, slot.hva, slot.fd_offset)
        connection.send(msg.SET_MEM_TABLE, table, [slot.shared_fd for slot in slots])

    def _unfinished(self, queue: Virtqueue) -> int:
        """Where the available ring's unfinished requests start, for a back end that takes over (2.7.6, 2.7.8).

        As many are unfinished as the available ring is ahead of the used one, but only if those before are the finished
        ones: a back end that finished them in another order left gaps, and nobody knows where.
        """
        size, read = queue.size, self.memory.read_uint
        waiting, done = self._waiting(queue), read(queue.used + 2, 2)
        if waiting > size:
            raise BackendError(f"queue {queue.index} has {waiting} requests in {size} entries")
        before = [(done - 1 - back) % size for back in range(size - waiting)]
        taken = sorted(read(queue.avail + RING_HEADER + 2 * at, 2) for at in before)
        if taken != sorted(read(queue.used + RING_HEADER + USED_SIZE * at, 4) for at in before):
            raise BackendError("it died with requests of which nobody knows whether they are finished")
        return done

    def _start_queue(self, connection: Connection, queue: Virtqueue, base: int) -> None:
        index = queue.index
        kick, call = self.transport.kicks[index], self.transport.call
        addresses = [self._hva(gpa) for gpa in (queue.desc, queue.used, queue.avail)]
        connection.send(msg.SET_VRING_NUM, msg.VRING_STATE.pack(index, queue.size))
        connection.send(msg.SET_VRING_BASE, msg.VRING_STATE.pack(index, base))
        connection.send(msg.SET_VRING_ADDR, msg.VRING_ADDR.pack(index, 0, *addresses, 0))
        connection.send(msg.SET_VRING_CALL, msg.U64.pack(index), [call])
        connection.send(msg.SET_VRING_ERR, msg.U64.pack(index), [self._error_event])
        connection.send(msg.SET_VRING_KICK, msg.U64.pack(index), [kick])
        if self._protocol:
            connection.send(msg.SET_VRING_ENABLE, msg.VRING_STATE.pack(index, 1))
        os.eventfd_write(kick, 1)  # what was made available before it listened

    def _hva(self, gpa: int) -> int:
        """Rings go by the front end's addresses. The queue's own checks have found the ring to be in one slot."""
        slot = self.memory.slot_at(gpa)
        if slot is None or slot.shared_fd < 0 or slot.readonly:
            raise BackendError(str(GuestAddressError(gpa, 1, "is no memory that is shared with a back end")))
        return slot.hva + gpa - slot.gpa

    def reset(self) -> None:
        """Stop the rings: GET_VRING_BASE returns when the back end has let go of one."""
        self._driver_features, self._frozen = 0, False
        active, self._active = self._active, 0
        connection = self._connection
        if not active or connection is None:
            return
        try:
            for queue in self.queues:
                if queue.enabled:
                    self._stop_queue(connection, queue)
        except BackendError as error:
            self._lost(str(error))

    def _stop_queue(self, connection: Connection, queue: Virtqueue) -> int:
        """Where in the available ring the back end would go on."""
        state = msg.VRING_STATE.pack(queue.index, 0)
        reply = connection.request(msg.GET_VRING_BASE, state, size=msg.VRING_STATE.size)
        return int(msg.VRING_STATE.unpack(reply)[1]) & 0xFFFF

    def stop(self) -> None:
        """NEEDS_RESET: the back end has to let go of the rings as well."""
        self.reset()

    # -- snapshots ----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop the rings, each when the back end has finished what it took: where they stand is in the queues then.

        Until then it may go on with what the driver has made available already.
        """
        connection = self._connection
        if not self._active or connection is None:
            return
        self._settle()
        try:
            for queue in self.queues:
                if queue.enabled:
                    base = self._stop_queue(connection, queue)
                    self._await_end(queue, base)
                    queue.next_avail = queue.next_used = queue.signalled = base
        except BackendError as error:
            self._lost(str(error))
            raise SnapshotError(f"{self.name}: {self.source.name} cannot be stopped for a snapshot: {error}") from None
        self._active, self._frozen = 0, True

    def _settle(self) -> None:
        """Give the back end time to serve what there is; the vCPUs are paused."""
        end = monotonic() + self.settle_s
        while any(0 < self._waiting(queue) <= queue.size for queue in self.queues) and monotonic() < end:
            sleep(DRAIN_STEP_S)

    def _waiting(self, queue: Virtqueue) -> int:
        """How many requests are not done; more than the queue has room for is a driver's nonsense."""
        read = self.memory.read_uint
        return (read(queue.avail + 2, 2) - read(queue.used + 2, 2)) & 0xFFFF if queue.enabled else 0

    def _await_end(self, queue: Virtqueue, base: int) -> None:
        """Wait until as many requests are done as were taken: some back ends let go of a ring before that."""
        end = monotonic() + DRAIN_S
        while self.memory.read_uint(queue.used + 2, 2) != base:
            if monotonic() > end:
                raise BackendError(f"requests of queue {queue.index} have not ended after {DRAIN_S:g} s")
            sleep(DRAIN_STEP_S)

    def thaw(self) -> None:
        """Start the rings again, and interrupt: a request that ended while they stopped may have had nobody to call."""
        frozen, self._frozen = self._frozen, False
        if frozen and self.transport.live:
            self.activate(self._driver_features)
            self.transport.look_again()

    def renew(self) -> None:
        """Go on with a new back end. Raises SnapshotError."""
        self._hang_up(well=True)
        try:
            if self.features & ~self._connect():
                raise BackendError("the new one has fewer features")
        except (BackendError, ConfigError) as error:
            self._hang_up()
            raise SnapshotError(f"{self.name}: {self.source.name} cannot be started again: {error}") from None
        self._watch()

    # -- configuration ------------------------------------------------------------------------------------------

    def fetch_config(self, connection: Connection, size: int) -> bytes:
        """The first `size` bytes of the back end's configuration space."""
        ask = msg.CONFIG.pack(0, size, 0) + bytes(size)
        reply = connection.request(msg.GET_CONFIG, ask, size=msg.CONFIG.size + size)
        if msg.CONFIG.unpack_from(reply)[1] != size:
            raise BackendError(f"its configuration is not the {size} bytes that were asked for")
        return reply[msg.CONFIG.size :]

    def send_config(self, offset: int, data: bytes) -> None:
        """Pass a write of the driver on."""
        if self._connection is None:
            return
        try:
            ask = msg.CONFIG.pack(offset, len(data), msg.CONFIG_WRITABLE) + data
            self._connection.send(msg.SET_CONFIG, ask)
        except BackendError as error:
            self._lost(str(error))

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the back end."""
        if hasattr(self, "io"):
            self.io.remove_reader(self._error_event)
        self._release()

    def _release(self) -> None:
        self._hang_up()
        if self._error_event >= 0:
            os.close(self._error_event)
            self._error_event = -1
