"""A VM: memory slots, interrupt controllers, routing, eventfds, dirty pages, clock. Layer: kvm.

One method per ioctl, in the order of the KVM API documentation's section 4; nothing is defaulted behind the caller's
back. Raises KvmError; MissingCapability where the header that pykvm was compiled with does not know the ioctl.
"""

from __future__ import annotations

import errno

from pykvm._native import ffi, lib
from pykvm.errors import KvmError
from pykvm.kvm.devicefd import DeviceFd
from pykvm.kvm.handle import Handle, constant
from pykvm.kvm.stats import read_stats
from pykvm.kvm.vcpu import VcpuFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm._native import CData
    from pykvm.kvm.system import Kvm


class VmFd(Handle):
    """An open VM (KVM_CREATE_VM)."""

    __slots__ = ("kvm",)

    def __init__(self, fd: int, kvm: Kvm) -> None:
        super().__init__(fd)
        self.kvm = kvm

    # -- capabilities -------------------------------------------------------------------------------------------

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM (4.4)."""
        return self.ioctl_value("KVM_CHECK_EXTENSION", capability)

    def enable_cap(self, capability: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP (4.37) with up to four arguments."""
        self.ioctl("KVM_ENABLE_CAP", _enable_cap(capability, args, flags))

    # -- memory -------------------------------------------------------------------------------------------------

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION (4.35); size 0 deletes the slot. flags: KVM_MEM_READONLY, _LOG_DIRTY_PAGES."""
        region = ffi.new("struct kvm_userspace_memory_region *", (slot, flags, gpa, size, hva))
        self.ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int,
        guest_memfd: int,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 (4.140), for slots with a guest_memfd."""
        constant("KVM_SET_USER_MEMORY_REGION2")
        region = ffi.new("struct kvm_userspace_memory_region2 *")
        region.slot, region.flags, region.guest_phys_addr = slot, flags, gpa
        region.memory_size, region.userspace_addr = size, hva
        region.guest_memfd, region.guest_memfd_offset = guest_memfd, guest_memfd_offset
        self.ioctl("KVM_SET_USER_MEMORY_REGION2", region)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD (4.142): a file descriptor of memory that only the guest can map."""
        constant("KVM_CREATE_GUEST_MEMFD")
        request = ffi.new("struct kvm_create_guest_memfd *")
        request.size, request.flags = size, flags
        return self.ioctl("KVM_CREATE_GUEST_MEMFD", request)

    def get_dirty_log(self, slot: int, pages: int) -> bytearray:
        """KVM_GET_DIRTY_LOG (4.8): one bit a page, rounded up to 64; reading clears it unless manual protect is on."""
        bitmap = bytearray((pages + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *")
        log.slot, log.dirty_bitmap = slot, ffi.from_buffer(bitmap)
        self.ioctl("KVM_GET_DIRTY_LOG", log)
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytearray) -> None:
        """KVM_CLEAR_DIRTY_LOG (4.117): re-protects the pages set in `bitmap`. first_page is a multiple of 64."""
        request = ffi.new("struct kvm_clear_dirty_log *")
        request.slot, request.first_page, request.num_pages = slot, first_page, pages
        request.dirty_bitmap = ffi.from_buffer(bitmap)
        self.ioctl("KVM_CLEAR_DIRTY_LOG", request)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (4.137 is the capability's text, 8.29): how many entries were collected."""
        return self.ioctl_value("KVM_RESET_DIRTY_RINGS")

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR (4.33): three pages for VMX without unrestricted guest."""
        self.ioctl_value("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (4.39): one page; before the first vCPU."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    # -- interrupts ---------------------------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (4.24): two 8259, an IOAPIC, and a local APIC for every vCPU."""
        self.ioctl_value("KVM_CREATE_IRQCHIP")

    def get_irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP (4.26): the raw struct kvm_irqchip of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        state = ffi.new("struct kvm_irqchip *")
        state.chip_id = chip
        self.ioctl("KVM_GET_IRQCHIP", state)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, state: bytes) -> None:
        """KVM_SET_IRQCHIP (4.27) from what get_irqchip gave."""
        self.ioctl("KVM_SET_IRQCHIP", _raw("struct kvm_irqchip", state))

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2 (4.71); flags: KVM_PIT_SPEAKER_DUMMY to have port 0x61 emulated too."""
        config = ffi.new("struct kvm_pit_config *")
        config.flags = flags
        self.ioctl("KVM_CREATE_PIT2", config)

    def get_pit2(self) -> bytes:
        """KVM_GET_PIT2 (4.72): the raw struct kvm_pit_state2."""
        state = ffi.new("struct kvm_pit_state2 *")
        self.ioctl("KVM_GET_PIT2", state)
        return bytes(ffi.buffer(state))

    def set_pit2(self, state: bytes) -> None:
        """KVM_SET_PIT2 (4.73)."""
        self.ioctl("KVM_SET_PIT2", _raw("struct kvm_pit_state2", state))

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE (4.25): drive a GSI of the in-kernel irqchip."""
        request = ffi.new("struct kvm_irq_level *")
        request.irq, request.level = gsi, level
        self.ioctl("KVM_IRQ_LINE", request)

    def set_gsi_routing(self, routes: Sequence[tuple[int, ...]]) -> None:
        """KVM_SET_GSI_ROUTING (4.52): replaces all. (gsi, chip, pin) or (gsi, address_lo, address_hi, data)."""
        table = ffi.new("struct kvm_irq_routing *", {"entries": len(routes)})
        table.nr = len(routes)
        for i, route in enumerate(routes):
            entry = table.entries[i]
            entry.gsi = route[0]
            if len(route) == 3:
                entry.type = lib.KVM_IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip, entry.u.irqchip.pin = route[1], route[2]
            else:
                entry.type = lib.KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = route[1:4]
        self.ioctl("KVM_SET_GSI_ROUTING", table)

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD (4.75): an eventfd raises `gsi`; with resample_fd a level line, which is told of each EOI."""
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi = fd, gsi
        if resample_fd is not None:
            request.flags |= lib.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = resample_fd
        if deassign:
            request.flags |= lib.KVM_IRQFD_FLAG_DEASSIGN
        self.ioctl("KVM_IRQFD", request)

    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int,
        *,
        port: bool = False,
        match: int | None = None,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD (4.59): a guest write of `length` bytes (0: any) at a port or GPA signals the eventfd.

        With `match` only writes of that value do.
        """
        request = ffi.new("struct kvm_ioeventfd *")
        request.fd, request.addr, request.len = fd, address, length
        if port:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if match is not None:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = match
        if deassign:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self.ioctl("KVM_IOEVENTFD", request)

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI (4.70): whether a local APIC took it."""
        request = ffi.new("struct kvm_msi *")
        request.address_lo, request.address_hi, request.data = address & 0xFFFFFFFF, address >> 32, data
        try:
            return self.ioctl("KVM_SIGNAL_MSI", request) > 0
        except KvmError as error:
            if error.errno == errno.EPERM:  # -1 from the kernel: no local APIC has this destination
                return False
            raise

    def register_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO (4.116): writes to the zone are batched in the ring."""
        self.ioctl("KVM_REGISTER_COALESCED_MMIO", _zone(address, size, port))

    def unregister_coalesced(self, address: int, size: int, *, port: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO (4.116)."""
        self.ioctl("KVM_UNREGISTER_COALESCED_MMIO", _zone(address, size, port))

    # -- the rest -----------------------------------------------------------------------------------------------

    def get_clock(self) -> tuple[int, int]:
        """KVM_GET_CLOCK (4.29): (kvmclock in ns, flags)."""
        data = ffi.new("struct kvm_clock_data *")
        self.ioctl("KVM_GET_CLOCK", data)
        return data.clock, data.flags

    def set_clock(self, nanoseconds: int, flags: int = 0) -> None:
        """KVM_SET_CLOCK (4.30)."""
        data = ffi.new("struct kvm_clock_data *")
        data.clock, data.flags = nanoseconds, flags
        self.ioctl("KVM_SET_CLOCK", data)

    def set_msr_filter(self, ranges: Sequence[tuple[int, int, int, bytes]], *, default_allow: bool) -> None:
        """KVM_X86_SET_MSR_FILTER (4.97): ranges of (flags, base, count, bitmap); a 1 bit allows."""
        request = ffi.new("struct kvm_msr_filter *")
        if not default_allow:
            request.flags = lib.KVM_MSR_FILTER_DEFAULT_DENY
        keep = []
        for i, (flags, base, count, bitmap) in enumerate(ranges):
            bits = ffi.new("uint8_t[]", bitmap)
            keep.append(bits)
            entry = request.ranges[i]
            entry.flags, entry.base, entry.nmsrs, entry.bitmap = flags, base, count, bits
        self.ioctl("KVM_X86_SET_MSR_FILTER", request)

    def create_device(self, device_type: int, *, test: bool = False) -> DeviceFd | None:
        """KVM_CREATE_DEVICE (4.79); with `test` only asks whether the type exists (then None)."""
        request = ffi.new("struct kvm_create_device *")
        request.type = device_type
        request.flags = lib.KVM_CREATE_DEVICE_TEST if test else 0
        self.ioctl("KVM_CREATE_DEVICE", request)
        return None if test else DeviceFd(request.fd)

    def stats(self) -> dict[str, int | list[int]]:
        """KVM_GET_STATS_FD (4.133): the VM's binary statistics by name."""
        return read_stats(self.ioctl_value("KVM_GET_STATS_FD"))

    def create_vcpu(self, vcpu_id: int) -> VcpuFd:
        """KVM_CREATE_VCPU (4.7); the id is the vCPU's APIC id."""
        while True:
            try:
                fd = self.ioctl_value("KVM_CREATE_VCPU", vcpu_id)
            except KvmError as error:
                if error.errno != errno.EINTR:
                    raise
                continue
            return VcpuFd(fd, vcpu_id)


def _enable_cap(capability: int, args: Sequence[int], flags: int) -> CData:
    request = ffi.new("struct kvm_enable_cap *")
    request.cap, request.flags = capability, flags
    for i, value in enumerate(args):
        request.args[i] = value
    return request


def _zone(address: int, size: int, port: bool) -> CData:
    zone = ffi.new("struct kvm_coalesced_mmio_zone *")
    zone.addr, zone.size, zone.pio = address, size, port
    return zone


def _raw(struct: str, data: bytes) -> CData:
    size = ffi.sizeof(struct)
    if len(data) != size:
        raise ValueError(f"{struct} takes {size} bytes, not {len(data)}")
    state = ffi.new(f"{struct} *")
    ffi.memmove(state, data, size)
    return state
