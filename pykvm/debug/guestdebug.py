"""KVM's guest debugging of one vCPU: single steps and the four debug registers. Layer: debug.

Source: KVM API documentation, 4.87 KVM_SET_GUEST_DEBUG; debug registers: Intel SDM vol. 3B, 17.2.
"""

from __future__ import annotations

from pykvm._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.vcpu import Vcpu

SLOTS = 4
DR6_STEP = 1 << 14  # BS
DR6_SLOTS = (1 << SLOTS) - 1  # B0 to B3

# DR7: R/Wn and LENn
EXECUTE, WRITE, ACCESS = 0, 1, 3
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


class DebugRegister:
    """What one of DR0 to DR3 watches: `length` bytes at the linear address, `kind` EXECUTE, WRITE or ACCESS.

    A processor has no kind for reads alone. `length` is 1, 2, 4 or 8, the address a multiple of it.
    """

    __slots__ = ("address", "kind", "length")

    def __init__(self, address: int, kind: int = EXECUTE, length: int = 1) -> None:
        self.address = address
        self.kind = kind
        self.length = length


Slots = list["DebugRegister | None"]


def dr7_of(slots: Slots) -> int:
    """DR7 with the used ones of `slots` enabled globally (SDM vol. 3B 17.2.4)."""
    value = 1 << 10  # reads as 1
    for index, slot in enumerate(slots):
        if slot is not None:
            value |= 2 << 2 * index | (slot.kind | _LENGTHS[slot.length] << 2) << (16 + 4 * index)
    return value


class GuestDebug:
    """What one vCPU is being debugged with; `apply` tells KVM. Call it on the vCPU's thread, or while it is paused.

    stepping   stop after the next instruction
    suspended  these slots are off here though the machine has them on: the vCPU steps over their address
    """

    __slots__ = ("_applied", "block_irq", "stepping", "suspended", "vcpu")

    def __init__(self, vcpu: Vcpu, block_irq: bool) -> None:
        self.vcpu = vcpu
        self.block_irq = block_irq
        self.stepping = False
        self.suspended: frozenset[int] = frozenset()
        self._applied: tuple[int, ...] | None = None

    def apply(self, slots: Slots, software: bool) -> None:
        """Set the machine's four `slots`, and with `software` the interception of INT3; only if that changes KVM."""
        here = [None if index in self.suspended else slot for index, slot in enumerate(slots)]
        control = 0
        if software:
            control |= lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_SW_BP
        if any(slot is not None for slot in here):
            control |= lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
        if self.stepping:
            control |= lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
            if self.block_irq:  # or a pending interrupt's handler would be what is stepped into
                control |= lib.KVM_GUESTDBG_BLOCKIRQ
        registers = [0 if slot is None else slot.address for slot in here] + [0, 0, 0, dr7_of(here)]
        wanted = (control, *registers)
        if wanted != self._applied:
            self.vcpu.fd.set_guest_debug(control, registers)
            self._applied = wanted

    def forget(self) -> None:
        """The KVM vCPU is another one now (after a reset): it is not debugged at all yet."""
        self._applied = None
        self.stepping = False
        self.suspended = frozenset()

    def inject(self, control: int) -> None:
        """Give an exception that was the guest's own business back to it (KVM_GUESTDBG_INJECT_BP or _INJECT_DB)."""
        if self._applied is None:
            return
        self.vcpu.fd.set_guest_debug(self._applied[0] | control, self._applied[1:])
