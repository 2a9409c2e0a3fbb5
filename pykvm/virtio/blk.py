"""virtio-blk: a disk (virtio 1.2, 5.2). Layer: virtio.

Whatever goes wrong with a request - the host's file system is full, the file was cut short, a sector that does not
exist, a type that nobody knows - is a status for the driver, and one line in the log for each kind of it. Only a
request without room for its status is a driver's fault.
"""

from __future__ import annotations

import os
import struct

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.core.state import U64, Row, Shape
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.blkplane import BlkPlane
from pykvm.virtio.chain import slices
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.diskfile import SECTOR, DiskFile
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.native import NativeLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.memimage import SlotImage
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.queue import Virtqueue
    from pykvm.virtio.rate import RateLimit

QUEUE_SIZE = 256
MAX_QUEUES = 16
HEADER = struct.Struct("<IIQ")  # struct virtio_blk_outhdr
SEGMENT = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes
ID_BYTES = lib.VIRTIO_BLK_ID_BYTES
OK, IOERR, UNSUPP = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR, lib.VIRTIO_BLK_S_UNSUPP
UNMAP = lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP

# Bounds on what one request may keep the I/O thread busy with; drivers split what is larger.
MAX_SEGMENTS = 16
MAX_DISCARD_SECTORS = (1 << 30) // SECTOR
MAX_ZERO_SECTORS = (4 << 20) // SECTOR  # where the file system cannot do it, zeroes are written

NAMES = {
    lib.VIRTIO_BLK_T_IN: "read",
    lib.VIRTIO_BLK_T_OUT: "write",
    lib.VIRTIO_BLK_T_FLUSH: "flush",
    lib.VIRTIO_BLK_T_GET_ID: "get id",
    lib.VIRTIO_BLK_T_DISCARD: "discard",
    lib.VIRTIO_BLK_T_WRITE_ZEROES: "write zeroes",
}


def _bits(*names: str) -> int:
    return sum(1 << int(getattr(lib, f"VIRTIO_BLK_F_{name}")) for name in names)


