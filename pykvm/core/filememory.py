"""Files of the host as guest memory, and what happens when a page of one is gone. Layer: core; loaded when needed.

The kernel takes pages of a mapped file away when the file is cut short, its disk fails, or no space is left for them.
The guest's access then ends KVM_RUN with EFAULT, or comes out as MMIO where KVM emulates the instruction. An access of
pykvm's own, a device's or a report's, would be SIGBUS: C puts an empty page there and says so by an eventfd. Either way
the machine is over.
"""

from __future__ import annotations

import os

from pykvm._native import ffi, lib
from pykvm.core.memory import PAGE_SIZE
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.core.memory import GuestMemory, Slot


class FileGuard:
    """Watches over the slot at `hva`, in which files are mapped.

    files   (fd, bytes from its start that are mapped) of each
    event   an eventfd: an access of this process found nothing. The slot's memory is not what it was
    """

    def __init__(self, hva: int, size: int) -> None:
        self.files: list[tuple[int, int]] = []
        self._hit = False
        self.event = -1
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._number = lib.pk_guard(ffi.cast("void *", hva), size, event)
        if self._number < 0:
            os.close(event)
            raise ConfigError("memory", f"cannot watch mapped files: {os.strerror(-self._number)}")
        self.event = event

    def hit(self) -> bool:
        """Whether an access of this process has found nothing, ever."""
        try:
            self._hit = os.eventfd_read(self.event) > 0
        except BlockingIOError:
            pass
        return self._hit

    def damage(self, *, seen: bool = False) -> str:
        """Why a page of it is not there, for a user; with `seen` only what can be seen of it. "" for nothing."""
        for fd, end in self.files:
            length = os.fstat(fd).st_size
            if length < end and os.lseek(fd, 0, os.SEEK_END) < end:  # a block device has no st_size
                return f"{_name(fd)} was cut to {length} bytes while {end} were in use as the guest's memory"
        if seen or not self.files:
            return ""
        names = " or ".join(sorted({_name(fd) for fd, _ in self.files}))
        return f"a page of {names}, which is the guest's memory, cannot be had: no space left, or an I/O error"

    def release(self) -> None:
        """The slot is about to be unmapped."""
        if self.event >= 0:
            lib.pk_unguard(self._number)
            os.close(self.event)
            self.event = -1

    def __del__(self) -> None:
        self.release()


def _name(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "a file"


def map_file(memory: GuestMemory, gpa: int, size: int, fd: int, *, readonly: bool, name: str) -> Slot:
    """A slot of `size` bytes at `gpa` that is the open file `fd`, which outlives it, and zeros behind the file's end.

    With `readonly` the guest cannot write it, as a ROM. Raises ConfigError for a file that cannot be mapped.
    """
    slot = memory.add(gpa, size, name=name, readonly=readonly, frozen=True)
    address, length = ffi.cast("void *", slot.hva), os.lseek(fd, 0, os.SEEK_END)
    mapped = (length + PAGE_SIZE - 1) & -PAGE_SIZE
    # a debugger may write a read-only one nevertheless: that is this machine's own then
    result = lib.pk_map_private(address, mapped, fd, 0) if readonly else lib.pk_map_shared(address, mapped, fd)
    try:
        if result < 0:
            raise ConfigError(name, f"{_name(fd)} cannot be mapped as memory: {os.strerror(-result)}")
        slot.file_fd = fd
        watch(slot, [(fd, length)])
    except BaseException:
        memory.remove(slot)
        raise
    return slot


def watch(slot: Slot, files: Iterable[tuple[int, int]]) -> None:
    """These files, as in FileGuard, are what is mapped in the slot now."""
    if slot.guard is None:
        slot.guard = FileGuard(slot.hva, slot.size)
    slot.guard.files = [*files]
