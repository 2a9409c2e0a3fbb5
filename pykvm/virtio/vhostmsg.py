"""Messages of the vhost-user protocol, the front end's side: numbers, layouts, a connection with deadlines.

Layer: virtio.

Source: "Vhost-user Protocol" (QEMU docs/interop/vhost-user.rst), sections "Message Specification", "Protocol features"
and "Front-end message types"; no kernel header has these numbers. All fields are in the host's byte order.

A back end is not trusted: every reply is checked for its number, flags and exact size, and has to come within a time.
Descriptors that it sends are never taken: a receive without room for them makes the kernel drop them.
"""

from __future__ import annotations

import errno
import socket
import struct
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# "Front-end message types"
GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
SET_MEM_TABLE = 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG = 24, 25
NAMES = {value: name for name, value in globals().copy().items() if name.startswith(("GET_", "SET_"))}

# "Feature bits" and "Protocol features"
F_PROTOCOL_FEATURES = 1 << 30
P_MQ, P_REPLY_ACK, P_CONFIG = 1 << 0, 1 << 3, 1 << 9

# "Message Specification": a header of request, flags and size, then the payload
HEADER = struct.Struct("=III")
VERSION, REPLY, NEED_REPLY = 0x1, 1 << 2, 1 << 3
VERSION_MASK = 0x3
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, number
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptor table, used ring, available ring, log
MEM_TABLE = struct.Struct("=II")  # number of regions, padding
MEM_REGION = struct.Struct("=QQQQ")  # guest address, size, address in the front end, offset in the file
MAX_REGIONS = 8
CONFIG = struct.Struct("=III")  # offset, size, flags
CONFIG_WRITABLE = 0  # flags: a write by the driver, not a migration
MAX_CONFIG = 256

TIMEOUT_S = 5.0  # for one answer; a healthy back end needs well under a millisecond
FIRST_ANSWER = 4  # times as long for the first one: the process may just be starting, on a busy machine


class BackendError(Exception):
    """The back end died, hung or broke the protocol: nothing more can be said to it. The message says which."""


class Connection:
    """The socket to a back end. `request` and `send` raise BackendError; the caller then closes it."""

    def __init__(self, connected: socket.socket, timeout: float = TIMEOUT_S) -> None:
        connected.setblocking(True)
        self.socket = connected
        self.timeout = timeout
        self._answered = False
        self.reply_ack = False  # negotiated: the back end confirms each message that asks for it

    def fileno(self) -> int:
        """The descriptor to watch: readable while nothing was asked means that the back end is gone, or mad."""
        return self.socket.fileno()

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message that has no reply of its own; confirmed, when the back end can do so."""
        self._send(request, payload, fds, NEED_REPLY if self.reply_ack else 0)
        if self.reply_ack:
            (failed,) = U64.unpack(self._reply(request, U64.size))
            if failed:
                raise BackendError(f"it refused {NAMES[request]} with {failed}")

    def request(self, request: int, payload: bytes = b"", *, size: int = U64.size) -> bytes:
        """A message with a reply: its payload of exactly `size` bytes."""
        self._send(request, payload, (), 0)
        return self._reply(request, size)

    def _send(self, request: int, payload: bytes, fds: Sequence[int], flags: int) -> None:
        message = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        self.socket.settimeout(self.timeout)
        try:
            sent = socket.send_fds(self.socket, [message], list(fds), socket.MSG_NOSIGNAL)
            if sent < len(message):
                self.socket.sendall(message[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise BackendError(f"it takes no messages ({NAMES[request]}, {self.timeout:g} s)") from None
        except OSError as error:
            raise BackendError(f"{NAMES[request]} cannot be sent: {error.strerror}") from None

    @property
    def _patience(self) -> float:
        return self.timeout if self._answered else self.timeout * FIRST_ANSWER

    def _reply(self, request: int, size: int) -> bytes:
        name, deadline = NAMES[request], monotonic() + self._patience
        number, flags, length = HEADER.unpack(self._receive(HEADER.size, name, deadline))
        if number != request or flags & VERSION_MASK != VERSION or not flags & REPLY:
            raise BackendError(f"it answered {name} with message {number}, flags {flags:#x}")
        if length != size:
            raise BackendError(f"its reply to {name} has {length} bytes instead of {size}")
        data = self._receive(size, name, deadline)
        self._answered = True
        return data

    def _receive(self, size: int, name: str, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            left = deadline - monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self.socket.settimeout(left)
                piece = self.socket.recv(size - len(data))
            except TimeoutError:
                raise BackendError(f"it did not answer {name} within {self._patience:g} s") from None
            except OSError as error:
                raise BackendError(f"no answer to {name}: {error.strerror}") from None
            if not piece:
                raise BackendError(f"it closed the connection at {name}")
            data += piece
        return bytes(data)

    def idle_fault(self) -> str | None:
        """Nothing was asked, and the socket is readable: what that means; None for a false alarm."""
        try:
            self.socket.settimeout(0)  # MSG_DONTWAIT alone would not do: Python waits before it asks the kernel
            if self.socket.recv(1, socket.MSG_PEEK):
                return "it sent a message that nobody asked for"
        except OSError as error:
            return None if error.errno in (errno.EAGAIN, errno.EINTR) else f"{error.strerror}"
        return "it closed the connection"

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