class _Refused(Exception):
    """A request that the driver should not have made: (status, why)."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Disk(VirtioDevice):
    """A disk backed by a raw image file or a block device.

    >>> Pc(kernel, devices=[Disk("root.img"), Disk("data.img", readonly=True, id="data")])

    path      the image; its size when the machine is made is the disk's size
    readonly  the driver is told so, and its writes fail
    id        the serial number that the guest sees, up to 20 ASCII characters
    direct    past the host's page cache (O_DIRECT)
    queues    request queues, one for each CPU that shall have its own
    limit     a rate limit for bytes and requests; Python then serves them all
    thread    an I/O thread of its own: a flush that takes long holds up no other device
    overlay   keep what the guest writes in memory: the image is only read, and gone is what was written at the end.
              Snapshots and forks of a machine take its writable disks along only so
    native    C serves what it can; False: Python does, as C's reference

    A writer has the image to itself: another one, of pykvm or QEMU, is refused. Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_BLOCK

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        id: str = "",
        direct: bool = False,
        queues: int = 1,
        limit: RateLimit | None = None,
        thread: bool = False,
        overlay: bool = False,
        native: bool = True,
    ) -> None:
        if overlay and (readonly or direct):
            raise ConfigError("disk", "an overlay is neither read-only nor direct")
        if not id.isascii() or len(id) > ID_BYTES or not id.isprintable():
            raise ConfigError("disk", f"id {id!r} is not up to {ID_BYTES} printable ASCII characters")
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError("disk", f"{queues} queues: 1 to {MAX_QUEUES} are possible")
        self.path = os.fspath(path)
        self.name = f"disk {self.path}"
        self.id = id.encode()
        self.limit = limit
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._recipe = {"readonly": readonly, "id": id, "direct": direct, "queues": queues, "thread": thread}
        self._recipe["overlay"] = overlay
        self.file = self._open(readonly, direct, overlay)
        self.capacity = self.file.size // SECTOR
        self.features = _bits("SEG_MAX", "GEOMETRY", "BLK_SIZE", "TOPOLOGY", "FLUSH")
        self.features |= _bits("RO") if readonly else _bits("DISCARD", "WRITE_ZEROES")
        if queues > 1:
            self.features |= _bits("MQ")
        self.native, self.own_thread = native and not overlay, thread
        self.errors = 0
        self._requests = dict.fromkeys(NAMES, 0)
        self._said: set[str] = set()
        self._config = self._make_config()
        self.plane = BlkPlane()

    def _open(self, readonly: bool, direct: bool, overlay: bool) -> DiskFile:
        if not overlay:
            return DiskFile(self.path, readonly=readonly, direct=direct)
        from pykvm.virtio.overlay import OverlayFile

        return OverlayFile(self.path)

    @property
    def requests(self) -> dict[str, int]:
        """How many requests of each kind were served."""
        counts = {NAMES[kind]: count for kind, count in self._requests.items()}
        for name, count in (("read", "reads"), ("write", "writes"), ("flush", "flushes")):
            counts[name] += int(getattr(self.plane.state, count))
        return counts

    @property
    def in_flight(self) -> int:
        """How many requests the host has begun with, one beside the other."""
        return int(self.plane.state.in_flight)

    def bind(self, transport: VirtioMmio) -> None:
        """Let C serve the queues, unless a rate limit has to be kept to."""
        super().bind(transport)
        if not isinstance(transport.lock, NativeLock) or self.limit is not None:
            return
        self.plane.bind(transport, self.file, self.capacity, self._on_ended)

    def _make_config(self) -> bytes:
        """The configuration space (5.2.4)."""
        config = ffi.new("struct virtio_blk_config *")
        config.capacity = self.capacity
        config.seg_max = QUEUE_SIZE - 2  # besides header and status
        config.geometry.heads, config.geometry.sectors = 16, 63  # what BIOSes make of a disk without cylinders
        config.geometry.cylinders = min(self.capacity // (16 * 63), 65535)
        config.blk_size = self.file.block_size
        exponent = max(0, (self.file.physical // self.file.block_size).bit_length() - 1)
        config.physical_block_exp = exponent
        config.min_io_size = 1 << exponent
        config.num_queues = len(self.queue_sizes)
        config.max_discard_sectors, config.max_discard_seg = MAX_DISCARD_SECTORS, MAX_SEGMENTS
        config.discard_sector_alignment = self.file.physical // SECTOR
        config.max_write_zeroes_sectors, config.max_write_zeroes_seg = MAX_ZERO_SECTORS, MAX_SEGMENTS
        config.write_zeroes_may_unmap = 1
        return bytes(ffi.buffer(config))

    def config(self) -> bytes:
        """What the driver reads of it."""
        return self._config

    def activate(self, features: int) -> None:
        """Without VIRTIO_BLK_F_FLUSH the driver never flushes: each write is on stable storage by itself (5.2.6.2)."""
        self.plane.state.write_through = not features & _bits("FLUSH")
        self.plane.state.active = 1

    def stop(self) -> None:
        """Nothing is served until a reset."""
        self.plane.state.active = 0

    def reset(self) -> None:
        """Nothing is in flight afterwards, and nothing writes guest memory any more."""
        lib.pk_blk_abandon(self.plane.state)

    def close(self) -> None:
        """Close the image."""
        if self.plane.serving:
            self.plane.close(self.transport)
        self.file.close()

    def on_notify(self, queue: Virtqueue) -> None:
        """Serve a queue by C, and by Python the requests that C leaves."""
        if not self.plane.serving:
            super().on_notify(queue)
            return
        for _ in range(queue.size):
            verdict = self.plane.serve(queue.index)
            if verdict != lib.PK_BLK_PYTHON:
                break
            chain = queue.pop()
            if chain is not None:
                queue.push(chain, self.on_request(queue, chain))
        if verdict != lib.PK_BLK_DONE:
            self.transport.notify(queue.index)
        self.transport.interrupt(queue)

    def _on_ended(self) -> None:
        """Requests ended that C had going on beside others: do those again that failed."""
        with self.transport.lock:
            self.plane.complete()
            if self.transport.live:
                self.transport.guarded(self._do_again)

    def _do_again(self) -> None:
        for queue, head in self.plane.failed(self.queues):
            chain = queue.again(head)
            queue.push(chain, self.on_request(queue, chain))
            self.transport.interrupt(queue)

    # -- snapshots ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish what is in flight."""
        lib.pk_blk_settle(self.plane.state)
        if self.transport.live:
            self._do_again()

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Which image it is, and the overlay's content."""
        from pykvm.virtio.overlay import Layers

        return Shape(1, stamp=Row(U64, U64), overlay=Layers())

    @property
    def _overlay(self) -> SlotImage | None:
        freeze = getattr(self.file, "freeze", None)
        return freeze() if freeze is not None else None

    @_overlay.setter
    def _overlay(self, image: SlotImage | None) -> None:
        be = getattr(self.file, "be", None)
        if (be is None) is not (image is None):
            raise SnapshotError(f"{self.name}: with an overlay in the machine or in the snapshot, but not in both")
        if be is not None:
            be(image)

    @property
    def _stamp(self) -> list[int]:
        """Size and time of the last change of the image."""
        if not self.file.readonly and not hasattr(self.file, "freeze"):
            self.file.flush()
        status = os.fstat(self.file.plain_fd)
        return [self.file.size, 0 if self.file.is_block else status.st_mtime_ns]

    @_stamp.setter
    def _stamp(self, value: list[int]) -> None:
        if value != self._stamp:
            raise SnapshotError(f"{self.name}: the image has changed since the snapshot")

    def check_snapshot(self, *, to_file: bool) -> None:
        """Refuse what would be lost, or what would outlive a snapshot in memory."""
        overlaid = hasattr(self.file, "freeze")
        if overlaid and self._is_short():
            raise SnapshotError(
                f"{self.name}: its image was cut short: what is left is not the disk that the guest has"
            )
        if not to_file and not overlaid and not self.file.readonly:
            raise SnapshotError(f"{self.name}: a snapshot would not keep what is on it: give it overlay, or ro")

    def _is_short(self) -> bool:
        return not self.file.is_block and os.fstat(self.file.plain_fd).st_size < self.file.length

    def twin(self) -> Disk:
        """The same image, its overlay to be filled in by `restore`."""
        return Disk(self.path, **self._recipe, limit=self.another_limit())  # type: ignore[arg-type]

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its options."""
        return "disk", {"path": os.path.abspath(self.path), **self._recipe, "limit": self.limit_numbers()}

    # -- requests (5.2.6) ---------------------------------------------------------------------------------------

    def on_request(self, queue: Virtqueue, chain: Chain) -> int:
        """Serve a request; its last writable byte becomes its status."""
        room = chain.writable_size - 1
        if room < 0:
            raise DriverFault(f"queue {queue.index}: a disk's request without a byte for its status (5.2.6)")
        kind = -1
        try:
            header = chain.read(HEADER.size)
            if len(header) < HEADER.size:
                raise _Refused(IOERR, f"a header of {len(header)} bytes")
            kind, _, sector = HEADER.unpack(header)
            self._serve(kind, sector, chain, room)
            status = OK
        except (OSError, _Refused) as error:
            status = self._failed(kind, error)
        chain.write(bytes((status,)), room)
        return room + 1

    def _serve(self, kind: int, sector: int, chain: Chain, room: int) -> None:
        """Do what a request asks for; `room` is how many bytes it has for an answer before its status."""
        if kind == lib.VIRTIO_BLK_T_IN:
            self.file.read(slices(chain.writable, 0, room), self._offset(sector, room))
        elif kind == lib.VIRTIO_BLK_T_OUT:
            data = slices(chain.readable, HEADER.size)
            self._check_writable()
            offset = self._offset(sector, chain.readable_size - HEADER.size)
            self.file.write(data, offset, sync=bool(self.plane.state.write_through))
        elif kind == lib.VIRTIO_BLK_T_FLUSH:
            self._flush()
        elif kind == lib.VIRTIO_BLK_T_GET_ID:
            chain.write(self.id.ljust(ID_BYTES, b"\0")[:room])
        elif kind in (lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES):
            self._erase(kind == lib.VIRTIO_BLK_T_WRITE_ZEROES, chain)
        else:
            raise _Refused(UNSUPP, "a type that is not known")
        self._requests[kind] += 1

    def _flush(self) -> None:
        if error := self.plane.take_flush_error():
            raise OSError(error, os.strerror(error))
        self.file.flush()

    def _check_writable(self) -> None:
        if self.file.readonly:
            raise _Refused(IOERR, "the disk is read-only")

    def _offset(self, sector: int, length: int) -> int:
        """The file offset of [sector, +length bytes), which must be whole sectors of the disk."""
        if length % SECTOR:
            raise _Refused(IOERR, "the length is not whole sectors")
        if sector + length // SECTOR > self.capacity:
            raise _Refused(IOERR, "past the end of the disk")
        return sector * SECTOR

    def _erase(self, zeroes: bool, chain: Chain) -> None:
        """Discard or write zeroes: all segments are checked before the first is touched."""
        self._check_writable()
        size = chain.readable_size - HEADER.size
        if not size or size % SEGMENT.size or size > MAX_SEGMENTS * SEGMENT.size:
            raise _Refused(IOERR, "not one to 16 whole segments")
        ranges = []
        for sector, count, flags in SEGMENT.iter_unpack(chain.read(size, HEADER.size)):
            if flags & ~(UNMAP if zeroes else 0):
                raise _Refused(UNSUPP, "a flag that is not known")
            if count > (MAX_ZERO_SECTORS if zeroes else MAX_DISCARD_SECTORS):
                raise _Refused(IOERR, "more sectors than the limit")
            if count:
                ranges.append((self._offset(sector, count * SECTOR), count * SECTOR, bool(flags & UNMAP)))
        for offset, length, unmap in ranges:
            if zeroes:
                self.file.write_zeroes(offset, length, unmap=unmap)
            else:
                self.file.discard(offset, length)
        if self.plane.state.write_through:
            self.file.flush()

    def _failed(self, kind: int, error: OSError | _Refused) -> int:
        """Count and (once for each kind) report it; the status."""
        self.errors += 1
        name = NAMES.get(kind, "request")
        why = str(error) if isinstance(error, _Refused) else error.strerror or str(error)
        if f"{name}: {why}" not in self._said:
            self._said.add(f"{name}: {why}")
            log.warning("disk request failed", disk=self.path, request=name, reason=why)
        return error.status if isinstance(error, _Refused) else IOERR
