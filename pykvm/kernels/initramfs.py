"""The initramfs of `pykvm run`: busybox, the modules that reach the host's root, and the command. Layer: control."""

from __future__ import annotations

import shlex
from pathlib import Path

from pykvm.errors import HostError
from pykvm.kernels.cpio import Cpio
from pykvm.kernels.find import cache_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pykvm.kernels.find import Kernel

MODULES = ("virtio_mmio", "virtio_console", "virtiofs", "overlay")
INIT = Path(__file__).with_name("run_init")
PLACES = ("/bin/busybox", "/usr/bin/busybox", "/usr/lib/initramfs-tools/bin/busybox")


def find_busybox() -> bytes:
    """A busybox that needs no library. Raises HostError."""
    for path in (*map(Path, PLACES), cache_folder() / "lab" / "busybox"):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if content[:4] == b"\x7fELF" and b"/ld-" not in content[:4096]:  # no PT_INTERP: statically linked
            return content
    raise HostError("needs a statically linked busybox for the initramfs: apt-get install busybox-static")


def build_initramfs(kernel: Kernel, command: str, shares: str) -> bytes:
    """The archive. `command` and `shares` are the shell scripts of `command_script` and `shares_script`."""
    archive = Cpio()
    for folder in ("dev", "proc", "sys", "modules"):
        archive.add_folder(folder)
    archive.add_device("dev/console", 5, 1)
    archive.add_file("init", INIT.read_bytes(), 0o755)
    archive.add_file("bin/busybox", find_busybox(), 0o755)
    for place, (name, content) in enumerate(kernel.initramfs_modules(MODULES).items()):
        archive.add_file(f"modules/{place:02}-{name}.ko", content)
    archive.add_file("command", command.encode(errors="surrogateescape"))
    archive.add_file("shares", shares.encode(errors="surrogateescape"))
    return archive.finish()


def command_script(words: Sequence[str], folder: str, environment: Mapping[str, str], *, stdin: bool) -> str:
    """Runs in the guest's root: environment, current folder, command."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"cd {shlex.quote(folder)} || exit 125")
    lines.append(f"exec {shlex.join(words)}" + ("" if stdin else " </dev/null"))
    return "\n".join(lines) + "\n"


def shares_script(shares: Sequence[tuple[str, str, bool]]) -> str:
    """(tag, path, readonly) of each share: mounted at the path that it has on the host."""
    lines = []
    for tag, path, readonly in shares:
        where = shlex.quote(f"/root{path}")
        mode = "ro" if readonly else "rw"
        lines.append(f"mkdir -p {where} && mount -t virtiofs -o {mode} {shlex.quote(tag)} {where} || return 1")
    return "\n".join(lines) + "\n"
