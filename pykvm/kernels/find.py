"""Which kernel `pykvm run` boots: the one named, the newest on this host, or Debian's. Layer: control."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from pykvm.errors import HostError, ImageError
from pykvm.kernels.modules import Modules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKAGE = "linux-image-cloud-amd64"  # Debian's kernel for virtual machines: small, and all that is needed is a module
VERSION_AT = 0x20E  # Linux Documentation/arch/x86/boot.rst, "kernel_version": offset of the text, less 0x200
MAGIC_AT, MAGIC = 0x202, b"HdrS"


class Kernel:
    """An image to boot, and its modules; `modules` is None for one that has everything built in."""

    def __init__(self, image: Path, modules: Modules | None) -> None:
        self.image = image
        self.modules = modules

    def initramfs_modules(self, names: Iterable[str]) -> dict[str, bytes]:
        """The files that an initramfs has to load, in order. Raises ImageError."""
        return self.modules.order(names) if self.modules is not None else {}


def kernel_version(image: Path) -> str:
    """The version in a bzImage's header, as `uname -r` shows it; "" for other files."""
    try:
        with image.open("rb") as file:
            head = file.read(0x10000)
    except OSError as error:
        raise ImageError(image, error.strerror or "cannot be read") from None
    if head[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
        return ""
    (at,) = struct.unpack_from("<H", head, VERSION_AT)
    words = head[at + 0x200 : at + 0x300].partition(b"\0")[0].split()
    return words[0].decode(errors="replace") if words else ""


def named_kernel(image: Path, modules: Path | None) -> Kernel:
    """The kernel that --kernel names, with its modules: --modules, beside it, or the host's of its version.

    One without any is taken to have everything built in.
    """
    version = kernel_version(image)
    if modules is not None:
        places = [modules, modules / version]
        if not modules.is_dir():
            raise ImageError(modules, "is no folder of modules")
    else:
        places = [image.parent / "modules" / version, Path("/lib/modules") / version] if version else []
    for place in reversed(places):
        if (place / "kernel").is_dir() or (place / "modules.builtin").exists():
            return Kernel(image, Modules(place))
    return Kernel(image, None)


def cache_folder() -> Path:
    """${PYKVM_CACHE:-~/.cache/pykvm}."""
    return Path(os.environ.get("PYKVM_CACHE") or Path.home() / ".cache" / "pykvm").absolute()


def find_kernel(needed: Iterable[str]) -> Kernel:
    """The newest kernel that has the modules `needed`: of this host, else one fetched before, else Debian's.

    Raises HostError when there is none and none can be fetched.
    """
    needed = tuple(needed)
    for image in _candidates():
        kernel = named_kernel(image, None)
        if kernel.modules is not None and all(map(kernel.modules.has, needed)):
            return kernel
    return named_kernel(fetch_kernel(cache_folder() / "kernel"), None)


def _candidates() -> Iterator[Path]:
    host = [*Path("/boot").glob("vmlinuz-*"), *Path("/lib/modules").glob("*/vmlinuz")]
    yield from sorted(filter(_readable, host), key=lambda image: _sort_key(kernel_version(image)), reverse=True)
    for folder in (cache_folder() / "kernel", cache_folder() / "lab" / "guest-kernel"):
        if _readable(folder / "vmlinuz"):
            yield folder / "vmlinuz"


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def _sort_key(version: str) -> list[tuple[bool, int | str]]:
    """6.10 comes after 6.9, and 6.10 after 6.10-rc1."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.findall(r"\d+|[a-z]+", version)]


def fetch_kernel(folder: Path) -> Path:
    """Download Debian's kernel package and unpack image and modules into `folder`; nothing is installed."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if not shutil.which(tool):
            raise HostError(
                f"no kernel in /boot or /lib/modules can be used, and without {tool} none can be fetched: "
                "give one with --kernel FILE"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as name:
        work = Path(name)
        shown = _apt(work, "apt-cache", "depends", PACKAGE)
        found = re.search(r"Depends: (linux-image-\d\S*)", shown)
        if not found:
            raise HostError(f"apt-cache knows no {PACKAGE}: run apt-get update, or give a kernel with --kernel FILE")
        _apt(work, "apt-get", "-q", "download", found.group(1))
        (package,) = work.glob("*.deb")
        _apt(work, "dpkg-deb", "-x", str(package), "root")
        ready = work / "ready"
        ready.mkdir()
        (image,) = work.glob("root/boot/vmlinuz-*")
        image.rename(ready / "vmlinuz")
        modules = next(path for path in (work / "root/lib/modules", work / "root/usr/lib/modules") if path.is_dir())
        modules.rename(ready / "modules")
        if folder.exists():
            folder.rename(work / "old")
        ready.rename(folder)
    return folder / "vmlinuz"


def _apt(folder: Path, *command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    # as root apt drops to a user that may not write below the cache
    options = ("-o", "APT::Sandbox::User=") if command[0] == "apt-get" else ()
    done = subprocess.run(
        [*command[:1], *options, *command[1:]],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise HostError(f"{' '.join(command)} failed: {last}; give a kernel with --kernel FILE")
    return done.stdout
