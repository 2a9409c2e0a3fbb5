"""What a loader gets and what it gives back. Layer: boot.

A loader is a function `load_x(memory, image, options) -> Boot`: bytes of one file into guest memory, plus the state
of the first CPU. It touches no vCPU and no device, so every loader is testable without /dev/kvm.
"""

from __future__ import annotations

import os

from pykvm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.x86.segments import CpuState

# e820 types (ACPI 15.4)
E820_RAM, E820_RESERVED, E820_ACPI, E820_NVS = 1, 2, 3, 4

MAX_IMAGE_SIZE = 4 << 30  # a file larger than this is no kernel: refuse before reading it


class ImageFile:
    """A file to load: its path for messages and its bytes. Reads regular files only, and once."""

    __slots__ = ("data", "path")

    def __init__(self, path: str | os.PathLike[str], data: bytes | None = None) -> None:
        self.path = os.fspath(path)
        self.data: bytes = self._read() if data is None else data

    def _read(self) -> bytes:
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(self.path, f"cannot open: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if status.st_mode & 0o170000 != 0o100000:
                raise ImageError(self.path, "is not a regular file")
            if status.st_size > MAX_IMAGE_SIZE:
                raise ImageError(self.path, f"is too large for a kernel ({status.st_size} bytes)")
            # not before the checks: open() itself refuses a directory
            with open(fd, "rb", buffering=0, closefd=False) as file:
                return file.readall()
        except OSError as error:
            raise ImageError(self.path, f"cannot read: {error.strerror}") from error
        finally:
            os.close(fd)

    def error(self, reason: str) -> ImageError:
        """An ImageError that names this file."""
        return ImageError(self.path, reason)


class Module:
    """A boot module: its file and its own command line."""

    __slots__ = ("cmdline", "image")

    def __init__(self, image: ImageFile, cmdline: str = "") -> None:
        self.image = image
        self.cmdline = cmdline


class BootOptions:
    """What the user (or the board) asks of a loader. None means: what the protocol's own rules say.

    mode        real, protected or long, for flat images
    entry       entry point: GPA for flat protected/long images, IP offset for real mode; overrides an ELF's entry
    load_addr   GPA of a flat image
    cmdline     kernel command line (str, encoded as UTF-8)
    initrd      initial RAM disk; for multiboot it is the first module
    modules     multiboot modules in order
    e820        (base, size, type) of the whole machine, sorted, not overlapping
    rsdp        GPA of the ACPI RSDP, 0 if there is none
    unpack      boot a bzImage's payload directly where possible
    """

    __slots__ = ("cmdline", "e820", "entry", "initrd", "load_addr", "mode", "modules", "rsdp", "unpack")

    def __init__(
        self,
        *,
        mode: str | None = None,
        entry: int | None = None,
        load_addr: int | None = None,
        cmdline: str = "",
        initrd: ImageFile | None = None,
        modules: Sequence[Module] = (),
        e820: Sequence[tuple[int, int, int]] = (),
        rsdp: int = 0,
        unpack: bool = True,
    ) -> None:
        self.mode = mode
        self.entry = entry
        self.load_addr = load_addr
        self.cmdline = cmdline
        self.initrd = initrd
        self.modules = tuple(modules)
        self.e820 = tuple(e820)
        self.rsdp = rsdp
        self.unpack = unpack


class Boot:
    """A loaded guest: the protocol that was used, the first CPU's state, and the entry point's GPA."""

    __slots__ = ("entry", "path", "protocol", "state")

    def __init__(self, protocol: str, path: str, entry: int, state: CpuState) -> None:
        self.protocol = protocol
        self.path = path
        self.entry = entry
        self.state = state

    def __repr__(self) -> str:
        return f"<Boot {self.protocol} {self.path} entry {self.entry:#x}>"
