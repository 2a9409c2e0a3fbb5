"""What the header of a frame to send may say: checksums and segments that the host has to finish. Layer: virtio.

Source: virtio 1.2, 5.1.6 and 5.1.6.2.1.
"""

from __future__ import annotations

import struct

from pykvm._native import lib
from pykvm.virtio.netbackend import MAX_FRAME, MIN_FRAME, net_bits

HEADER = struct.Struct("<BBHHHHH")  # struct virtio_net_hdr_v1
NEEDS_CSUM, ECN = lib.VIRTIO_NET_HDR_F_NEEDS_CSUM, lib.VIRTIO_NET_HDR_GSO_ECN
GSO_NONE = lib.VIRTIO_NET_HDR_GSO_NONE
GSO_FEATURES = {
    lib.VIRTIO_NET_HDR_GSO_TCPV4: net_bits("HOST_TSO4"),
    lib.VIRTIO_NET_HDR_GSO_TCPV6: net_bits("HOST_TSO6"),
    lib.VIRTIO_NET_HDR_GSO_UDP: net_bits("HOST_UFO"),
}
if net_bits("HOST_USO"):  # Linux 6.2's headers
    GSO_FEATURES[lib.VIRTIO_NET_HDR_GSO_UDP_L4] = net_bits("HOST_USO")


def is_sound(header: bytes, size: int, features: int) -> bool:
    """Whether a frame of `size` bytes can be one, and its header is one that these features allow (5.1.6.2.1)."""
    flags, gso_type, _, gso_size, csum_start, csum_offset, _ = HEADER.unpack(header)
    if not MIN_FRAME <= size <= MAX_FRAME:
        return False
    if flags & NEEDS_CSUM and (not features & net_bits("CSUM") or csum_start + csum_offset + 2 > size):
        return False
    if gso_type == GSO_NONE:
        return True
    needed = GSO_FEATURES.get(gso_type & ~ECN, 0)
    wanted = needed | net_bits("HOST_ECN") if gso_type & ECN else needed
    return bool(needed and not wanted & ~features and flags & NEEDS_CSUM and gso_size)
