"""The control queue of a network device: filters, MAC address, announcements, offloads. Layer: virtio.

Source: virtio 1.2, 5.1.6.5. A command is a class, a number and its data, and is answered by one byte.
"""

from __future__ import annotations

import struct

from pykvm._native import lib
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.netbackend import net_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.state import State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.net import Net

FEATURES = net_bits("CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR", "GUEST_ANNOUNCE")
OK, ERR = lib.VIRTIO_NET_OK, lib.VIRTIO_NET_ERR
MAC_SIZE = 6
COUNT = struct.Struct("<I")
OFFLOADS = struct.Struct("<Q")
BROADCAST = b"\xff" * MAC_SIZE
MAX_ADDRESSES = 1024  # of one table that is looked at; drivers have some hundred at most
MAX_COMMAND = 2 + 2 * (COUNT.size + MAX_ADDRESSES * MAC_SIZE)
GUEST_OFFLOADS = net_bits(
    "GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO", "GUEST_USO4", "GUEST_USO6"
)


class _Refused(Exception):
    """The answer is VIRTIO_NET_ERR."""


class Control:
    """The state that commands change. `announcing`: the driver is asked to announce itself and has not answered."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._commands = {
            (lib.VIRTIO_NET_CTRL_RX, lib.VIRTIO_NET_CTRL_RX_PROMISC): self._set_promiscuous,
            (lib.VIRTIO_NET_CTRL_RX, lib.VIRTIO_NET_CTRL_RX_ALLMULTI): self._set_all_multicast,
            (lib.VIRTIO_NET_CTRL_MAC, lib.VIRTIO_NET_CTRL_MAC_TABLE_SET): self._set_table,
            (lib.VIRTIO_NET_CTRL_MAC, lib.VIRTIO_NET_CTRL_MAC_ADDR_SET): self._set_mac,
            (lib.VIRTIO_NET_CTRL_ANNOUNCE, lib.VIRTIO_NET_CTRL_ANNOUNCE_ACK): self._announced,
            (lib.VIRTIO_NET_CTRL_GUEST_OFFLOADS, lib.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET): self._set_offloads,
        }
        self.reset()

    def reset(self) -> None:
        """A device starts with all frames let through."""
        self.announcing = False
        self.promiscuous, self.all_multicast = True, False
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []

    def save(self) -> State:
        """What the driver has set."""
        names = ("announcing", "promiscuous", "all_multicast")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "unicast": list(self.unicast), "multicast": list(self.multicast)}

    def restore(self, state: State) -> None:
        """Go on with it; `apply` follows."""
        self.announcing, self.promiscuous = state["announcing"], state["promiscuous"]
        self.all_multicast = state["all_multicast"]
        self.unicast, self.multicast = list(state["unicast"]), list(state["multicast"])

    def on_command(self, chain: Chain) -> int:
        """Serve a command; the bytes written."""
        if not chain.writable:
            raise DriverFault("queue 2: a command without a byte for its answer (5.1.6.5)")
        command = chain.read(MAX_COMMAND)
        handler = self._commands.get((command[0], command[1])) if len(command) >= 2 else None
        answer = ERR
        if handler is not None:
            try:
                handler(command[2:])
                answer = OK
            except (_Refused, struct.error):
                pass
        return chain.write(bytes((answer,)))

    def announce(self) -> None:
        """Set VIRTIO_NET_S_ANNOUNCE, if the driver knows it."""
        if self._net.negotiated & net_bits("GUEST_ANNOUNCE"):
            self.announcing = True
            self._net.config_changed()

    def _announced(self, data: bytes) -> None:
        self.announcing = False

    def _set_promiscuous(self, data: bytes) -> None:
        self.promiscuous = _switch(data)
        self.apply()

    def _set_all_multicast(self, data: bytes) -> None:
        self.all_multicast = _switch(data)
        self.apply()

    def _set_table(self, data: bytes) -> None:
        """Two tables, of unicast and multicast addresses: each a count and so many addresses (5.1.6.5.2)."""
        unicast, rest = _addresses(data)
        multicast, rest = _addresses(rest)
        self.unicast, self.multicast = unicast, multicast
        self.apply()

    def _set_mac(self, data: bytes) -> None:
        if len(data) != MAC_SIZE or data[0] & 1:
            raise _Refused
        self._net.mac = data
        self.apply()

    def _set_offloads(self, data: bytes) -> None:
        """Some of the offloads that were negotiated, for now (5.1.6.5.6)."""
        (wanted,) = OFFLOADS.unpack(data)
        if wanted & ~(self._net.negotiated & GUEST_OFFLOADS):
            raise _Refused
        self._net.set_offloads(wanted)

    def apply(self) -> None:
        """Tell the backend; until the driver has said what it wants (the first command), everything passes."""
        addresses = None if self.promiscuous else [self._net.mac, BROADCAST, *self.unicast, *self.multicast]
        self._net.set_filter(addresses, self.all_multicast)


def _switch(data: bytes) -> bool:
    if len(data) != 1 or data[0] > 1:
        raise _Refused
    return bool(data[0])


def _addresses(data: bytes) -> tuple[list[bytes], bytes]:
    """(a table's addresses, what follows it)."""
    (count,) = COUNT.unpack_from(data)
    end = COUNT.size + count * MAC_SIZE
    if count > MAX_ADDRESSES or end > len(data):
        raise _Refused
    return [data[at : at + MAC_SIZE] for at in range(COUNT.size, end, MAC_SIZE)], data[end:]
