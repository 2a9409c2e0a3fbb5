"""virtio-net: a network interface (virtio 1.2, 5.1). Layer: virtio.

    Pc(kernel, devices=[Net(Tap("tap0")), Net(Passt(["tcp::2222-:22"]))])

A frame moves between the backend and the guest's buffers by one system call. One that is wrong in itself is dropped and
counted; buffers that break a rule of virtio stop the device. While the guest has no room, frames wait in the backend,
which drops what is too much.
"""

from __future__ import annotations

import os
from collections import deque
from select import EPOLL_CLOEXEC, EPOLLIN, EPOLLOUT, epoll

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.core.state import BOOL, U64, Bytes, ListOf, Shape
from pykvm.errors import ConfigError
from pykvm.virtio import netctl, netrx
from pykvm.virtio.chain import slices
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.netbackend import HEADER_SIZE, BackendGone, net_bits
from pykvm.virtio.netheader import is_sound
from pykvm.virtio.netplug import OFFLOADS, Blink, Unplugged, offered_by

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm._native import CData
    from pykvm.core.state import State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.netbackend import NetBackend
    from pykvm.virtio.queue import Virtqueue
    from pykvm.virtio.rate import RateLimit

QUEUE_SIZE, CONTROL_SIZE = 256, 64
RX, TX, CONTROL = 0, 1, 2
BURST = 64  # frames that one call takes from the backend, before the I/O thread turns to other work
POLL_NS = 50_000  # the longest time for which an empty transmit queue is watched, where there is a CPU to spare
MIN_MTU, MAX_MTU = 68, 65535  # 5.1.4.1


