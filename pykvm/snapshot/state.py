"""A snapshot: everything that a machine needs to go on. Layer: live objects."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.machine import Machine
    from pykvm.core.memimage import SlotImage
    from pykvm.core.spare import Spare
    from pykvm.core.state import State
    from pykvm.snapshot.cpu import VcpuCalls, VmCalls


class Part:
    """The saved state of one component, and the version of its shape."""

    __slots__ = ("state", "version")

    def __init__(self, version: int, state: State) -> None:
        self.version = version
        self.state = state


class Snapshot:
    """A machine at one moment; immutable. Any number of machines may be forked from it or restored to it.

    `id` is unique. Memory and file descriptors are released when neither a machine nor the caller refers to it.
    """

    def __init__(
        self,
        *,
        vcpus: Sequence[Part],
        vm: Part,
        devices: dict[str, Part],
        memory: Sequence[SlotImage],
        identity: str | None = None,
    ) -> None:
        self.id = identity or os.urandom(16).hex()
        self.vcpus = tuple(vcpus)
        self.vm = vm
        self.devices = devices
        self.memory = tuple(memory)
        self.checked = identity is None  # taken by this process: nobody made it up
        self.file: tuple[str, int] | None = None  # where it is saved, and the checksum of the state there
        self._spares: list[Spare] = []
        self._calls: tuple[VmCalls, list[VcpuCalls]] | None = None

    def calls(self) -> tuple[VmCalls, list[VcpuCalls]]:
        """What restores the VM and each vCPU, prepared once."""
        if self._calls is None:
            from pykvm.snapshot.cpu import VcpuCalls, VmCalls

            self._calls = VmCalls(self.vm.state), [VcpuCalls(part.state) for part in self.vcpus]
        return self._calls

    # -- what closed forks leave to the next one: core.spare --------------------------------------------------------

    def take_spare(self, machine: Machine) -> Spare | None:
        """What a fork of this machine can use, if there is any."""
        for spare in list(self._spares):
            if spare.fits(machine):
                try:
                    self._spares.remove(spare)
                except ValueError:  # another thread was faster
                    continue
                return spare
        return None

    def keep_spare(self, machine: Machine) -> bool:
        """Take memory, VM and vCPUs of a fork that closes; whether it had anything to give, and there was room."""
        from pykvm.core.spare import MAX_SPARES, park

        spare = park(machine, self.memory) if len(self._spares) < MAX_SPARES else None
        if spare is None:
            return False
        self._spares.append(spare)
        return True

    @property
    def size(self) -> int:
        """Bytes of guest memory that it describes."""
        return sum(image.size for image in self.memory)

    def __repr__(self) -> str:
        return f"<Snapshot {self.id[:8]} of {self.size >> 20} MiB, {len(self.vcpus)} vCPUs>"
