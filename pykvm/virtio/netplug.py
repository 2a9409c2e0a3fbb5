"""What a network device is plugged into: nothing, or another backend than before. Layer: virtio.

The backend is no part of a snapshot: a copy of a machine starts unplugged, so that no two machines with one MAC address
share a network by accident. Whoever plugs another one in has the guest notice, by a link that is down for a moment.
"""

from __future__ import annotations

from pykvm.virtio.netbackend import BackendGone, NetBackend, net_bits
from pykvm.virtio.netctl import FEATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pykvm.core.iothread import IoThread, Timer

BLINK_S = 1.2  # Linux tells programs of changes at most once a second (net/core/link_watch.c)

# What a driver may do, or expect, only as long as the backend can
OFFLOADS = net_bits(
    *("CSUM", "GUEST_CSUM", "CTRL_GUEST_OFFLOADS", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO", "GUEST_USO4"),
    *("GUEST_USO6", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_UFO", "HOST_USO4", "HOST_USO6", "HOST_USO"),
)


class Unplugged(NetBackend):
    """No network."""

    name = "unplugged"
    is_plain = True  # C serves the device as soon as there is a backend for it

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Nothing comes."""
        raise BackendGone("it is not plugged in")

    def send(self, buffers: Sequence[memoryview | bytes]) -> bool:
        """Nobody takes a frame."""
        raise BackendGone("it is not plugged in")


def offered_by(backend: NetBackend) -> int:
    """The bits of OFFLOADS that a device with this backend offers."""
    return backend.offloads | (net_bits("CTRL_GUEST_OFFLOADS") if backend.offloads & net_bits("GUEST_CSUM") else 0)


def known_features() -> int:
    """Every feature bit that some network device of pykvm offers."""
    return net_bits("MAC", "STATUS", "MRG_RXBUF", "MTU") | FEATURES | OFFLOADS


class Blink:
    """A link that shows as down until the guest has looked, and some time beyond."""

    def __init__(self) -> None:
        self.on = False
        self._timer: Timer | None = None

    def start(self) -> None:
        """From now on."""
        self.on = True
        self.cancel_timer()

    def stop(self) -> None:
        """No more."""
        self.on = False
        self.cancel_timer()

    def cancel_timer(self) -> None:
        """The guest has not looked."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def seen(self, io: IoThread, over: Callable[[], object]) -> None:
        """The guest looks: call `over` when it has had time enough."""
        if self.on and self._timer is None:
            self._timer = io.call_later(BLINK_S, over)
