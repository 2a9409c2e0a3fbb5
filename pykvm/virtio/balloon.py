"""virtio-balloon: memory that the guest gives back, and its statistics. Layer: virtio.

Source: virtio 1.2, 5.5 (Traditional Memory Balloon Device). Pages come back by inflation, when the host sets a
target, and by free page reporting, whenever the guest's kernel has free blocks. Either way the host's pages are
released at once (GuestMemory.discard), and the guest gets zeroed ones when it touches the memory again.
"""

from __future__ import annotations

import threading

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.core.memory import PAGE_SIZE
from pykvm.core.state import Bytes, Shape
from pykvm.errors import ConfigError, GuestAddressError, SnapshotError
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.fault import DriverFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pykvm._native import CData
    from pykvm.core.state import State
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

QUEUE_SIZE = 32  # with MAX_PFNS bounds the time that one notification may take
MAX_PFNS = 4096  # of one request; Linux sends 256
MAX_STATS = 64

INFLATE, DEFLATE, STATS, HINT, REPORTING = range(5)  # 5.5.2
STATS_VQ, REPORT = 1 << lib.VIRTIO_BALLOON_F_STATS_VQ, 1 << lib.VIRTIO_BALLOON_F_REPORTING
DEFLATE_ON_OOM, POISON = 1 << lib.VIRTIO_BALLOON_F_DEFLATE_ON_OOM, 1 << lib.VIRTIO_BALLOON_F_PAGE_POISON
CONFIG = "struct virtio_balloon_config"
CONFIG_SIZE = ffi.sizeof(CONFIG)
STAT_SIZE = ffi.sizeof("struct virtio_balloon_stat")

STAT_NAMES = {
    lib.VIRTIO_BALLOON_S_SWAP_IN: "swap_in",
    lib.VIRTIO_BALLOON_S_SWAP_OUT: "swap_out",
    lib.VIRTIO_BALLOON_S_MAJFLT: "major_faults",
    lib.VIRTIO_BALLOON_S_MINFLT: "minor_faults",
    lib.VIRTIO_BALLOON_S_MEMFREE: "free_memory",
    lib.VIRTIO_BALLOON_S_MEMTOT: "total_memory",
    lib.VIRTIO_BALLOON_S_AVAIL: "available_memory",
    lib.VIRTIO_BALLOON_S_CACHES: "disk_caches",
    lib.VIRTIO_BALLOON_S_HTLB_PGALLOC: "hugetlb_allocations",
    lib.VIRTIO_BALLOON_S_HTLB_PGFAIL: "hugetlb_failures",
}


