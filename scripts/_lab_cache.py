"""What the lab boots, kept in a cache folder: Debian's kernels, busybox, and an initramfs made of them.

Used by scripts/lab. Nothing is installed: the packages are fetched with a private apt configuration that
points at Debian's archive (so that Ubuntu hosts test with the very same kernels), checked by apt against the
archive's signature, and unpacked with dpkg. Standard library only: this runs before the project's venv exists.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# Folders of the initramfs and the modules in them; /init loads both at the same time, one on each CPU. What they
# depend on is read from the modules themselves.
LAB_MODULES = {
    "modules/kvm": ("kvm-amd",),
    "modules/io": ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"),
}

# Folders of a kernel package that no test needs and that make up most of it.
UNWANTED = (
    "sound",
    *(f"drivers/{name}" for name in ("gpu", "media", "infiniband", "staging", "iio", "scsi", "hwmon", "mtd", "usb")),
    *(f"drivers/net/{name}" for name in ("ethernet", "wireless", "can", "dsa", "usb", "phy")),
)

SIGNATURE_MARK = b"~Module signature appended~\n"


class LabError(Exception):
    """The lab cannot be prepared; the message says what to do."""


def cache_folder() -> Path:
    """${PYKVM_CACHE:-~/.cache/pykvm}/lab."""
    return Path(os.environ.get("PYKVM_CACHE") or Path.home() / ".cache" / "pykvm").absolute() / "lab"


class Cache:
    """The prepared files of one Debian suite; `prepare` makes them when they are not there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.busybox = folder / "busybox"
        self.initramfs = folder / "initramfs.cpio"
        self.lab = folder / "lab-kernel"  # runs the lab: Debian's stock kernel (the cloud kernel has no 9p)
        self.guest = folder / "guest-kernel"  # what tests boot: Debian's cloud kernel

    @property
    def guest_kernel(self) -> Path:
        """The bzImage that tests boot as a guest."""
        return self.guest / "vmlinuz"

    @property
    def guest_modules(self) -> Path:
        """The folder of its modules (lib/modules/VERSION)."""
        return self.guest / "modules"

    def lab_kernel(self) -> Path:
        """The lab's own kernel: unpacked where possible, which saves the emulated CPU that work."""
        vmlinux = self.lab / "vmlinux"
        return vmlinux if vmlinux.exists() else self.lab / "vmlinuz"

    def prepare(self, init: Path, refresh: bool = False) -> None:
        """Download and build what is missing, or everything; safe against a second run meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            complete = self.folder / "complete"
            if refresh or not complete.exists():
                complete.unlink(missing_ok=True)
                self._fetch()
                complete.touch()
            if not self.initramfs.exists() or self.initramfs.stat().st_mtime < max(
                init.stat().st_mtime, Path(__file__).stat().st_mtime
            ):
                self._build_initramfs(init)

    def _fetch(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="fetch-") as name:
            apt = PrivateApt(Path(name))
            for package, target in (("linux-image-amd64", self.lab), ("linux-image-cloud-amd64", self.guest)):
                image = apt.dependency(package, r"linux-image-[0-9][^ ,]*")
                unpack_kernel(apt.download(image), target)
            unpack_vmlinux(self.lab / "vmlinuz", self.lab / "vmlinux")
            unpack(
                apt.download("busybox-static"),
                lambda name: self.busybox if name.endswith("bin/busybox") else None,
            )
            self.busybox.chmod(0o755)
        self.initramfs.unlink(missing_ok=True)

    def _build_initramfs(self, init: Path) -> None:
        archive = Cpio()
        for folder in ("bin", "dev", "proc", "sys", "modules", *LAB_MODULES):
            archive.add(folder, 0o040755)
        archive.add("dev/console", 0o020600, device=(5, 1))
        archive.add("init", 0o100755, init.read_bytes())
        archive.add("bin/busybox", 0o100755, self.busybox.read_bytes())
        for folder, names in LAB_MODULES.items():
            for number, module in enumerate(module_order(self.lab / "modules", names)):
                archive.add(f"{folder}/{number:02}-{module.name.split('.')[0]}.ko", 0o100644, read_module(module))
        temporary = self.initramfs.with_suffix(".tmp")
        temporary.write_bytes(archive.finish())
        temporary.replace(self.initramfs)


class PrivateApt:
    """apt-get with its own sources and state below `folder`: touches nothing of the host's, needs no root."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise LabError("the lab is made of Debian packages and needs apt-get and dpkg to fetch them")
        if not KEYRING.exists():
            raise LabError(f"{KEYRING} is missing: run scripts/setup --lab, or apt-get install debian-archive-keyring")
        self.folder = folder
        (folder / "lists" / "partial").mkdir(parents=True)
        options = f"[arch=amd64 signed-by={KEYRING}]"
        (folder / "sources.list").write_text(
            f"deb {options} {MIRROR} {SUITE} main\ndeb {options} {SECURITY} {SUITE}-security main\n"
        )
        settings = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": folder,
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Acquire::Languages": "none",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "",
        }
        (folder / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        self._run("apt-get", "-q", "update")

    def _run(self, *command: str) -> str:
        print("lab:", *command, file=sys.stderr, flush=True)
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def dependency(self, package: str, pattern: str) -> str:
        """The package matching `pattern` that the newest `package` depends on."""
        shown = self._run("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^Depends:.*?({pattern})", shown, re.MULTILINE)
        if not found:
            raise LabError(f"apt-cache show {package}: no dependency like {pattern}")
        return found.group(1)

    def download(self, package: str) -> Path:
        """Fetch the newest `package`; returns the .deb."""
        self._run("apt-get", "-q", "download", package)
        return next(self.folder.glob(f"{package}_*.deb"))


def unpack(package: Path, place: Callable[[str], Path | None]) -> None:
    """Write each regular file of a .deb to where `place` puts its path; None leaves it out."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as stream,
        tarfile.open(fileobj=stream.stdout, mode="r|") as archive,
    ):
        for member in archive:
            target = place(member.name) if member.isfile() else None
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # a regular file
                target.write_bytes(source.read())
    if stream.returncode:
        raise LabError(f"dpkg-deb cannot read {package.name}")


def unpack_kernel(package: Path, target: Path) -> None:
    """Unpack a linux-image package into target/{vmlinuz,config,modules/...}, without UNWANTED folders."""

    def place(name: str) -> Path | None:
        if boot := re.search(r"/boot/(vmlinuz|config)-", name):
            return target / boot.group(1)
        module = re.search(r"/lib/modules/[^/]+/(?:kernel/)?(.*\.ko.*)", name)
        if not module or module.group(1).startswith(UNWANTED):
            return None
        return target / "modules" / module.group(1)

    shutil.rmtree(target, ignore_errors=True)
    unpack(package, place)
    if not (target / "vmlinuz").exists():
        raise LabError(f"{package.name} holds no kernel")


def unpack_vmlinux(bzimage: Path, vmlinux: Path) -> None:
    """Take the ELF kernel out of a bzImage whose payload is xz (others are left as they are).

    Setup header fields setup_sects, payload_offset and payload_length: Linux Documentation/arch/x86/boot.rst.
    """
    image = bzimage.read_bytes()
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        vmlinux.write_bytes(lzma.LZMADecompressor().decompress(payload))


def read_module(path: Path) -> bytes:
    """A kernel module's ELF file; newer Debian releases compress them.

    The mark at its end that announces a signature is cut off: to check them takes the emulated CPU a second.
    """
    content = path.read_bytes()
    return (lzma.decompress(content) if path.suffix == ".xz" else content).removesuffix(SIGNATURE_MARK)


def module_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the modules `names` and of all that they need, in an order in which insmod takes them.

    The "depends=" entry of a module's .modinfo section lists the modules it needs, so depmod is not needed.
    """
    files = {path.name.split(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None:
            raise LabError(f"the lab's kernel has no module {name}")
        if path in order:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", read_module(path))
        for needed in found.group(1).decode().split(",") if found else ():
            if needed:
                visit(needed)
        order.append(path)

    for name in names:
        visit(name)
    return order


class Cpio:
    """A "newc" cpio archive, the format of an initramfs (Linux Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Append one entry; `mode` with the file type bits, `device` the numbers of a device node."""
        self._inode += 1
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        self._out += b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
        self._pad()
        self._out += content
        self._pad()

    def _pad(self) -> None:
        self._out += bytes(-len(self._out) % 4)

    def finish(self) -> bytes:
        """The archive with its end mark."""
        self.add("TRAILER!!!", 0)
        return bytes(self._out)
