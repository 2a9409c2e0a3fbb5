"""virtio-pmem: a file of the host that the guest sees as persistent memory (virtio 1.2, 5.19). Layer: virtio.

The guest reads and writes the file's pages in the host's page cache, without a request and without a copy of its own;
what it wrote is on stable storage once a flush request has come back. Linux has it as /dev/pmem0, for DAX file systems.
"""

from __future__ import annotations

import os
import struct

from pykvm import log
from pykvm._native import lib
from pykvm.core.filememory import map_file
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.diskfile import DiskFile
from pykvm.virtio.fault import DriverFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.memory import GuestMemory
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

ALIGNMENT = 2 << 20  # Linux maps persistent memory in subsections of this size (SUBSECTION_SIZE)
CONFIG = struct.Struct("<QQ")  # struct virtio_pmem_config
REQUEST = struct.Struct("<I")
OK, FAILED = 0, 1


class _File(DiskFile):
    option, unit = "pmem", 1


class Pmem(VirtioDevice):
    """A raw file or block device as persistent memory.

    path      the file; a writable one has a multiple of 2 MiB
    readonly  the guest's writes are lost, as a ROM's; many machines then share the pages of one file

    Shrinking the file under a running guest ends the machine with a CRASH. Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_PMEM
    queue_sizes = (128,)
    own_thread = True  # a flush takes as long as the host's disk

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        self.path = os.fspath(path)
        self.name = f"pmem {self.path}"
        self.file = _File(self.path, readonly=readonly)
        self.flushes = 0
        length = self.file.size
        self.memory_size = (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if length != self.memory_size and not readonly:
            self.file.close()
            raise ConfigError(
                "pmem",
                f"{self.path}: {length} bytes are no multiple of 2 MiB, and what is written behind them would be lost: "
                f"truncate -s {self.memory_size >> 20}M FILE, or add ,ro",
            )

    def place(self, memory: GuestMemory, gpa: int) -> None:
        """Map the file at `gpa`."""
        map_file(memory, gpa, self.memory_size, self.file.fd, readonly=self.file.readonly, name="pmem")
        self._gpa = gpa

    def config(self) -> bytes:
        """struct virtio_pmem_config: where the memory is (5.19.4)."""
        return CONFIG.pack(self._gpa, self.memory_size)

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """A flush: le32 type, answered by le32 result (5.19.6)."""
        if chain.writable_size < REQUEST.size:
            raise DriverFault("a request without room for its result (5.19.6)")
        kind = chain.read(REQUEST.size)
        result = OK
        if kind != REQUEST.pack(lib.VIRTIO_PMEM_REQ_TYPE_FLUSH) or not self._flush():
            result = FAILED
        return chain.write(REQUEST.pack(result))

    def _flush(self) -> bool:
        self.flushes += 1
        if self.file.readonly:
            return True
        try:
            self.file.flush()
        except OSError as error:
            log.warning("pmem cannot be written back", file=self.path, error=error.strerror)
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def check_snapshot(self, *, to_file: bool) -> None:
        """Never: the guest's memory would not be what it was."""
        raise SnapshotError(f"{self.name} cannot be part of a snapshot: its file goes on changing. Leave it out")
