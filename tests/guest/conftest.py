"""What the tests of the lab share: Debian's kernel as a guest, an initramfs for it, and a console to talk to it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pexpect
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from _lab_kernel import Cpio, Modules, read_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONSOLE_SECONDS = 120  # for one expectation; the lab's CPU is emulated and may share its machine


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """The bzImage of Debian's cloud kernel (set by scripts/lab)."""
    return Path(os.environ["PYKVM_GUEST_KERNEL"])


@pytest.fixture(scope="session")
def guest_modules() -> Path:
    """The modules of that kernel: VERSION/modules.dep and so on (set by scripts/lab)."""
    return Path(os.environ["PYKVM_GUEST_MODULES"])


@pytest.fixture(scope="session")
def initramfs(images: Path) -> Path:
    """A busybox initramfs: a shell on the console, or `pykvm.run=COMMAND` and power off."""
    return images / "initramfs.cpio.gz"


@pytest.fixture(scope="session")
def rootfs() -> Path:
    """Debian's root file system (scripts/setup --lab made it); the lab forgets what a test writes into it."""
    cache = Path(os.environ.get("PYKVM_CACHE") or Path.home() / ".cache" / "pykvm")
    return cache / "rootfs" / "debian.img"


@pytest.fixture
def initrd_with(tmp_path: Path, initramfs: Path, guest_modules: Path) -> Callable[..., Path]:
    """initrd_with("virtio_mmio", "button", files={"etc/x": b"..."}) makes an initramfs that also has these.

    The modules, with all that they need, are loaded before init says that it is up; files are executable.
    """

    def make(*modules: str, files: dict[str, bytes] | None = None) -> Path:
        more = Cpio()
        content = {
            f"modules/{place:02}-{path.name.removesuffix('.xz')}": read_module(path)
            for place, path in enumerate(Modules(guest_modules).order(*modules))
        } | (files or {})
        folders = {parent.as_posix() for name in content for parent in Path(name).parents[:-1]}
        for folder in sorted(folders):
            more.add(folder, stat.S_IFDIR | 0o755)
        for name, data in content.items():
            more.add(name, stat.S_IFREG | 0o755, data)
        initrd = tmp_path / "initrd.cpio.gz"
        base = initramfs.read_bytes()
        initrd.write_bytes(base + bytes(-len(base) % 4) + more.finish())  # Linux wants an archive to start aligned
        return initrd

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., pexpect.spawn[str]]]:
    """start(ARGUMENT...) runs `pykvm start ARGUMENT...` on a terminal; what still runs after the test is killed.

    All that a guest prints is shown with a failing test.
    """
    running: list[pexpect.spawn[str]] = []

    def run(*arguments: str | Path) -> pexpect.spawn[str]:
        command = ["-m", "pykvm", "start", *map(str, arguments)]
        console = pexpect.spawn(
            sys.executable, command, timeout=CONSOLE_SECONDS, encoding="utf-8", codec_errors="replace"
        )
        console.logfile_read = sys.stdout
        running.append(console)
        return console

    yield run
    for console in running:
        console.close(force=True)
