"""The KVM side of a new machine, in the order that KVM wants. Layer: core.

TSS and identity map before vCPUs, the irqchip before vCPUs, the PIT after the irqchip, CPUID before MSRs. Memory slots
before the irqchip: after it each change of a slot waits for the kernel's grace period, some 7 ms instead of 0.4.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.errors import MissingCapability
from pykvm.kvm.vcpu import cpuid_table
from pykvm.x86 import layout
from pykvm.x86.cpuid import CpuidEntry, configure
from pykvm.x86.msrs import power_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm._native import CData
    from pykvm.config import MachineConfig
    from pykvm.core.memory import Slot
    from pykvm.core.vcpu import Vcpu
    from pykvm.kvm.system import Kvm
    from pykvm.kvm.vm import VmFd

REQUIRED = (
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_VCPU_EVENTS",
)
REQUIRED_FOR = {
    "kernel": ("KVM_CAP_IRQCHIP", "KVM_CAP_PIT2"),
    "split": ("KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_SIGNAL_MSI"),
    "none": (),
}


# GSI -> (irqchip, pin). KVM's default has GSI 0 at IOAPIC pin 0; on a PC, and in our ACPI and MP tables, the PIT's
# interrupt arrives at pin 2, and pin 0 is the 8259s' (MP specification 1.4, 5.3).
PC_ROUTES = [
    *((gsi, lib.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else lib.KVM_IRQCHIP_PIC_SLAVE, gsi % 8) for gsi in range(16)),
    *(
        (gsi, lib.KVM_IRQCHIP_IOAPIC, layout.PIT_PIN if gsi == layout.IRQ_PIT else gsi)
        for gsi in range(layout.IOAPIC_PINS)
        if gsi != layout.PIT_PIN
    ),
]


def create_vm(kvm: Kvm, config: MachineConfig, slots: Sequence[Slot]) -> VmFd:
    """A VM with its memory and irqchip; no vCPU yet. All missing capabilities are named in one error."""
    kvm.require((*REQUIRED, *REQUIRED_FOR[config.irqchip]))
    vm = kvm.create_vm()
    try:
        vm.set_identity_map_addr(layout.IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        for slot in slots:
            map_slot(vm, slot)
        if config.irqchip == "kernel":
            vm.create_irqchip()
            vm.set_gsi_routing(PC_ROUTES)
            if config.pit:
                vm.create_pit2(lib.KVM_PIT_SPEAKER_DUMMY)
        elif config.irqchip == "split":
            vm.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, layout.IOAPIC_PINS)
    except BaseException:
        vm.close()
        raise
    return vm


def map_slot(vm: VmFd, slot: Slot) -> None:
    """Tell KVM of a memory slot."""
    flags = lib.KVM_MEM_READONLY if slot.readonly else 0
    if slot.readonly and not vm.check_extension(lib.KVM_CAP_READONLY_MEM):
        raise MissingCapability(["KVM_CAP_READONLY_MEM"])
    vm.set_user_memory_region(slot.index, slot.gpa, slot.size, slot.hva, flags)


def coalesced_offset(vm: VmFd) -> int:
    """Where the coalesced ring is in the mapping of a vCPU; 0 where KVM has none (4.116)."""
    return vm.check_extension(lib.KVM_CAP_COALESCED_MMIO) * layout.PAGE_SIZE


def create_vcpus(vm: VmFd, kvm: Kvm, config: MachineConfig, vcpus: Sequence[Vcpu]) -> None:
    """Create KVM's vCPUs with CPUID and MSRs and connect the Vcpu objects to them."""
    coalesced = coalesced_offset(vm)
    deadline = bool(vm.check_extension(lib.KVM_CAP_TSC_DEADLINE_TIMER))
    msrs = dict(power_on(firmware=config.firmware))
    for vcpu in vcpus:
        fd = vm.create_vcpu(vcpu.index)
        try:
            vcpu.connect(fd, kvm.vcpu_mmap_size, coalesced)
        except BaseException:
            fd.close()
            raise
        vcpu.cpuid = _cpuid_table(kvm, config, vcpu.index, deadline, fd.get_tsc_khz())
        fd.set_cpuid_table(vcpu.cpuid)
        fd.set_msrs(msrs)
        if config.stats:
            lib.pk_vcpu_enable_stats(vcpu.state)


# A process makes thousands of machines of the same few shapes, and the table of a shape never changes.
_tables: dict[tuple[object, ...], CData] = {}
MAX_TABLES = 256


def host_cpuid(kvm: Kvm, config: MachineConfig) -> CData:
    """The table that the first vCPU of such a machine gets on this host, as far as features go."""
    deadline = bool(kvm.check_extension(lib.KVM_CAP_TSC_DEADLINE_TIMER))
    return _cpuid_table(kvm, config, 0, deadline, 0)


def _cpuid_table(kvm: Kvm, config: MachineConfig, index: int, deadline: bool, tsc_khz: int) -> CData:
    shape = (index, config.cpus, config.cpu_features, config.irqchip != "none", deadline, tsc_khz)
    table = _tables.get(shape)
    if table is not None and config.cpuid is None:
        return table
    entries = configure(
        [CpuidEntry(*entry) for entry in kvm.supported_cpuid()],
        vcpu_index=index,
        cpus=config.cpus,
        features=config.cpu_features,
        irqchip_in_kernel=config.irqchip != "none",
        tsc_deadline=deadline,
        tsc_khz=tsc_khz,
    )
    if config.cpuid is not None:
        config.cpuid(entries, index)
    table = cpuid_table([entry.fields() for entry in entries])
    if config.cpuid is None and len(_tables) < MAX_TABLES:
        _tables[shape] = table
    return table
