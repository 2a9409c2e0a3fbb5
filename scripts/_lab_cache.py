"""What the lab boots, kept in a cache folder: Debian's kernels, busybox, and an initramfs made of them.

Used by scripts/lab. Nothing is installed: the packages are fetched with a private apt configuration that
points at Debian's archive (so that Ubuntu hosts test with the very same kernels), checked by apt against the
archive's signature, and unpacked with dpkg. Standard library only: this runs before the project's venv exists.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _lab_kernel import Cpio, LabError, Modules, read_module, unpack, unpack_kernel, unpack_vmlinux

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
FORMAT = "2"  # of the cache folder: kept in its file "complete", anything else there is fetched anew


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
        """Its modules, as for an initramfs's lib/modules: VERSION/modules.dep and so on."""
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
            if refresh or not complete.exists() or complete.read_text() != FORMAT:
                complete.unlink(missing_ok=True)
                self._fetch()
                complete.write_text(FORMAT)
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
            for number, module in enumerate(Modules(self.lab / "modules").order(*names)):
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
