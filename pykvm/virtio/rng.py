"""virtio-rng: random bytes of the host's kernel for the guest. Layer: virtio.

Source: virtio 1.2, 5.4 (Entropy Device): one queue of writable buffers, no features, no configuration.
"""

from __future__ import annotations

import os

from pykvm._native import lib
from pykvm.core.state import STATELESS
from pykvm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue
    from pykvm.virtio.rate import RateLimit

CHUNK = 4096  # bytes of one answer at most: drivers ask again, and a buffer of gigabytes costs no memory here


class Rng(VirtioDevice):
    """Fills requests from getrandom(2), within `limit`."""

    name = "virtio-rng"
    device_id = lib.VIRTIO_ID_RNG
    queue_sizes = (64,)
    shape = STATELESS

    def __init__(self, limit: RateLimit | None = None) -> None:
        self.limit = limit

    def twin(self) -> Rng:
        """Another one, with a rate limit of its own."""
        return Rng(self.another_limit())

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its rate limit."""
        return "rng", {"limit": self.limit_numbers()}

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Random bytes for what is writable; a buffer that is readable is none of ours (5.4.6.1)."""
        return chain.write(os.getrandom(min(chain.writable_size, CHUNK)))
