"""What a network device sends its frames to, and gets them from. Layer: virtio.

A frame is an Ethernet frame without its checksum. Backends that know virtio's header (`has_header`) take and give it in
front of each frame, and with it unfinished checksums and segments that are still to be cut (virtio 1.2, 5.1.6).
"""

from __future__ import annotations

from pykvm._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_SIZE = 12  # struct virtio_net_hdr_v1: with VERSION_1 always that one (5.1.6.1)
MIN_FRAME = 14  # an Ethernet header
MAX_FRAME = 65550 + 4  # the largest segment to be cut (5.1.6.3.1), and a VLAN tag
IOV_MAX = 1024  # what readv and writev take


class BackendGone(Exception):
    """The backend is dead: no frame comes or goes any more. The message says what happened."""


class NetBackend:
    """Base class of backends. Methods but `close` are called under the transport's lock.

    name        in messages
    fd          readable when a frame may be waiting
    has_header  frames start with a virtio_net_hdr of 12 bytes
    is_plain    and readv and writev of `fd` are all that `receive` and `send` do: C may do it
    offloads    VIRTIO_NET_F_* bits of checksum and segmentation offload that the backend can honour
    mtu         what the device offers as its MTU unless it is told otherwise; 0 for nothing
    has_rest    a frame was taken, but not all of it sent yet: call `flush` when `fd` is writable
    """

    name = "network"
    fd = -1
    has_header = False
    is_plain = False
    offloads = 0
    mtu = 0
    has_rest = False

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Read one frame into `buffers` (at most IOV_MAX); its length, 0 if none is waiting. Raises BackendGone."""
        raise NotImplementedError

    def send(self, buffers: Sequence[memoryview | bytes]) -> bool:
        """Send one frame; False if the backend cannot take it now: try again when `fd` is writable.

        A frame that the backend will never take is dropped. Raises BackendGone.
        """
        raise NotImplementedError

    def flush(self) -> bool:
        """Send what is left of a frame that was taken; whether nothing is left now. Raises BackendGone."""
        return True

    def set_offloads(self, features: int) -> None:
        """The driver takes frames with these of the GUEST_* offloads."""

    def set_filter(self, addresses: Sequence[bytes] | None, *, all_multicast: bool = False) -> None:
        """The driver wants frames to these addresses only; None for all. Others may come all the same (5.1.6.5.1)."""

    def set_link(self, up: bool) -> None:
        """The device's link went up or down."""

    def recipe(self) -> tuple[str, dict[str, object]] | None:
        """(kind, options) of what makes it again, for a snapshot file; None: nothing does, the copy is unplugged.

        Raises SnapshotError where that would not be what the user wants.
        """
        return None

    def close(self) -> None:
        """Release everything."""


def net_bits(*names: str) -> int:
    """The VIRTIO_NET_F_* bits of these names; a name that the header does not know yet is no bit."""
    known = (getattr(lib, f"VIRTIO_NET_F_{name}", None) for name in names)
    return sum(1 << int(bit) for bit in known if bit is not None)
