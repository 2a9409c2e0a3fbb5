"""The eventfds between a virtio transport and KVM: notifications in, interrupts out. Layer: core."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.kvm.vm import VmFd


class Wires:
    """`kicks[i]` is signalled by a notification of queue i (ioeventfd), and writing to `call` interrupts (irqfd).

    They may outlive their transport, with the VM that they are connected to (core.spare). Who made them closes them.
    """

    def __init__(self, queues: int) -> None:
        self.kicks = [_eventfd() for _ in range(queues)]
        self.call = _eventfd()
        self._connected = self._kept = False

    def connect(self, vm: VmFd, gsi: int, notify: int) -> None:
        """Connect them to a VM: to GSI `gsi`, and to writes of a queue's number to GPA `notify`."""
        if self._kept:  # to this VM, for the last machine that had it
            self._kept = False
            return
        if self._connected:  # the old VM may not be closed yet (core.reaper), and an eventfd interrupts one VM only
            fresh = _eventfd()
            os.dup2(fresh, self.call, inheritable=False)  # the number is known to C
            os.close(fresh)
        self._connected = True
        vm.irqfd(self.call, gsi)
        for index, kick in enumerate(self.kicks):
            vm.ioeventfd(kick, notify, 4, match=index)

    def keep(self) -> None:
        """Forget signals: the next transport that has them finds itself connected to the VM that it gets."""
        self._kept = True
        for fd in (*self.kicks, self.call):
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                pass

    def close(self) -> None:
        """Close all; again does nothing."""
        fds, self.kicks, self.call = [*self.kicks, self.call], [], -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
