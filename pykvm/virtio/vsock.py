"""virtio-vsock: sockets between guest and host, which end in Unix sockets on the host. Layer: virtio.

Source: virtio 1.2, 5.10 (Socket Device). The host's side follows Firecracker's convention:

- a program on the host connects to PATH, sends `CONNECT <port>\\n`, and gets `OK <host port>\\n` when a program in the
  guest has accepted; then the connection is a stream;
- a program in the guest that connects to CID 2, port P, reaches whoever listens at PATH_P on the host.

A connection does not live through a snapshot: after a restore, and in a fork, the guest is told that all are gone
(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, 5.10.6.7), and what listens in it goes on listening.

Streams only. Everything is bounded: connections by MAX_CONNECTIONS, a connection's bytes by BUFFER (5.10.6.3, credit),
answers to a guest that does not fetch them by MAX_REPLIES (then its requests wait).
"""

from __future__ import annotations

import os
import socket
from collections import deque

from pykvm._native import ffi, lib
from pykvm.core.state import Int, Shape
from pykvm.errors import ConfigError
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.unixsocket import PATH_MAX, Listener
from pykvm.virtio.vsockconn import BUFFER, HEADER_SIZE, Connection, Greeting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.core.state import State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

QUEUE_SIZE = 128
RX, TX, EVENT = range(3)  # 5.10.2
HOST_CID = 2
FIRST_CID, LAST_CID = 3, 0xFFFFFFFE
FIRST_HOST_PORT = 1 << 30  # of connections that the host began; the guest's own ports are below
MAX_CONNECTIONS = 256
MAX_REPLIES = 256
PORT_DIGITS = 11  # what _P adds to the path

REQUEST, RESPONSE, RST = lib.VIRTIO_VSOCK_OP_REQUEST, lib.VIRTIO_VSOCK_OP_RESPONSE, lib.VIRTIO_VSOCK_OP_RST
SHUTDOWN, RW = lib.VIRTIO_VSOCK_OP_SHUTDOWN, lib.VIRTIO_VSOCK_OP_RW
CREDIT_UPDATE, CREDIT_REQUEST = lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE, lib.VIRTIO_VSOCK_OP_CREDIT_REQUEST
STREAM = lib.VIRTIO_VSOCK_TYPE_STREAM

Key = tuple[int, int]  # host port, guest port


