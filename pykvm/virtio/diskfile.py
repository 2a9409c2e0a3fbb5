"""The file or block device behind a disk: opening, locking, and moving data between it and guest memory. Layer: virtio.

The format is raw, always: nothing is guessed from what a guest may have written (CVE-2008-2004).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SECTOR = 512
IOV_MAX = 1024  # buffers that one preadv takes (limits.h)
BOUNCE_SIZE = 1 << 20
ZEROES = bytes(1 << 20)

# QEMU's protocol (block/file-posix.c): byte 100 + n of an image is locked by who does n, byte 200 + n by who wants
# nobody else to; n = 0 reads, 1 writes. Thus QEMU and pykvm keep off each other's images, too.
LOCK_READS, LOCK_WRITES, LOCK_NO_WRITERS = 100, 101, 201
LOCK_ALL = (100, 200)  # start, length
PUNCH = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
ZERO_RANGE = lib.FALLOC_FL_ZERO_RANGE | lib.FALLOC_FL_KEEP_SIZE
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)


class DiskFile:
    """An open image. Offsets and lengths are bytes; errors are OSError, EIO where the file is shorter than it was.

    length, size  bytes at the time of opening, and those of whole units
    block_size   what offsets, lengths and addresses of direct I/O are multiples of; else 512
    physical     the unit in which the host writes
    fd           the file; with O_DIRECT for `direct`
    plain_fd     the same without O_DIRECT, for what is not aligned: the kernel keeps both coherent

    Raises ConfigError when it is no file or block device, cannot be opened, or is in use.
    """

    option = "disk"  # that a user named it by
    unit = SECTOR  # bytes: what the guest sees is a multiple of it

    def __init__(self, path: str, *, readonly: bool = False, direct: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.direct = direct
        self.fd = self.plain_fd = -1
        self.block_size = SECTOR
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _refuse(self, why: str) -> ConfigError:
        return ConfigError(self.option, f"{self.path}: {why}")

    # -- opening ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            kind = os.stat(self.path).st_mode  # before opening: that alone does something to a tape or a FIFO
            self._check_kind(kind)
            self.is_block = stat.S_ISBLK(kind)
            flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if self.readonly else os.O_RDWR)
            if self.is_block and not self.readonly:
                flags |= os.O_EXCL  # not one that is mounted
            self.fd = self.plain_fd = os.open(self.path, flags)
            self._check_kind(os.fstat(self.fd).st_mode)
        except (OSError, ValueError) as error:
            raise self._refuse(self._why(error)) from None
        self._lock()
        self.length = size = os.lseek(self.fd, 0, os.SEEK_END)
        self.size = size // self.unit * self.unit
        if not self.size:
            raise self._refuse(f"{size} bytes hold no sector: make an image first, say by truncate -s 1G FILE")
        if size % self.unit:
            log.warning("disk does not end at a sector: the guest does not see its last bytes", disk=self.path)
        status = os.fstat(self.fd)
        self.physical = max(SECTOR, status.st_blksize) if not self.is_block else self._block_device_unit()
        if self.direct:
            self._open_direct(flags & ~os.O_EXCL)

    def _why(self, error: Exception) -> str:
        code = getattr(error, "errno", 0)
        if code == errno.EBUSY:
            return f"in use: mounted, or the {self.option} of another machine"
        if code in (errno.EACCES, errno.EROFS) and not self.readonly:
            return f"{os.strerror(code)}; add ,ro for a {self.option} that is only read"
        return os.strerror(code) if code else str(error)

    def _check_kind(self, mode: int) -> None:
        for test, name in (
            (stat.S_ISDIR, "a directory"),
            (stat.S_ISFIFO, "a FIFO"),
            (stat.S_ISCHR, "a character device"),
            (stat.S_ISSOCK, "a socket"),
        ):
            if test(mode):
                raise self._refuse(f"{name} is no {self.option}: give a raw image file or a block device")

    def _block_device_unit(self) -> int:
        unit = fcntl.ioctl(self.fd, lib.BLKPBSZGET, bytes(4))
        return max(SECTOR, int.from_bytes(unit, "little"))

    def _open_direct(self, flags: int) -> None:
        try:
            self.fd = os.open(f"/proc/self/fd/{self.plain_fd}", flags | os.O_DIRECT)
        except OSError as error:
            raise self._refuse(f"no direct I/O on its file system ({os.strerror(error.errno or 0)})") from None
        self._bounce = mmap.mmap(-1, BOUNCE_SIZE)
        page = memoryview(self._bounce)
        for unit in (SECTOR, 4096):
            self.block_size = unit
            try:
                os.preadv(self.fd, [page[unit : 2 * unit]], unit)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._refuse(os.strerror(error.errno or 0)) from None
            else:
                return
        raise self._refuse("direct I/O wants more than 4096-byte alignment")

    def _lock(self) -> None:
        """One writer or many readers; the lock belongs to the open file and goes with it, however the process ends."""
        try:
            if self.readonly:
                for byte in (LOCK_READS, LOCK_NO_WRITERS):
                    self._lock_bytes(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte, 1)
                busy = self._lock_bytes(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, LOCK_WRITES, 1) != fcntl.F_UNLCK
            else:
                self._lock_bytes(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, *LOCK_ALL)
                busy = False
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log.warning("disk cannot be locked: see that nothing else writes it", disk=self.path, error=str(error))
                return
            busy = True
        if busy:
            others = "writes" if self.readonly else "uses"
            raise self._refuse(f"another machine or program {others} it (it is locked)")

    def _lock_bytes(self, command: int, kind: int, start: int, length: int) -> int:
        """One fcntl with a struct flock; the kind of lock that it gives back."""
        lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
        return int(struct.unpack("hhqqi4x", fcntl.fcntl(self.plain_fd, command, lock))[0])

    def close(self) -> None:
        """Close the file, and so unlock it."""
        for fd in {self.fd, self.plain_fd} - {-1}:
            os.close(fd)
        self.fd = self.plain_fd = -1

    # -- moving data --------------------------------------------------------------------------------------------

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` from `offset` on."""
        fd = self._fd_for(buffers, offset)
        if fd is None:
            self._bounced(buffers, offset, write=False, flags=0)
        else:
            move(lambda part, at: os.preadv(fd, part, at), buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int, *, sync: bool = False) -> None:
        """Write `buffers` at `offset`; with `sync` they are on stable storage when it returns."""
        fd = self._fd_for(buffers, offset)
        flags = os.RWF_DSYNC if sync else 0
        if fd is None:
            self._bounced(buffers, offset, write=True, flags=flags)
        else:
            move(lambda part, at: os.pwritev(fd, part, at, flags), buffers, offset)

    def _fd_for(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """The descriptor that moves these buffers; None: direct I/O by way of the bounce buffer."""
        if not self.direct:
            return self.fd
        unit = self.block_size - 1
        if (offset | sum(map(len, buffers))) & unit:
            return self.plain_fd
        if any((int(ffi.cast("uintptr_t", ffi.from_buffer(each))) | len(each)) & unit for each in buffers):
            return None
        return self.fd

    def _bounced(self, buffers: Sequence[memoryview], offset: int, *, write: bool, flags: int) -> None:
        left = sum(map(len, buffers))
        pieces = _Pieces(buffers)
        while left:
            part = memoryview(self._bounce)[: min(left, BOUNCE_SIZE)]
            if write:
                pieces.copy(part, out=True)
                move(lambda some, at: os.pwritev(self.fd, some, at, flags), [part], offset)
            else:
                move(lambda some, at: os.preadv(self.fd, some, at), [part], offset)
                pieces.copy(part, out=False)
            left -= len(part)
            offset += len(part)

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Give the space back, where that can be done; its content is lost."""
        try:
            if self.is_block:
                fcntl.ioctl(self.fd, lib.BLKDISCARD, struct.pack("QQ", offset, length))
            else:
                self._fallocate(PUNCH, offset, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make [offset, offset + length) zeroes; with `unmap` its space may be given back."""
        for mode in (PUNCH, ZERO_RANGE) if unmap else (ZERO_RANGE,):
            try:
                self._fallocate(mode, offset, length)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
            else:
                return
        zeroes = memoryview(ZEROES)
        for at in range(offset, offset + length, len(ZEROES)):
            part = zeroes[: min(len(ZEROES), offset + length - at)]
            move(lambda some, start: os.pwritev(self.plain_fd, some, start), [part], at)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        result = lib.pk_fallocate(self.fd, mode, offset, length)
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def move(function: Callable[[Sequence[memoryview], int], int], buffers: Sequence[memoryview], offset: int) -> None:
    """Call preadv or pwritev until all is moved; EIO at the end of the file."""
    todo = list(buffers)
    while todo:
        done = function(todo[:IOV_MAX], offset)
        if done == 0:
            raise OSError(errno.EIO, "the file ends before the disk does")
        offset += done
        while todo and done >= len(todo[0]):
            done -= len(todo.pop(0))
        if done:
            todo[0] = todo[0][done:]


class _Pieces:
    """Buffers as a stream, from the first to the last byte."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left = list(buffers)

    def copy(self, flat: memoryview, *, out: bool) -> None:
        """Copy the next len(flat) bytes: from the buffers with `out`, else to them."""
        at = 0
        while at < len(flat):
            piece = self._left[0][: len(flat) - at]
            if out:
                flat[at : at + len(piece)] = piece
            else:
                piece[:] = flat[at : at + len(piece)]
            at += len(piece)
            self._left[0] = self._left[0][len(piece) :]
            if not self._left[0]:
                self._left.pop(0)
