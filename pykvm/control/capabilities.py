"""The KVM capabilities that pykvm uses, and what each is for. Layer: control, plain data.

Source: KVM API documentation, the section of each capability.
"""

from __future__ import annotations

from pykvm.core.vmsetup import REQUIRED, REQUIRED_FOR

# name without KVM_CAP_ -> what it is for
PURPOSES = {
    "USER_MEMORY": "guest memory",
    "READONLY_MEM": "firmware",
    "GUEST_MEMFD": "memory that only the guest can map",
    "NR_MEMSLOTS": "largest number of memory slots",
    "IMMEDIATE_EXIT": "kicks that are never lost",
    "NR_VCPUS": "recommended number of vCPUs",
    "MAX_VCPUS": "largest number of vCPUs",
    "EXT_CPUID": "CPUID of the guest",
    "MP_STATE": "halted vCPUs",
    "VCPU_EVENTS": "pending exceptions and NMIs",
    "SYNC_REGS": "registers without an ioctl",
    "XCRS": "XCR0 in snapshots",
    "XSAVE": "vector registers in snapshots",
    "XSAVE2": "AMX registers in snapshots",
    "DEBUGREGS": "debug registers in snapshots",
    "NESTED_STATE": "snapshots of guests that run guests",
    "IRQCHIP": "in-kernel interrupt controllers",
    "SPLIT_IRQCHIP": "--irqchip split",
    "PIT2": "in-kernel timer",
    "SIGNAL_MSI": "MSI interrupts",
    "IRQFD": "interrupts from other processes",
    "IRQFD_RESAMPLE": "level-triggered irqfd",
    "IOEVENTFD": "doorbells without an exit",
    "IOEVENTFD_ANY_LENGTH": "doorbells of any width",
    "COALESCED_MMIO": "batched MMIO writes",
    "COALESCED_PIO": "batched port writes",
    "TSC_DEADLINE_TIMER": "the guest's TSC deadline timer",
    "GET_TSC_KHZ": "telling the guest its TSC frequency",
    "TSC_CONTROL": "a TSC frequency other than the host's",
    "ADJUST_CLOCK": "kvmclock over a snapshot",
    "KVMCLOCK_CTRL": "telling the guest that it was paused",
    "X86_USER_SPACE_MSR": "MSR hooks",
    "X86_MSR_FILTER": "hooks for MSRs that KVM knows",
    "XEN_HVM": "hypercall hooks",
    "SET_GUEST_DEBUG": "breakpoints and single steps",
    "MANUAL_DIRTY_LOG_PROTECT2": "dirty pages, cleared piecemeal",
    "BINARY_STATS_FD": "KVM's own statistics",
}

# What brings a missing one, where that is known; the others depend on the backend alone
REMEDIES = {
    "NESTED_STATE": "load kvm_intel or kvm_amd with nested=1",
    "XEN_HVM": "use a kernel with CONFIG_KVM_XEN",
    "TSC_CONTROL": "needs a CPU with TSC scaling, and VT-x or AMD-V",
    "X86_USER_SPACE_MSR": "needs Linux 5.10 or later",
    "X86_MSR_FILTER": "needs Linux 5.10 or later",
    "XSAVE2": "needs Linux 5.17 or later",
    "MANUAL_DIRTY_LOG_PROTECT2": "needs Linux 5.2 or later",
    "BINARY_STATS_FD": "needs Linux 5.14 or later",
    "GUEST_MEMFD": "needs Linux 6.8 or later",
}

# Without these nothing runs, or not the default irqchip
NEEDED = frozenset(name.removeprefix("KVM_CAP_") for name in (*REQUIRED, *REQUIRED_FOR["kernel"]))


class Capability:
    """One capability: its `value` on this host (0: absent; None: the header pykvm was built with does not know it)."""

    __slots__ = ("name", "needed", "purpose", "value")

    def __init__(self, name: str, value: int | None) -> None:
        self.name = name
        self.value = value
        self.purpose = PURPOSES[name]
        self.needed = name in NEEDED

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "name": f"KVM_CAP_{self.name}",
            "value": self.value,
            "purpose": self.purpose,
            "needed": self.needed,
            "advice": self.advice,
        }

    @property
    def advice(self) -> str:
        """What to do when it is missing; empty if it is there."""
        if self.value:
            return ""
        if self.value is None:
            return "build pykvm with newer kernel headers (Debian: linux-libc-dev)"
        return REMEDIES.get(self.name, "this host's KVM does not have it")