class Vsock(VirtioDevice):
    """The guest has address `cid`; the host's programs meet it at the Unix socket `path`. Raises ConfigError.

    Without a path, as in a fork, the guest is alone until `listen` is called.
    """

    name = "virtio-vsock"
    device_id = lib.VIRTIO_ID_VSOCK
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, 4)

    def __init__(self, cid: int, path: str | None = None) -> None:
        if not FIRST_CID <= cid <= LAST_CID:
            raise ConfigError("vsock", f"CID {cid} is not between {FIRST_CID} and {LAST_CID:#x}")
        self.cid = cid
        self.connections: dict[Key, Connection] = {}
        self.greetings: set[Greeting] = set()
        self._out: deque[tuple[Key, int, int]] = deque()  # (key, operation, flags) of headers for the guest
        self._stalled: set[Connection] = set()  # they read again when the guest has receive buffers
        self._next_port = FIRST_HOST_PORT
        self._held_back = False  # the guest's packets wait until it fetches answers
        self._reset_owed = False  # the guest has to hear that its connections are gone
        self.path = path
        self._listener = None if path is None else _listener(path)

    def bind(self, transport: object) -> None:
        """Listen from now on."""
        super().bind(transport)  # type: ignore[arg-type]
        if self._listener is not None:
            self._listener.start(self.io, self._accept)

    def listen(self, path: str) -> None:
        """Meet the host's programs at `path` from now on; for a device that has no path. Raises ConfigError."""
        if self._listener is not None:
            raise ConfigError("vsock", f"it listens at {self.path} already")
        listener = _listener(path)
        with self.transport.lock:
            self.path, self._listener = path, listener
        listener.start(self.io, self._accept)

    def config(self) -> bytes:
        """struct virtio_vsock_config (5.10.4): the guest's CID."""
        return self.cid.to_bytes(8, "little")

    def reset(self) -> None:
        """Every connection is gone."""
        for connection in list(self.connections.values()):
            connection.close()
        self._out.clear()
        self._stalled.clear()
        self._held_back = self._reset_owed = False

    def close(self) -> None:
        """Hang up, and remove the socket's file."""
        if self._listener is not None:
            self._listener.close()
        if hasattr(self, "transport"):
            self.reset()
        for greeting in list(self.greetings):
            greeting.close()

    # -- snapshots ----------------------------------------------------------------------------------------------

    shape = Shape(1, next_port=Int(FIRST_HOST_PORT, LAST_CID))

    def restore(self, state: State) -> None:
        """Every connection is gone, which the guest has to hear."""
        super().restore(state)
        self._reset_owed = True

    def activate(self, features: int) -> None:
        """The driver is ready."""
        self._tell_of_reset()

    def _tell_of_reset(self) -> None:
        queue = self.queues[EVENT]
        chain = queue.pop() if self._reset_owed and queue.enabled else None
        if chain is not None:
            event: CData = ffi.new("struct virtio_vsock_event *", {"id": lib.VIRTIO_VSOCK_EVENT_TRANSPORT_RESET})
            queue.push(chain, chain.write(ffi.buffer(event)))
            self._reset_owed = False
            self.transport.interrupt(queue)
        elif self._reset_owed and queue.enabled and queue.want_notification():
            self.transport.notify(EVENT)

    def twin(self) -> Vsock:
        """One that does not listen: two cannot at one path. See `listen`."""
        return Vsock(self.cid)

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its address and its path ("": it has none)."""
        return "vsock", {"cid": self.cid, "path": "" if self.path is None else os.path.abspath(self.path)}

    # -- from the host ------------------------------------------------------------------------------------------

    def _accept(self, client: socket.socket) -> None:
        with self.transport.lock:
            if len(self.connections) + len(self.greetings) >= MAX_CONNECTIONS:
                client.close()
            else:
                self.greetings.add(Greeting(self, client))

    def call_guest(self, client: socket.socket, guest_port: int) -> None:
        """A program of the host wants to talk to this port of the guest."""
        if not self.transport.live or len(self._out) >= MAX_REPLIES:
            client.close()
            return
        while (self._next_port, guest_port) in self.connections:
            self._advance()
        connection = self._add((self._next_port, guest_port), client)
        self._advance()
        connection.call()
        self.send(connection.key, REQUEST)

    def _advance(self) -> None:
        self._next_port = self._next_port + 1 if self._next_port < LAST_CID else FIRST_HOST_PORT

    def _add(self, key: Key, sock: socket.socket) -> Connection:
        connection = self.connections[key] = Connection(self, key, sock)
        return connection

    # -- to the guest -------------------------------------------------------------------------------------------

    def send(self, key: Key, operation: int, flags: int = 0) -> None:
        """Send a packet without payload, now or when the guest has buffers."""
        self._out.append((key, operation, flags))
        self._flush()

    def header(self, key: Key, operation: int, length: int = 0, flags: int = 0) -> memoryview:
        """A packet's header, with the connection's credit as it is now (5.10.6.3)."""
        header: CData = ffi.new("struct virtio_vsock_hdr *")
        header.src_cid, header.dst_cid = HOST_CID, self.cid
        header.src_port, header.dst_port = key
        header.len, header.type, header.op, header.flags = length, STREAM, operation, flags
        connection = self.connections.get(key)
        if connection is not None:
            header.buf_alloc, header.fwd_cnt = BUFFER, connection.tell_forwarded()
        return memoryview(ffi.buffer(header))

    def take_buffer(self) -> Chain | None:
        """A receive buffer of the guest with room for a header and more, or None: `stall` until there is one."""
        queue = self.queues[RX]
        if not queue.enabled or self._out:
            return None
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                if not queue.want_notification():
                    return None
            elif chain.writable_size > HEADER_SIZE:
                return chain
            else:
                queue.push(chain)  # too small for anything
        return None

    def stall(self, connection: Connection) -> None:
        """Have `connection` read on when the guest has receive buffers."""
        self._stalled.add(connection)

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        self.connections.pop(connection.key, None)
        self._stalled.discard(connection)

    def _flush(self) -> None:
        queue = self.queues[RX]
        for _ in range(2 * MAX_REPLIES):
            if not self._out or not queue.enabled:
                break
            chain = queue.pop()
            if chain is not None and chain.writable_size < HEADER_SIZE:
                queue.push(chain)
            elif chain is not None:
                key, operation, flags = self._out.popleft()
                queue.push(chain, chain.write(self.header(key, operation, flags=flags)))
            elif not queue.want_notification():
                break
        self.transport.interrupt(queue)

    # -- from the guest -----------------------------------------------------------------------------------------

    def on_notify(self, queue: Virtqueue) -> None:
        """Packets, or buffers for ours."""
        if queue.index == RX:
            self._flush()
            stalled, self._stalled = self._stalled, set()
            for connection in stalled:
                connection.read_on()
            if self._held_back and len(self._out) < MAX_REPLIES:
                self._held_back = False
                self.transport.notify(TX)
        elif queue.index == TX:
            self._take_packets(queue)
        else:
            self.transport.guarded(self._tell_of_reset)

    def _take_packets(self, queue: Virtqueue) -> None:
        for _ in range(queue.size):
            if len(self._out) >= MAX_REPLIES:
                self._held_back = True
                break
            chain = queue.pop()
            if chain is None:
                if not queue.want_notification():
                    break
                continue
            self._on_packet(chain)
            queue.push(chain)
        else:
            self.transport.notify(TX)
        self.transport.interrupt(queue)

    def _on_packet(self, chain: Chain) -> None:
        raw = chain.read(HEADER_SIZE)
        if len(raw) < HEADER_SIZE:
            return
        header: CData = ffi.new("struct virtio_vsock_hdr *")
        ffi.memmove(header, raw, HEADER_SIZE)
        if header.src_cid != self.cid or header.dst_cid != HOST_CID:
            return  # 5.10.6: nobody of that address is here
        key = (header.dst_port, header.src_port)
        connection = self.connections.get(key)
        fits = header.op != RW or header.len <= chain.readable_size - HEADER_SIZE  # CVE-2019-18960
        if header.type != STREAM or not fits:
            self._refuse(key, connection)
        elif connection is None:
            if header.op == REQUEST:
                self._call_host(key, header)
            elif header.op != RST:
                self.send(key, RST)
        else:
            connection.update_credit(header.buf_alloc, header.fwd_cnt)
            self._dispatch(connection, header, chain)

    def _dispatch(self, connection: Connection, header: CData, chain: Chain) -> None:
        operation = header.op
        if operation == RW:
            connection.on_data(chain, header.len)
        elif operation == RESPONSE:
            connection.on_response()
        elif operation == SHUTDOWN:
            connection.on_shutdown(header.flags)
        elif operation == RST:
            connection.close()
        elif operation == CREDIT_REQUEST:
            connection.send_credit()
        elif operation != CREDIT_UPDATE:
            connection.abort()  # a second REQUEST, or what nobody knows

    def _refuse(self, key: Key, connection: Connection | None) -> None:
        if connection is not None:
            connection.abort()
        else:
            self.send(key, RST)

    def _call_host(self, key: Key, header: CData) -> None:
        """A program of the guest connects to whoever listens at PATH_PORT."""
        if self.path is None or len(self.connections) + len(self.greetings) >= MAX_CONNECTIONS:
            self.send(key, RST)
            return
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError:  # no file descriptors left
            self.send(key, RST)
            return
        try:
            sock.connect(f"{self.path}_{key[0]}")  # of a Unix socket: at once, or never
        except OSError:
            sock.close()
            self.send(key, RST)
            return
        connection = self._add(key, sock)
        connection.update_credit(header.buf_alloc, header.fwd_cnt)
        self.send(key, RESPONSE)
        connection.begin()


def _listener(path: str) -> Listener:
    if len(os.fsencode(path)) + PORT_DIGITS > PATH_MAX:
        raise ConfigError("vsock", f"{path}: with _PORT behind it this is too long for a Unix socket")
    return Listener(path, "vsock")
