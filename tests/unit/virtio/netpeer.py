"""The other end of a network device in tests: a backend like a tap, but over a socket pair, and its frames."""

from __future__ import annotations

import socket
import struct

from pykvm.virtio.netbackend import NetBackend, net_bits
from pykvm.virtio.tap import Tap

HEADER = struct.Struct("<BBHHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
PLAIN = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
OFFLOADS = net_bits("CSUM", "GUEST_CSUM", "HOST_TSO4", "GUEST_TSO4", "HOST_ECN")


def frame(size: int, fill: int = 0x41) -> bytes:
    """An Ethernet frame of `size` bytes."""
    return (b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + bytes([fill]) * size)[:size]


class FakeTap(Tap):
    """A tap's readv and writev, on a socket that keeps frames apart; `peer` is the host's end."""

    by_c = True  # whether C moves the frames

    def __init__(self, *, has_header: bool = True, offloads: int = OFFLOADS, mtu: int = 1500) -> None:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.setblocking(False)
        self.ifname, self.name = "fake0", "tap fake0"
        self.has_header, self.offloads, self.mtu = has_header, offloads if has_header else 0, mtu
        self.is_plain = has_header and self.by_c
        self.settings: list[object] = []
        ours.setblocking(False)
        self.fd = ours.detach()

    def set_offloads(self, features: int) -> None:
        """Remember it."""
        self.settings.append(("offloads", features))

    def set_filter(self, addresses: object, *, all_multicast: bool = False) -> None:
        """Remember it."""
        self.settings.append(("filter", addresses, all_multicast))

    def set_link(self, up: bool) -> None:
        """Remember it."""
        self.settings.append(("link", up))

    def close(self) -> None:
        """Close both ends."""
        self.peer.close()
        if self.fd >= 0:
            socket.close(self.fd)
            self.fd = -1

    def sent(self) -> list[bytes]:
        """What the device sent."""
        found = []
        while True:
            try:
                found.append(self.peer.recv(1 << 17))
            except BlockingIOError:
                return found


class Stuck(NetBackend):
    """A backend that takes no frame while `full`, and counts what it was asked."""

    mtu = 1500

    def __init__(self) -> None:
        self._socket, self._other = socket.socketpair()
        self.fd = self._socket.fileno()
        self.full = True
        self.frames: list[bytes] = []

    def receive(self, buffers: object) -> int:
        """Nothing ever comes."""
        return 0

    def send(self, buffers: list[bytes]) -> bool:  # type: ignore[override]
        """Take it unless full."""
        if not self.full:
            self.frames.append(b"".join(buffers))
        return not self.full

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        self._other.close()
