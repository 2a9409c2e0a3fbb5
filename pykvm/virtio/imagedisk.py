"""Disks in the formats of QEMU (qcow2, vmdk, ...), served by qemu-storage-daemon over vhost-user-blk. Layer: virtio.

Source: virtio 1.2, 5.2 (Block Device), and the manual page of qemu-storage-daemon. The format is always named, never
guessed: a guest that writes another format's header into its disk gains nothing by it (CVE-2008-2004).
"""

from __future__ import annotations

import os
import shutil

from pykvm._native import ffi, lib
from pykvm.core.state import U64, Bytes, Row, Shape
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.backend import ProcessBackend
from pykvm.virtio.diskfile import SECTOR
from pykvm.virtio.vhost_user import VhostUser
from pykvm.virtio.vhostmsg import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.state import State
    from pykvm.virtio.imagelayers import Stack
    from pykvm.virtio.vhostmsg import Connection

PROGRAM = "qemu-storage-daemon"
FORMATS = ("qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
QUEUE_SIZE = 128
MAX_QUEUES = 16
STOP_S = 60.0  # for the daemon to write out its caches
# Up to and including write_zeroes_may_unmap and its padding: what every version of the back end has
WCE_AT = ffi.offsetof("struct virtio_blk_config", "wce")  # the only byte that a driver may write
CONFIG_SIZE = ffi.offsetof("struct virtio_blk_config", "write_zeroes_may_unmap") + 4


class ImageDisk(VhostUser):
    """The image at `path`, of format `kind`, as a disk. A backing file that the image names is opened as well.

    readonly  the guest can only read, and so does the daemon
    direct    past the host's page cache (O_DIRECT)
    queues    request queues, one for each vCPU at best
    overlay   keep what the guest writes in memory (pykvm.virtio.imagelayers): the image is only read, and gone is what
              was written at the end. Snapshots and forks of a machine take its writable disks along only so

    Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_BLOCK
    has_config = True
    settle_s = 10.0  # what is served after the snapshot was taken changes the image
    _put_away = False  # the daemon was ended for a snapshot

    def __init__(
        self,
        path: str,
        kind: str,
        *,
        readonly: bool = False,
        direct: bool = False,
        queues: int = 1,
        overlay: bool = False,
    ) -> None:
        if kind not in FORMATS:
            raise ConfigError("disk", f"format={kind} is none of raw, {', '.join(FORMATS)}")
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError("disk", f"queues={queues} is not between 1 and {MAX_QUEUES}")
        if overlay and readonly:
            raise ConfigError("disk", "an overlay is not read-only")
        if not os.path.isfile(path):
            raise ConfigError("disk", f"{path} is no file")
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(
                "disk", f"format={kind} needs {PROGRAM}, which is not installed: apt-get install qemu-system-common"
            )
        self.name = f"disk {os.path.basename(path)}"
        self.path, self.readonly = os.path.abspath(path), readonly
        self._options = {"kind": kind, "readonly": readonly, "direct": direct, "queues": queues}
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._config = b""
        self.stack: Stack | None = None

        def command(fd: int) -> list[str]:
            node = "disk" if self.stack is None else "image"
            words = _image_words(self.path, kind, node, readonly=readonly or overlay, direct=direct)
            words += self.stack.words(node, "disk") if self.stack is not None else []
            writable = not readonly and (not overlay or self.stack is not None)
            return [program, *words, *_export_words(fd, writable=writable, queues=queues)]

        self._daemon = ProcessBackend(PROGRAM, "disk", command)
        self._daemon.stop_s = STOP_S
        super().__init__(self._daemon)
        if overlay:
            self._lay_over()

    def _lay_over(self) -> None:
        """Start the daemon once more, with a layer of the size that the image turned out to have."""
        from pykvm.virtio.imagelayers import Stack

        self.stack = stack = Stack(int.from_bytes(self._config[:8], "little") * SECTOR)
        self._daemon.fds = lambda: stack.fds
        try:
            self._hang_up(well=True)
            self.features = self._connect()
        except BaseException as error:
            self._release()
            if isinstance(error, BackendError):
                raise ConfigError("disk", f"{PROGRAM} cannot be used: {error}") from None
            raise

    def greet(self, connection: Connection) -> None:
        """Size and limits of the disk do not change while the daemon has it open."""
        self._config = self.fetch_config(connection, CONFIG_SIZE)

    # -- snapshots ----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Which image it is, what the driver reads of it, and what lies over it."""
        from pykvm.virtio.imagelayers import Layers

        return Shape(1, stamp=Row(U64, U64), config=Bytes(CONFIG_SIZE), layers=Layers())

    def check_snapshot(self, *, to_file: bool) -> None:
        """A writable image has only one state: the one that it is in. Layers in memory are in no file."""
        if to_file and self.stack is not None:
            raise SnapshotError(f"{self.name}: its overlay is in memory and cannot be saved to a file")
        if not to_file and self.stack is None and not self.readonly:
            raise SnapshotError(f"{self.name}: a snapshot would not keep what is on it: give it overlay, or ro")

    def freeze(self) -> None:
        """Stop the rings, and have the daemon write out what it has of the image in its caches: it does at its end."""
        super().freeze()
        if self._connection is not None and not self.readonly:
            self._hang_up(well=True)
            self._put_away = True
            if self._daemon.status:
                raise SnapshotError(f"{self.name}: {PROGRAM} did not end in order (status {self._daemon.status})")

    def thaw(self) -> None:
        """Start the daemon again; if that fails, the device stops."""
        if self._put_away:
            try:
                self.renew()
            except SnapshotError as error:
                self.transport.needs_reset(str(error))
        super().thaw()

    def renew(self) -> None:
        """Start the daemon again. Raises SnapshotError."""
        self._put_away = False
        super().renew()

    def save(self) -> State:
        """What image it is, and what the driver reads of it and may have written."""
        layers = self.stack.freeze() if self.stack is not None else None
        return {"stamp": self._stamp(), "config": self._config, "layers": layers}

    def restore(self, state: State) -> None:
        """Go on with an image that nobody has changed meanwhile. Raises SnapshotError for another one."""
        if state["stamp"] != self._stamp():
            raise SnapshotError(f"{self.name}: the image has changed since the snapshot")
        if (self.stack is None) is not (state["layers"] is None):
            raise SnapshotError(f"{self.name}: with an overlay in the machine or in the snapshot, but not in both")
        if self.stack is not None:
            self.stack.be(state["layers"])
        if self._put_away or self.stack is not None:
            self.renew()
        if state["config"] != self._config:
            self.write_config(WCE_AT, state["config"][WCE_AT : WCE_AT + 1])
        if state["config"] != self._config:
            raise SnapshotError(f"{self.name}: the snapshot's disk is another one")

    def _stamp(self) -> list[int]:
        status = os.stat(self.path)
        return [status.st_size, status.st_mtime_ns]

    def twin(self) -> ImageDisk:
        """The same image, for reading, or with an overlay to be filled in by `restore`."""
        return ImageDisk(self.path, **self._options, overlay=self.stack is not None)  # type: ignore[arg-type]

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its options."""
        return "image", {"path": self.path, **self._options}

    def config(self) -> bytes:
        """struct virtio_blk_config (5.2.4), as the daemon fills it in."""
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may switch the write cache (`writeback`)."""
        self.send_config(offset, data)
        self._config = self._config[:offset] + data + self._config[offset + len(data) :]


def _image_words(path: str, kind: str, node: str, *, readonly: bool, direct: bool) -> list[str]:
    name = path.replace(",", ",,")
    cache = f"cache.direct={'on' if direct else 'off'}"
    mode = f"read-only={'on' if readonly else 'off'}"
    return [
        "--blockdev",
        f"driver=file,node-name=file,filename={name},{cache},{mode},discard=unmap",
        "--blockdev",
        f"driver={kind},node-name={node},file=file,{cache},{mode},discard=unmap",
    ]


def _export_words(fd: int, *, writable: bool, queues: int) -> list[str]:
    where = f"node-name=disk,addr.type=fd,addr.str={fd}"
    return [
        "--export",
        f"type=vhost-user-blk,id=disk,{where},writable={'on' if writable else 'off'},num-queues={queues}",
    ]
