"""A vhost-user back end for tests, on the other end of a socket: knows the protocol, and breaks it on request."""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from pykvm.virtio import vhostmsg as msg
from pykvm.virtio.backend import BackendSource

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES = msg.F_PROTOCOL_FEATURES | 1 << 32 | 1 << 28 | 1 << 5 | 1 << 34
PROTOCOL = msg.P_MQ | msg.P_REPLY_ACK | msg.P_CONFIG | 1 << 1


class Peer:
    """Answers a front end in a thread. `seen` lists (message name, payload, number of descriptors).

    twist  message name -> function(this, payload): called instead of the normal answer
    """

    def __init__(
        self,
        twist: dict[str, Callable[[Peer, bytes], None]] | None = None,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        queues: int = 4,
        config: bytes = bytes(range(64)),
    ) -> None:
        self.twist = twist or {}
        self.values = {
            "GET_FEATURES": features,
            "GET_PROTOCOL_FEATURES": protocol,
            "GET_QUEUE_NUM": queues,
        }
        self.config = config
        self.seen: list[tuple[str, bytes, int]] = []
        self.fds: dict[str, list[int]] = {}
        self.acks = False
        self.regions: list[tuple[int, int, int, mmap.mmap]] = []
        self.front, self.socket = socket.socketpair()
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    @property
    def names(self) -> list[str]:
        """The messages in their order."""
        return [name for name, _, _ in self.seen]

    def payloads(self, name: str) -> list[bytes]:
        """The payloads of all messages of one kind."""
        return [payload for each, payload, _ in self.seen if each == name]

    def reply(
        self, name: str, payload: bytes, *, flags: int = msg.VERSION | msg.REPLY, fds: tuple[int, ...] = ()
    ) -> None:
        """Send an answer."""
        number = next(key for key, value in msg.NAMES.items() if value == name)
        socket.send_fds(self.socket, [msg.HEADER.pack(number, flags, len(payload)) + payload], list(fds))

    def _main(self) -> None:
        try:
            while self._serve():
                pass
        except OSError:
            pass

    def _serve(self) -> bool:
        fds = array.array("i")
        header, ancillary, _, _ = self.socket.recvmsg(msg.HEADER.size, socket.CMSG_SPACE(64))
        if len(header) < msg.HEADER.size:
            return False
        for _, _, data in ancillary:
            fds.frombytes(data)
        number, flags, size = msg.HEADER.unpack(header)
        payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
        name = msg.NAMES[number]
        self.seen.append((name, payload, len(fds)))
        self.fds.setdefault(name, []).extend(fds)
        if name in self.twist:
            self.twist[name](self, payload)
        else:
            self._answer(name, flags, payload, list(fds))
        return True

    def _answer(self, name: str, flags: int, payload: bytes, fds: list[int]) -> None:
        if name == "SET_MEM_TABLE":
            (count, _) = msg.MEM_TABLE.unpack_from(payload)
            for index in range(count):
                gpa, size, hva, offset = msg.MEM_REGION.unpack_from(payload, 8 + 32 * index)
                self.regions.append((gpa, size, hva, mmap.mmap(fds[index], size, offset=offset)))
        if name in self.values:
            self.reply(name, msg.U64.pack(self.values[name]))
        elif name == "GET_VRING_BASE":
            self.reply(name, payload)
        elif name == "GET_CONFIG":
            offset, size, _ = msg.CONFIG.unpack_from(payload)
            self.reply(name, payload[: msg.CONFIG.size] + self.config[offset : offset + size])
        elif flags & msg.NEED_REPLY:
            self.reply(name, msg.U64.pack(0))

    def read(self, gpa: int, length: int) -> bytes:
        """Guest memory as the back end sees it."""
        for base, size, _, mapping in self.regions:
            if base <= gpa < base + size:
                return mapping[gpa - base : gpa - base + length]
        raise AssertionError(hex(gpa))

    def finish(self, used_gpa: int, head: int, written: int) -> None:
        """Put one used element into the first used ring and say so by the call eventfd."""
        (_, _, _, mapping) = self.regions[0]
        (idx,) = struct.unpack_from("<H", mapping, used_gpa + 2)
        struct.pack_into("<II", mapping, used_gpa + 4 + 8 * (idx % 64), head, written)
        struct.pack_into("<H", mapping, used_gpa + 2, idx + 1)
        os.eventfd_write(self.fds["SET_VRING_CALL"][0], 1)

    def close(self) -> None:
        """Hang up, and give everything back."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()
        for _, _, _, mapping in self.regions:
            mapping.close()
        for fd in [fd for some in self.fds.values() for fd in some]:
            os.close(fd)


class Peers(BackendSource):
    """Hands out one peer after the other, as a program that can be started again."""

    name = "test back end"
    option = "test"
    advice = "look again"
    remedy = "Start it"

    def __init__(self, *peers: Peer) -> None:
        self.peers = list(peers)
        self.restarts = len(peers) > 1
        self.stops = 0

    def connect(self) -> socket.socket:
        """The next peer's socket."""
        return self.peers.pop(0).front

    def stop(self) -> None:
        """Count it."""
        self.stops += 1