class Net(VirtioDevice):
    """A network interface.

    backend  where its frames go: Tap, Passt, ...; closed with the device. None: it is not plugged in; see plug
    mac      "52:54:00:12:34:56"; by default a random one of those that nobody owns
    mtu      what the driver is told to use at most (VIRTIO_NET_F_MTU); by default the backend's
    link     whether the cable is plugged in at the start; see set_link
    limit    a rate limit for bytes and frames of both directions together
    native   let C move the frames of a tap; what it cannot do (limits, other backends) is done by Python anyway

    `frames` and `bytes` count what passed ("rx" is to the guest), `dropped` what did not. Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_NET
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE)

    def __init__(
        self,
        backend: NetBackend | None,
        *,
        mac: str | None = None,
        mtu: int | None = None,
        link: bool = True,
        limit: RateLimit | None = None,
        native: bool = True,
    ) -> None:
        self.alive = backend is not None  # it is plugged in, and the backend has not died
        self.backend = backend = Unplugged() if backend is None else backend
        try:
            self.mac = parse_mac(mac) if mac is not None else bytes((2, *os.urandom(5)))
            self.mtu = backend.mtu if mtu is None else mtu
            if (mtu is not None or self.mtu) and not MIN_MTU <= self.mtu <= MAX_MTU:
                raise ConfigError("mtu", f"{self.mtu} is not {MIN_MTU} to {MAX_MTU}")
        except BaseException:
            backend.close()
            raise
        self.name = f"net {backend.name}"
        self.limit = limit
        self.features = net_bits("MAC", "STATUS", "MRG_RXBUF") | netctl.FEATURES | offered_by(backend)
        self.features |= net_bits("MTU") if self.mtu else 0
        self.native = native and backend.is_plain and limit is None
        self._plane: CData = ffi.gc(lib.pk_net_new(), lib.pk_net_free)  # what C shares, counters among it
        self.link = link
        self.negotiated = 0
        self._offloads: int | None = None  # of those negotiated, what the driver wants for now (5.1.6.5.6)
        self._blink = Blink()
        self._plugged_in = _random_number()  # changes with the backend
        self.control = netctl.Control(self)
        self._receiver = netrx.Receiver(backend)
        self._epoll = epoll(flags=EPOLL_CLOEXEC)
        self._plane.fd, self._plane.epoll = backend.fd, self._epoll.fileno()
        self._backlog: deque[Chain] = deque()  # frames to send, while the backend is full
        if not link:
            backend.set_link(False)

    # -- configuration (5.1.4) ----------------------------------------------------------------------------------

    def config(self) -> bytes:
        """MAC address, link status, MTU."""
        config = ffi.new("struct virtio_net_config *")
        config.mac = list(self.mac)
        self._blink.seen(self.io, self._stop_blinking)
        config.status = lib.VIRTIO_NET_S_LINK_UP if self.is_up else 0
        config.status |= lib.VIRTIO_NET_S_ANNOUNCE if self.control.announcing else 0
        config.max_virtqueue_pairs = 1
        config.mtu = self.mtu
        return bytes(ffi.buffer(config))

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out, as the guest sees it; from any thread. Frames are dropped while it is out."""
        with self.transport.lock:
            if up != self.link:
                self.link = up
                self._plane.link = up
                if self.alive:
                    self.backend.set_link(up)
                    self.config_changed()
                if self.negotiated:  # what still comes in is dropped at once
                    self._watch(self._plane.watched | EPOLLIN)

    @property
    def is_up(self) -> bool:
        """Whether the guest sees a link."""
        return self.link and self.alive and not self._blink.on

    def plug(self, backend: NetBackend | None) -> None:
        """Connect it to `backend`, or with None to nothing, instead of what it was connected to, which is closed.

        From any thread. The guest sees the link go down for a moment, so that it asks for its addresses anew. Raises
        ConfigError, and closes `backend`, when it lacks what the guest's driver was promised.
        """
        backend = Unplugged() if backend is None else backend
        with self.transport.lock:
            before, here = self.backend, not isinstance(backend, Unplugged)
            status = self.transport.status
            promised = self.transport.driver_features if status & lib.VIRTIO_CONFIG_S_FEATURES_OK else self.features
            if here and promised & OFFLOADS & ~offered_by(backend):
                backend.close()
                raise ConfigError("net", f"the guest relies on offloads that {backend.name} lacks: it takes a tap")
            self._unwatch()
            self.backend, self.alive = backend, here
            self._plugged_in = _random_number()
            self._receiver.change(backend)
            self._blink.stop()
            if here:
                self._start_backend()
                self._blink.start()
            self.config_changed()
        before.close()

    def _unwatch(self) -> None:
        """Have nothing of the backend any more."""
        self._watch(0)
        plane = self._plane
        plane.active = plane.waiting = plane.rx_held = plane.watched = 0
        plane.fd = -1

    def _start_backend(self) -> None:
        """A backend was plugged in."""
        self._plane.fd = self.backend.fd
        self.backend.set_link(self.link)
        if self.negotiated and not self.transport.status & lib.VIRTIO_CONFIG_S_NEEDS_RESET:
            self.activate(self.negotiated)
            if self._backlog:
                self._watch(self._plane.watched | EPOLLOUT)

    def _stop_blinking(self) -> None:
        with self.transport.lock:
            if self._blink.on:
                self._blink.stop()
                self.config_changed()

    def announce(self) -> None:
        """Ask the guest to tell its neighbours where it is now (5.1.6.5.4), for a machine that moved."""
        with self.transport.lock:
            self.control.announce()

    def set_offloads(self, features: int) -> None:
        """The GUEST_* offloads that the driver can take from now on."""
        self._offloads = features
        self._receiver.negotiate(self.negotiated)
        if self.alive:
            self.backend.set_offloads(features)

    def set_filter(self, addresses: Sequence[bytes] | None, all_multicast: bool) -> None:
        """The frames that the driver wants."""
        if self.alive:
            self.backend.set_filter(addresses, all_multicast=all_multicast)

    # -- life ---------------------------------------------------------------------------------------------------

    def bind(self, transport: VirtioMmio) -> None:
        """Let the I/O thread watch the backend, and C serve what it can."""
        super().bind(transport)
        self.io.add_reader(self._epoll.fileno(), self._on_ready)
        if not self.native:
            return
        from pykvm.virtio.native import NativeLock, NativeQueue, interrupt_of

        plane, (rx, tx, _) = self._plane, self.queues
        assert isinstance(transport.lock, NativeLock) and isinstance(rx, NativeQueue) and isinstance(tx, NativeQueue)
        plane.lock, plane.rx, plane.tx = transport.lock.handle, rx.state, tx.state
        plane.poll.max_ns = POLL_NS if len(os.sched_getaffinity(0)) > 1 else 0
        interrupt_of(transport, plane.interrupt)
        for fd, handler in (
            (plane.epoll, plane.on_backend),
            (transport.kicks[RX], plane.on_rx),
            (transport.kicks[TX], plane.on_tx),
        ):
            self.io.add_handler(fd, ffi.addressof(handler, "handler"))

    def activate(self, features: int) -> None:
        """Take frames from the backend from now on."""
        self._agree(features)
        plane = self._plane
        plane.features, plane.link, plane.expected = features, self.link, 0
        plane.mergeable = bool(features & netrx.MERGEABLE)
        plane.checksums = bool(features & netrx.GUEST_CSUM)
        plane.active = self.native and self.alive and self.backend.is_plain
        self._watch(plane.watched | EPOLLIN)

    def _agree(self, features: int) -> None:
        """Tell the backend what was negotiated, and what the driver has set."""
        self.negotiated = features
        self.set_offloads(features if self._offloads is None else self._offloads & features)
        self.control.apply()

    def stop(self) -> None:
        """Nothing passes until a reset."""
        self._plane.active = 0
        self._watch(0)

    def reset(self) -> None:
        """Forget frames on their way, and what the driver has set."""
        self.stop()
        self._backlog.clear()
        self._receiver.reset()
        self._plane.waiting = self._plane.rx_held = self._plane.tx_held = 0
        self._blink.stop()
        self.control.reset()
        self.negotiated, self._offloads = 0, None
        self.set_filter(None, False)

    # -- snapshots ----------------------------------------------------------------------------------------------

    shape = Shape(
        1,
        mac=Bytes(6),
        up=BOOL,
        plugged_in=U64,
        offloads=U64,
        announcing=BOOL,
        promiscuous=BOOL,
        all_multicast=BOOL,
        unicast=ListOf(Bytes(6), 0, netctl.MAX_ADDRESSES),
        multicast=ListOf(Bytes(6), 0, netctl.MAX_ADDRESSES),
    )

    def save(self) -> State:
        """What the driver has set, and what it knows of the link. A frame on its way to the guest is lost."""
        return {
            "mac": self.mac,
            "up": self.is_up,
            "plugged_in": self._plugged_in,
            "offloads": self.negotiated if self._offloads is None else self._offloads,
            **self.control.save(),
        }

    def unfinished(self, queue: Virtqueue) -> int:
        """Frames that the backend could not take."""
        return len(self._backlog) if queue.index == TX else 0

    def restore(self, state: State) -> None:
        """Go on, plugged into what it is now; the guest hears so if that is not what it was."""
        self.mac, self._offloads = state["mac"], state["offloads"]
        self.control.restore(state)
        self._blink.stop()
        if state["up"] and self.is_up and state["plugged_in"] != self._plugged_in:
            self._blink.start()
        if state["up"] is not self.is_up:
            self.config_changed()

    def twin(self) -> Net:
        """One that is not plugged in; see `plug`."""
        twin = Net(None, mtu=self.mtu or None, link=self.link, limit=self.another_limit())
        twin.mac, twin.features, twin.native = self.mac, self.features, self.native
        return twin

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its options, and the backend's recipe."""
        backend = self.backend.recipe() if self.alive else None
        options = {"mac": self.mac, "mtu": self.mtu, "link": self.link, "features": self.features}
        options["limit"] = self.limit_numbers()
        return "net", {**options, "backend": [] if backend is None else [*backend]}

    def close(self) -> None:
        """Close the backend."""
        self._blink.stop()
        if hasattr(self, "io"):
            self.io.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self.backend.close()

    def _lost(self, why: BackendGone) -> None:
        """The backend died: for the guest the cable is out, and it goes on."""
        self.stop()
        self.alive = False
        log.warning("network backend lost, link down", device=self.name, reason=str(why))
        while self._backlog:
            self.queues[TX].push(self._backlog.popleft())
        self.transport.interrupt(self.queues[TX])
        self.config_changed()

    # -- counters -----------------------------------------------------------------------------------------------

    @property
    def frames(self) -> dict[str, int]:
        """How many frames passed."""
        return {"rx": self._plane.rx_frames, "tx": self._plane.tx_frames}

    @property
    def bytes(self) -> dict[str, int]:
        """How many bytes they had, without virtio's header."""
        return {"rx": self._plane.rx_bytes, "tx": self._plane.tx_bytes}

    @property
    def dropped(self) -> dict[str, int]:
        """How many frames were dropped: no frames, headers not agreed on, too long, or the link was down."""
        return {"rx": self._plane.rx_dropped, "tx": self._plane.tx_dropped}

    # -- what is polled -----------------------------------------------------------------------------------------
    # The backend's fd is in an epoll set of its own, which the I/O thread watches all the time: what is asked of it
    # changes without the I/O thread's locks, for which nobody may wait who holds the device's.

    def _watch(self, events: int) -> None:
        """Ask for EPOLLIN, EPOLLOUT, both or nothing."""
        if self.alive:
            lib.pk_net_watch(self._plane, events)

    def _on_ready(self) -> None:
        """The I/O thread saw the backend ready."""
        with self.transport.lock:
            try:
                if self._plane.watched & EPOLLOUT:
                    self._send_backlog()
                if self._plane.watched & EPOLLIN:
                    self._receive()
            except DriverFault as fault:
                self.transport.needs_reset(str(fault))
            except BackendGone as gone:
                self._lost(gone)

    def on_notify(self, queue: Virtqueue) -> None:
        """Buffers to receive into: look at the backend again. Frames and commands: serve them."""
        try:
            if queue.index == TX and self._plane.active:
                self._serve_sending(queue)
            elif queue.index != RX:
                super().on_notify(queue)
            elif self.alive and self.negotiated:
                self._receive()
        except BackendGone as gone:
            self._lost(gone)

    def _serve_sending(self, queue: Virtqueue) -> None:
        """Send by C, and by Python the frames that C leaves."""
        for _ in range(queue.size):
            verdict = lib.pk_net_send(self._plane)
            if verdict != lib.PK_NET_PYTHON:
                break
            chain = queue.pop()
            if chain is None:
                break
            if self.on_request(queue, chain) is not None:
                queue.push(chain)
        if verdict != lib.PK_NET_DONE:
            self.transport.notify(queue.index)
        self.transport.interrupt(queue)

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """A command, or a frame to send."""
        if queue.index == CONTROL:
            return self.control.on_command(chain)
        if self._backlog or not self._send(chain):
            self._backlog.append(chain)
            self._plane.tx_held = 1
            self._watch(self._plane.watched | EPOLLOUT)
            return None
        if self.backend.has_rest:
            self._watch(self._plane.watched | EPOLLOUT)
        return 0

    # -- from the guest (5.1.6.2) -------------------------------------------------------------------------------

    def _send(self, chain: Chain) -> bool:
        """Send a frame, or drop it; False if the backend cannot take it now."""
        if chain.writable:
            raise DriverFault(f"queue {TX}: a frame to send in device-writable buffers (5.1.6.2.1)")
        size = chain.readable_size - HEADER_SIZE
        if size < 0:
            raise DriverFault(f"queue {TX}: {size + HEADER_SIZE} bytes are no virtio_net_hdr (5.1.6)")
        header = chain.read(HEADER_SIZE)  # a copy: the driver cannot change what was checked
        if not (self.alive and self.link and is_sound(header, size, self.negotiated)):
            self._plane.tx_dropped += 1
            return True
        frame = slices(chain.readable, HEADER_SIZE)
        if not self.backend.send([header, *frame] if self.backend.has_header else frame):
            return False
        self._plane.tx_frames += 1
        self._plane.tx_bytes += size
        return True

    def _send_backlog(self) -> None:
        """The backend can take more."""
        queue = self.queues[TX]
        while self._backlog and self._send(self._backlog[0]):
            queue.push(self._backlog.popleft())
        if not self._backlog and self.backend.flush():
            self._plane.tx_held = 0
            self._watch(self._plane.watched & ~EPOLLOUT)
        self.transport.interrupt(queue)

    # -- to the guest (5.1.6.3) ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take what the backend has, at most BURST frames, while there are buffers for it."""
        queue, plane = self.queues[RX], self._plane
        if self.transport.status & lib.VIRTIO_CONFIG_S_NEEDS_RESET:
            return
        if plane.active and lib.pk_net_receive(plane) != lib.PK_NET_PYTHON:
            return
        if plane.active:  # C leaves the rest to Python, and its frame with it
            self._receiver.take_over(bytes(ffi.buffer(plane.frame, plane.waiting)), plane.expected)
            plane.waiting = 0
        if self.throttle is not None and not self.throttle.ready(RX):
            self._watch(self._plane.watched & ~EPOLLIN)  # a timer notifies the queue
            return
        self._watch(self._plane.watched | EPOLLIN)
        try:
            for _ in range(BURST):
                if not self._receive_one(queue):
                    break
                if self.throttle is not None and not self.throttle.ready(RX):
                    self._watch(self._plane.watched & ~EPOLLIN)
                    break
        finally:
            self._receiver.give_back(queue)
            plane.rx_held, plane.expected = self._receiver.is_holding, self._receiver.expected
            self.transport.interrupt(queue)

    def _receive_one(self, queue: Virtqueue) -> bool:
        """Take a frame; False when there is none or no room for it."""
        found = self._receiver.receive(queue) if self.link else self._receiver.drain()
        if found == netrx.TAKEN:
            self._plane.rx_frames += 1
            self._plane.rx_bytes += self._receiver.size
            if self.throttle is not None:
                self.throttle.charge(self._receiver.size)
        elif found == netrx.DROPPED:
            self._plane.rx_dropped += 1
        elif found == netrx.NO_ROOM and not queue.want_notification():
            self._watch(
                self._plane.watched & ~EPOLLIN
            )  # the frames wait in the backend until the driver notifies of buffers
            return False
        return found != netrx.EMPTY


def parse_mac(text: str) -> bytes:
    """Six bytes of "52:54:00:12:34:56". Raises ConfigError, also for a multicast address."""
    parts = text.split(":")
    try:
        mac = bytes(int(part, 16) for part in parts)
    except ValueError:
        mac = b""
    if len(mac) != 6 or not all(1 <= len(part) <= 2 for part in parts):
        raise ConfigError("mac", f"{text!r} is not like 52:54:00:12:34:56")
    if mac[0] & 1 or not any(mac):
        raise ConfigError("mac", f"{text} is no address of one interface (the first byte is odd, or all are 0)")
    return mac


def _random_number() -> int:
    return int.from_bytes(os.urandom(8), "little")
