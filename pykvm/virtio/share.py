"""virtio-fs: a folder of the host in the guest, served by virtiofsd. Layer: virtio.

Source: virtio 1.2, 5.11 (File System Device). In the guest: `mount -t virtiofs TAG /mnt`.

    with Pc(kernel, devices=[Share("/srv/data", tag="data", readonly=True)]) as vm: ...
"""

from __future__ import annotations

import os
import shutil
import subprocess

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.core.state import BOOL, Shape
from pykvm.errors import ConfigError
from pykvm.virtio.backend import ProcessBackend
from pykvm.virtio.vhost_user import VhostUser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.state import State

TAG_SIZE = 36  # 5.11.4: in bytes of UTF-8, padded with NULs
HIPRIO_SIZE, REQUEST_SIZE = 128, 1024  # Linux fits the largest request to the queue: 1 MiB at 1024
QUEUES = 1  # request queues: Linux 6.1 uses one

# Debian 12 and Ubuntu 22.04 (in qemu-system-common); Debian 13, Ubuntu 24.04, Fedora (the one written in Rust)
PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
ROOT_AT = "/tmp"  # pivot_root takes no "/": in virtiofsd's own mount namespace the whole tree is at this folder as well
ADVICE = "requests in flight failed; umount and mount the share again in the guest"


def find_virtiofsd() -> str:
    """The program's path: $PYKVM_VIRTIOFSD, PATH, or where distributions put it. Raises ConfigError."""
    named = os.environ.get("PYKVM_VIRTIOFSD")
    places = (named,) if named else (shutil.which("virtiofsd") or "", *PLACES)
    for path in places:
        if path and os.access(path, os.X_OK):
            return path
    if named:
        raise ConfigError("share", f"PYKVM_VIRTIOFSD={named} is no program")
    raise ConfigError(
        "share", "needs virtiofsd, which is not installed: apt-get install virtiofsd (Debian 12: qemu-system-common)"
    )


class Share(VhostUser):
    """The folder `path` in the guest, under the name `tag` (by default the folder's own).

    readonly  nothing in the folder, or mounted below it, can be changed: virtiofsd itself has only read-only mounts
    cache     "auto", "always" (fast, for a folder that only the guest changes) or "never"

    Raises ConfigError.
    """

    device_id = lib.VIRTIO_ID_FS
    queue_sizes = (HIPRIO_SIZE, *[REQUEST_SIZE] * QUEUES)
    _driven = False  # the back end has met a driver

    def __init__(self, path: str, *, tag: str = "", readonly: bool = False, cache: str = "auto") -> None:
        self.path = os.path.realpath(path)
        if not os.path.isdir(self.path):
            raise ConfigError("share", f"{path} is no folder")
        self.tag = tag or os.path.basename(self.path) or "root"
        self.readonly = readonly
        if not 0 < len(self.tag.encode(errors="surrogateescape")) <= TAG_SIZE or "\0" in self.tag:
            raise ConfigError("share", f"the tag {self.tag!r} has to have 1 to {TAG_SIZE} bytes: --share DIR:TAG")
        if cache not in ("auto", "always", "never"):
            raise ConfigError("share", f"cache={cache} is none of auto, always, never")
        self.name = f"share {self.tag}"
        self.cache = cache
        source = Virtiofsd(self.path, readonly, cache)
        super().__init__(source)

    # -- snapshots ----------------------------------------------------------------------------------------------
    # What virtiofsd knows of a mount (its FUSE session, inodes, open files) is in no snapshot. A copy of the machine,
    # and one that is put back, get a new virtiofsd: it answers EIO until the guest mounts the share anew.

    shape = Shape(1, mounted=BOOL)

    @property
    def _mounted(self) -> bool:
        """Whether the guest has ever asked for something (5.11.2: queue 0 is for urgent requests)."""
        return any(queue.next_avail for queue in self.queues[1:])

    def restore(self, state: State) -> None:
        """A new session; the guest has to mount the share again."""
        if self._driven:
            self.renew()
        if state["mounted"]:
            log.warning("umount and mount the share again in the guest", device=self.name)

    def activate(self, features: int) -> None:
        """The driver is ready."""
        self._driven = True
        super().activate(features)

    def twin(self) -> Share:
        """The same folder: it is shared by all copies of the machine."""
        return Share(self.path, tag=self.tag, readonly=self.readonly, cache=self.cache)

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Its options."""
        return "share", {"path": self.path, "tag": self.tag, "readonly": self.readonly, "cache": self.cache}

    def config(self) -> bytes:
        """struct virtio_fs_config (5.11.4)."""
        config = ffi.new("struct virtio_fs_config *")
        tag = self.tag.encode(errors="surrogateescape")
        ffi.memmove(config.tag, tag, len(tag))
        config.num_request_queues = QUEUES
        return bytes(ffi.buffer(config))


class Virtiofsd(ProcessBackend):
    """virtiofsd, of either kind, with the strongest sandbox that works here."""

    advice = ADVICE

    def __init__(self, path: str, readonly: bool, cache: str) -> None:
        self.program = find_virtiofsd()
        self.path, self.cache = (ROOT_AT if path == "/" else path), cache
        self.rust = "--shared-dir" in _help(self.program)
        if os.geteuid() and not self.rust:
            raise ConfigError(
                "share",
                f"{self.program} (virtiofsd of QEMU) works for root only: run pykvm as root, or install the "
                "virtiofsd that is written in Rust",
            )
        self.sandbox = "namespace" if _can_pivot() else "chroot"
        if self.sandbox != "namespace":
            log.debug("virtiofsd runs in a chroot: this process's root is no mount that pivot_root takes")
        super().__init__("virtiofsd", "share", self.command, readonly=readonly, root_at=ROOT_AT if path == "/" else "")

    def command(self, fd: int) -> Sequence[str]:
        """The words for either command line."""
        limit = ["--rlimit-nofile=0"] if os.geteuid() else []  # only root may raise it
        if self.rust:
            return [
                self.program,
                f"--fd={fd}",
                f"--shared-dir={self.path}",
                f"--cache={self.cache}",
                f"--sandbox={self.sandbox}",
                "--log-level=error",
                *limit,
            ]
        cache = "none" if self.cache == "never" else self.cache
        # a comma in a value of -o is written as "\,"
        source = self.path.replace("\\", "\\\\").replace(",", "\\,")
        words = [self.program, "-f", f"--fd={fd}", "-o", f"source={source}", "-o", f"cache={cache}"]
        return [*words, "-o", f"sandbox={self.sandbox}", "-o", "log_level=err", *limit]


def _help(program: str) -> str:
    try:
        done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError("share", f"cannot run {program}: {error}") from None
    return done.stdout + done.stderr


def _can_pivot() -> bool:
    """Whether pivot_root can work: our root has to be a mount point, and not the kernel's first file system."""
    try:
        with open("/proc/self/mountinfo") as mounts:
            roots = [line.split() for line in mounts]
    except OSError:
        return False
    return any(words[4] == "/" and "rootfs" not in words[words.index("-") :] for words in roots)
