"""Disks in the formats of QEMU (qcow2, vmdk, ...), served by qemu-storage-daemon over vhost-user-blk. Layer: virtio.

Source: virtio 1.2, 5.2 (Block Device), and the manual page of qemu-storage-daemon. The format is always named, never
guessed: a guest that writes another format's header into its disk gains nothing by it (CVE-2008-2004).
"""

from __future__ import annotations

import os
import shutil

from pykvm._native import ffi, lib
from pykvm.errors import ConfigError
from pykvm.virtio.backend import ProcessBackend
from pykvm.virtio.vhost_user import VhostUser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.virtio.vhostmsg import Connection

PROGRAM = "qemu-storage-daemon"
FORMATS = ("qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
QUEUE_SIZE = 128
MAX_QUEUES = 16
# Up to and including write_zeroes_may_unmap and its padding: what every version of the back end has
CONFIG_SIZE = ffi.offsetof("struct virtio_blk_config", "write_zeroes_may_unmap") + 4


class ImageDisk(VhostUser):
    """The image at `path`, of format `kind`, as a disk. A backing file that the image names is opened as well.

    readonly  the guest can only read, and so does the daemon
    direct    past the host's page cache (O_DIRECT)
    queues    request queues, one for each vCPU at best

    Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_BLOCK
    has_config = True

    def __init__(self, path: str, kind: str, *, readonly: bool = False, direct: bool = False, queues: int = 1) -> None:
        if kind not in FORMATS:
            raise ConfigError("disk", f"format={kind} is none of raw, {', '.join(FORMATS)}")
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError("disk", f"queues={queues} is not between 1 and {MAX_QUEUES}")
        if not os.path.isfile(path):
            raise ConfigError("disk", f"{path} is no file")
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(
                "disk", f"format={kind} needs {PROGRAM}, which is not installed: apt-get install qemu-system-common"
            )
        self.name = f"disk {os.path.basename(path)}"
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._config = b""

        def command(fd: int) -> list[str]:
            return [program, *_daemon_words(path, kind, fd, readonly=readonly, direct=direct, queues=queues)]

        super().__init__(ProcessBackend(PROGRAM, "disk", command))

    def greet(self, connection: Connection) -> None:
        """Size and limits of the disk do not change while the daemon has it open."""
        self._config = self.fetch_config(connection, CONFIG_SIZE)

    def config(self) -> bytes:
        """struct virtio_blk_config (5.2.4), as the daemon fills it in."""
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may switch the write cache (`writeback`)."""
        self.send_config(offset, data)
        self._config = self._config[:offset] + data + self._config[offset + len(data) :]


def _daemon_words(path: str, kind: str, fd: int, *, readonly: bool, direct: bool, queues: int) -> list[str]:
    name = os.path.abspath(path).replace(",", ",,")
    cache = f"cache.direct={'on' if direct else 'off'}"
    mode = f"read-only={'on' if readonly else 'off'}"
    return [
        "--blockdev",
        f"driver=file,node-name=file,filename={name},{cache},{mode},discard=unmap",
        "--blockdev",
        f"driver={kind},node-name=disk,file=file,{cache},{mode},discard=unmap",
        "--export",
        f"type=vhost-user-blk,id=disk,node-name=disk,addr.type=fd,addr.str={fd},"
        f"writable={'off' if readonly else 'on'},num-queues={queues}",
    ]