class Balloon(VirtioDevice):
    """A balloon of `target` bytes; `set_target` changes that while the guest runs.

    deflate_on_oom  the guest takes memory back when it would else have to kill a process
    reporting       the guest reports free blocks by itself
    released        bytes given back to the host since the machine was made (what is taken again is not subtracted)
    """

    name = "virtio-balloon"
    device_id = lib.VIRTIO_ID_BALLOON
    queue_sizes = (QUEUE_SIZE,) * 5
    own_thread = True  # each page that is given back stops all vCPUs for a moment

    def __init__(self, target: int = 0, *, deflate_on_oom: bool = True, reporting: bool = True) -> None:
        self.features = STATS_VQ | POISON | (DEFLATE_ON_OOM if deflate_on_oom else 0) | (REPORT if reporting else 0)
        self.released = 0
        self._config: CData = ffi.new(f"{CONFIG} *")
        self._first_target = target
        self._roles: tuple[int, ...] = ()
        self._poison = False
        self._stats: dict[str, int] = {}
        self._stats_chain: Chain | None = None  # the driver's buffer, ours until statistics are wanted (5.5.6.3)
        self._fresh = threading.Event()
        self._refused = False

    def bind(self, transport: object) -> None:
        """Check the first target against the machine's memory."""
        super().bind(transport)  # type: ignore[arg-type]
        self._config.num_pages = self._pages(self._first_target)

    # -- snapshots ----------------------------------------------------------------------------------------------

    shape = Shape(1, config=Bytes(CONFIG_SIZE))

    def save(self) -> State:
        """Target, what the guest says is in the balloon, and its poison value. Pages given back are holes of memory."""
        return {"config": self.config()}

    def unfinished(self, queue: Virtqueue) -> int:
        """The buffer for statistics, which the driver gives only once."""
        is_stats = bool(self._roles) and self._roles[queue.index] == STATS
        return int(is_stats and self._stats_chain is not None)

    def restore(self, state: State) -> None:
        """Go on with the target that the guest knows. Raises SnapshotError for one that is too large."""
        config: CData = ffi.new(f"{CONFIG} *")
        ffi.memmove(config, state["config"], CONFIG_SIZE)
        if config.num_pages * PAGE_SIZE > self.memory.size:
            raise SnapshotError(f"{self.name}: the snapshot's balloon is larger than the machine's memory")
        self._config = config

    def twin(self) -> Balloon:
        """One with the same options."""
        return Balloon(**self._options())

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its options."""
        return "balloon", {**self._options()}

    def _options(self) -> dict[str, bool]:
        return {
            "deflate_on_oom": bool(self.features & DEFLATE_ON_OOM),
            "reporting": bool(self.features & REPORT),
        }

    # -- the host's side ----------------------------------------------------------------------------------------

    @property
    def actual(self) -> int:
        """Bytes that the guest says are in the balloon."""
        return int(self._config.actual) * PAGE_SIZE

    @property
    def target(self) -> int:
        """Bytes that the balloon shall hold."""
        return int(self._config.num_pages) * PAGE_SIZE

    def set_target(self, size: int) -> None:
        """Ask the guest to give `size` bytes to the balloon, or to take back what is more; from any thread.

        It takes the guest some time: see `actual`. Raises ConfigError for more than the machine has.
        """
        pages = self._pages(size)
        with self.transport.lock:
            self._config.num_pages = pages
            self.config_changed()

    def _pages(self, size: int) -> int:
        if not 0 <= size <= self.memory.size:
            raise ConfigError("balloon", f"{size} bytes are not between 0 and the {self.memory.size} of the machine")
        return size // PAGE_SIZE

    def stats(self, timeout: float = 1.0) -> dict[str, int]:
        """The guest's memory statistics (bytes and counts by name; see STAT_NAMES), asked for now.

        The last known ones if the guest does not answer within `timeout` seconds, {} if it never did. Not for the I/O
        thread, which would wait for itself.
        """
        with self.transport.lock:
            self._fresh.clear()
            chain, self._stats_chain = self._stats_chain, None
            if chain is not None:
                self.complete(self.queues[STATS], chain)
        if chain is not None:
            self._fresh.wait(timeout)
        return dict(self._stats)

    # -- the device's side --------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """struct virtio_balloon_config (5.5.4)."""
        return bytes(ffi.buffer(self._config))

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may write `actual` and `poison_val`, each as a whole."""
        for field in ("actual", "poison_val"):
            if offset == ffi.offsetof(CONFIG, field) and len(data) == 4:
                setattr(self._config, field, int.from_bytes(data, "little"))

    def activate(self, features: int) -> None:
        """Which queue is which: Linux numbers those that exist without gaps, 5.5.2 with gaps."""
        self._poison = bool(features & POISON)
        optional = [role for role, bit in ((STATS, STATS_VQ), (REPORTING, REPORT)) if features & bit]
        roles = [INFLATE, DEFLATE, *optional]
        self._roles = (*roles, *(REPORTING if REPORTING in roles else HINT for _ in range(5 - len(roles))))

    def reset(self) -> None:
        """The balloon is empty: a driver that starts anew has forgotten its pages."""
        self._config.actual = self._config.poison_val = 0
        self._stats_chain = None
        self._stats = {}
        self._roles = ()

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Pages for the balloon or out of it, statistics, or free pages."""
        role = self._roles[queue.index]
        if role == INFLATE:
            self._release(list(_runs(chain)), zeroed=False)  # nobody may expect anything of what is in there
        elif role == STATS:
            return self._take_stats(chain)
        elif role == REPORTING:
            self._take_reported(chain)
        return 0  # pages out of the balloon need nothing: they are faulted in when they are touched

    def _release(self, ranges: Sequence[tuple[int, int]], *, zeroed: bool = True) -> None:
        try:
            given_back = self.memory.discard(ranges, zeroed=zeroed)
            self.released += given_back
            if given_back < sum(length for _, length in ranges) and not self._refused:
                self._refused = True
                say = log.debug if any(slot.image is not None for slot in self.memory.slots) else log.warning
                say("this memory cannot be given back (hugetlbfs, or of a snapshot)", device=self.name)
        except GuestAddressError as error:
            raise DriverFault(f"page that is no RAM in the balloon (5.5.6): {error}") from None

    def _take_reported(self, chain: Chain) -> None:
        """Free blocks (5.5.6.7): the guest expects its poison value or zeros in there, or what was there before."""
        if self._poison and self._config.poison_val:
            return
        ranges = []
        for view in chain.writable:
            gpa = self.memory.gpa_of(view)
            start, end = -(-gpa // PAGE_SIZE) * PAGE_SIZE, (gpa + len(view)) // PAGE_SIZE * PAGE_SIZE
            if start < end:
                ranges.append((start, end - start))
        self._release(ranges)

    def _take_stats(self, chain: Chain) -> int | None:
        raw = chain.read(MAX_STATS * STAT_SIZE)
        found = {}
        for at in range(0, len(raw) - STAT_SIZE + 1, STAT_SIZE):
            tag, value = int.from_bytes(raw[at : at + 2], "little"), int.from_bytes(raw[at + 2 : at + 10], "little")
            if tag in STAT_NAMES:
                found[STAT_NAMES[tag]] = value
        self._stats = found
        self._fresh.set()
        if self._stats_chain is not None:
            return 0  # the driver offers one buffer; of two the older one is kept
        self._stats_chain = chain
        return None


def _runs(chain: Chain) -> Iterator[tuple[int, int]]:
    """The pages of a request as (GPA, length) of adjacent ones, in ascending order."""
    size = chain.readable_size
    if size > 4 * MAX_PFNS:
        raise DriverFault(f"{size // 4} pages in one request to the balloon")
    pfns = sorted(memoryview(chain.read(size // 4 * 4)).cast("I"))
    start = end = -1
    for pfn in pfns:
        if pfn > end:
            if end > start:
                yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
            start = pfn
        end = pfn + 1
    if end > start:
        yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
