"""The common part of every KVM file descriptor. Layer: kvm."""

from __future__ import annotations

import errno
import os

from pykvm._native import ffi, lib
from pykvm.errors import KvmError, MachineStateError, MissingCapability

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from pykvm._native import CData

# What to do, where an errno of an ioctl has a known cause: (ioctl, errno) -> advice.
ADVICE = {
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is out of memory",
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor (VirtualBox, VMware) holds VT-x or AMD-V: unload its module",
    ("KVM_CREATE_VM", errno.EMFILE): "too many open files: raise `ulimit -n` or close machines",
    ("KVM_CREATE_VM", errno.EINVAL): "this KVM does not know the VM type that was asked for",
    ("KVM_CREATE_VCPU", errno.EMFILE): "too many open files: raise `ulimit -n` or close machines",
    ("KVM_CREATE_VCPU", errno.EEXIST): "this vCPU id exists already",
    ("KVM_CREATE_VCPU", errno.EINVAL): "the vCPU id is above KVM_CAP_MAX_VCPU_ID, or there are too many vCPUs",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the irqchip exists already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "create the irqchip before the first vCPU",
    ("KVM_CREATE_PIT2", errno.ENOENT): "the PIT needs the in-kernel irqchip first",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the slot overlaps another one",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "address, size or slot number is not valid (page-aligned? too many?)",
    ("KVM_IOEVENTFD", errno.EEXIST): "an ioeventfd with this address and datamatch exists already",
    ("KVM_IOEVENTFD", errno.ENOSPC): "the I/O bus of the VM is full",
    ("KVM_IRQFD", errno.EBUSY): "this eventfd is already bound to an interrupt",
    ("KVM_SET_CPUID2", errno.E2BIG): "too many CPUID entries",
    ("KVM_SET_SREGS", errno.EINVAL): "CR0, CR4 and EFER contradict each other",
    ("KVM_RUN", errno.EFAULT): "guest memory behind a memslot is gone (the file was truncated?)",
}  # fmt: skip


class Handle:
    """A file descriptor of KVM, owned by the process that opened it. Closes once; a context manager."""

    __slots__ = ("_pid", "fd", "issued")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.issued: set[str] = set()  # the names of the ioctls that succeeded; who cares clears it
        self._pid = os.getpid()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that opened it."""
        return os.getpid() != self._pid

    def ioctl(self, name: str, argument: CData = ffi.NULL) -> int:
        """Issue the ioctl called `name` with a pointer; its non-negative result, or KvmError."""
        return self._checked(name, lib.pk_ioctl(self.fd, _number(name), argument))

    def ioctl_value(self, name: str, value: int = 0) -> int:
        """Issue an ioctl that takes a number instead of a pointer."""
        return self._checked(name, lib.pk_ioctl_value(self.fd, _number(name), value))

    def _checked(self, name: str, result: int) -> int:
        if result >= 0:
            self.issued.add(name)
            return result
        if self.fd < 0:
            raise MachineStateError(f"{name}: the file descriptor is closed")
        if os.getpid() != self._pid:
            raise MachineStateError(
                f"{name}: this VM belongs to process {self._pid}; KVM does not let a forked child use it: "
                "create the machine after the fork, or use the spawn start method"
            )
        raise KvmError(name, -result, ADVICE.get((name, -result), ""))

    def check_owner(self) -> None:
        """Raise MachineStateError in a forked child, where every ioctl but close would fail with EIO."""
        if os.getpid() != self._pid:
            self._checked("KVM", -errno.EIO)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_numbers: dict[str, int] = {}


def _number(name: str) -> int:
    number = _numbers.get(name)
    if number is None:
        try:
            number = _numbers[name] = getattr(lib, name)
        except AttributeError:
            raise MissingCapability([name], "the kernel header that pykvm was compiled with lacks") from None
    return number


def constant(name: str) -> int:
    """The value of a KVM_* constant that an old kernel header may lack (then MissingCapability)."""
    return _number(name)
