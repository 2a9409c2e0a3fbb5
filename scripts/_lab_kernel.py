"""What scripts/lab does with Debian's kernel packages: unpack them, order their modules, pack an initramfs."""

from __future__ import annotations

import contextlib
import lzma
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Folders of a kernel package that no test needs and that make up most of it.
UNWANTED = (
    "sound",
    *(f"drivers/{name}" for name in ("gpu", "media", "infiniband", "staging", "iio", "scsi", "hwmon", "mtd", "usb")),
    *(f"drivers/net/{name}" for name in ("ethernet", "wireless", "can", "dsa", "usb", "phy")),
)

SIGNATURE_MARK = b"~Module signature appended~\n"


class LabError(Exception):
    """The lab cannot be prepared; the message says what to do."""


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
        module = re.search(r"/lib/modules/([^/]+/kernel/(.*\.ko.*))", name)
        if not module or module.group(2).startswith(UNWANTED):
            return None
        return target / "modules" / module.group(1)

    shutil.rmtree(target, ignore_errors=True)
    unpack(package, place)
    if not (target / "vmlinuz").exists():
        raise LabError(f"{package.name} holds no kernel")
    for version in (target / "modules").iterdir():
        write_modules_dep(version)


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


class Modules:
    """The modules below a folder, by name ("-" and "_" are the same in names).

    The "depends=" entry of a module's .modinfo section lists the modules it needs, so depmod is not needed.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {path.name.split(".")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
        self._needed: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def order(self, *names: str) -> list[Path]:
        """The files of the modules `names` and of all that they need, in an order in which insmod takes them."""
        order: list[Path] = []
        for name in names:
            if name.replace("-", "_") not in self._files:
                raise LabError(f"the kernel has no module {name}")
            order += [*self.order(*self._depends(name)), self._files[name.replace("-", "_")]]
        return list(dict.fromkeys(order))

    def _depends(self, name: str) -> list[str]:
        """What one module needs directly, read from its file once."""
        if name not in self._needed:
            found = re.search(rb"\0depends=([^\0]+)\0", read_module(self._files[name.replace("-", "_")]))
            self._needed[name] = found.group(1).decode().split(",") if found else []
        return self._needed[name]


def write_modules_dep(version: Path) -> None:
    """Write lib/modules/VERSION/modules.dep, from which busybox's modprobe knows what a module needs."""
    modules = Modules(version)
    lines = []
    for name in modules:
        with contextlib.suppress(LabError):  # it needs one of the UNWANTED
            *needed, path = [file.relative_to(version).as_posix() for file in modules.order(name)]
            lines.append(f"{path}: {' '.join(reversed(needed))}".rstrip())
    (version / "modules.dep").write_text("\n".join(sorted(lines)) + "\n")


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
