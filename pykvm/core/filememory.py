"""A file of the host as guest memory, and what happens when a page of it is gone. Layer: core; loaded by virtio-pmem.

The kernel takes pages of a mapped file away when the file is cut short, its disk fails, or no space is left for them.
The guest's access then ends KVM_RUN with EFAULT, or comes out as MMIO where KVM emulates the instruction. An access of
pykvm's own, a device's or a report's, would be SIGBUS: C puts an empty page there and says so by an eventfd. Either way
the machine is over.
"""

from __future__ import annotations

import os

from pykvm._native import ffi, lib
from pykvm.core.device import Device
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.memory import GuestMemory
    from pykvm.core.outcome import Outcome

PAGE_SIZE = 4096


class FileMemory:
    """`size` bytes of guest memory at `gpa`: the open file `fd`, and zeros behind its end.

    With `readonly` the guest cannot write them, as a ROM. Raises ConfigError for a file that cannot be mapped.
    """

    def __init__(self, memory: GuestMemory, gpa: int, size: int, fd: int, path: str, *, readonly: bool) -> None:
        self.path = path
        self.fd = fd
        self.readonly = readonly
        self.length = os.lseek(fd, 0, os.SEEK_END)
        self.event = -1
        self._guard = -1
        self.slot = memory.add(gpa, size, name="pmem", readonly=readonly, frozen=True)
        try:
            self._map()
        except BaseException:
            memory.remove(self.slot)
            self.release()
            raise
        self.slot.file = self

    def _map(self) -> None:
        address = ffi.cast("void *", self.slot.hva)
        mapped = (self.length + PAGE_SIZE - 1) & -PAGE_SIZE
        if self.readonly:  # a debugger may write it nevertheless: that is this machine's own then
            result = lib.pk_map_private(address, mapped, self.fd, 0)
        else:
            result = lib.pk_map_shared(address, mapped, self.fd)
        if result == 0:
            self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            result = self._guard = lib.pk_guard(address, self.slot.size, self.event)
        if result < 0:
            raise ConfigError("pmem", f"{self.path} cannot be mapped as memory: {os.strerror(-result)}")

    def damage(self) -> str:
        """Why a page of it is not there, for a user."""
        length = os.lseek(self.fd, 0, os.SEEK_END)
        if length < self.length:
            return f"{self.path} was cut from {self.length} to {length} bytes while the guest had it as memory"
        return f"a page of {self.path}, which the guest has as memory, cannot be had: no space left, or an I/O error"

    def release(self) -> None:
        """The slot is about to be unmapped."""
        if self._guard >= 0:
            lib.pk_unguard(self._guard)
            self._guard = -1
        if self.event >= 0:
            os.close(self.event)
            self.event = -1


class FileWindow(Device):
    """Answers accesses to the same addresses that do not reach the memory: writes to a ROM, and pages that are gone."""

    shape = None  # nothing of it is in a snapshot

    def __init__(self, file: FileMemory, fail: Callable[[str], object]) -> None:
        self.name = f"pmem {file.path}"
        self._file = file
        self._fail = fail

    def read(self, offset: int, size: int) -> int:
        """Memory is read without an exit, as long as it is there."""
        self._fail(self._file.damage())
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """Lost, on a ROM."""
        if not self._file.readonly:
            self._fail(self._file.damage())
        return None
