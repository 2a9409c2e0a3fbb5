"""The binding against the real KVM: /dev/kvm itself and the VM's ioctls, each with a look at its effect."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

import pytest
from realmode import CLI_HLT, HLT, STI_HLT, machine, mov_al, out_al

from pykvm import Device, Kvm, KvmError, KvmUnavailable, Machine, MachineStateError, MissingCapability, Outcome
from pykvm._native import ffi, lib
from pykvm.core.memory import GuestMemory
from pykvm.kvm.vm import VmFd

PAGE = 4096
SYSENTER_CS = 0x174
# struct kvm_irqchip: chip_id and padding, then the chip. struct kvm_pic_state: last_irr, irr, imr, isr, ...
PIC_LAST_IRR, PIC_IRR, PIC_IMR = 8, 9, 10
KVM_DEV_VFIO_FILE = 1  # <linux/kvm.h>: an enum of the VFIO device's attribute groups


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm."""
    with Kvm() as device:
        yield device


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[VmFd]:
    """A new VM without anything."""
    with kvm.create_vm() as handle:
        yield handle


@pytest.fixture
def ram() -> Iterator[GuestMemory]:
    """64 KiB at 0 and at 1 MiB that no VM knows yet."""
    memory = GuestMemory()
    memory.add(0, 16 * PAGE)
    memory.add(1 << 20, 16 * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    """An eventfd."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def need(vm: VmFd, name: str) -> int:
    """The value of a capability; skips the test where it is absent."""
    if not hasattr(lib, name):
        pytest.skip(f"the kernel header that pykvm was compiled with lacks {name}")
    value = vm.check_extension(getattr(lib, name))
    if not value:
        pytest.skip(f"no {name} on this host")
    return value


def refused(error: pytest.ExceptionInfo[KvmError]) -> tuple[str, int]:
    """(ioctl, errno) of what was raised."""
    return error.value.ioctl, error.value.errno


def signalled(eventfd: int, timeout_s: float = 10.0) -> bool:
    """Whether an eventfd is signalled within the time; its counter is reset."""
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return False
    os.eventfd_read(eventfd)
    return True


# -- /dev/kvm --------------------------------------------------------------------------------------------------


def test_version_and_extensions(kvm: Kvm) -> None:
    """The API is version 12; a capability has a value, a number that means nothing has 0."""
    assert kvm.api_version() == 12
    assert kvm.vcpu_mmap_size >= PAGE
    assert kvm.check_extension(lib.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(lib.KVM_CAP_NR_MEMSLOTS) > 8
    assert kvm.check_extension(0x7FFFFFFF) == 0


def test_require_names_all_that_is_missing(kvm: Kvm) -> None:
    """One error for all missing capabilities; none when all are there."""
    kvm.require(["KVM_CAP_USER_MEMORY", "KVM_CAP_IMMEDIATE_EXIT"])
    with pytest.raises(MissingCapability) as error:
        kvm.require(["KVM_CAP_NO_SUCH", "KVM_CAP_USER_MEMORY", "KVM_CAP_NOR_THIS"])
    assert error.value.names == ("KVM_CAP_NO_SUCH", "KVM_CAP_NOR_THIS")


def test_supported_cpuid(kvm: Kvm) -> None:
    """The basic leaves are there, with the vendor in leaf 0, and KVM's own."""
    leaves = {entry[0]: entry for entry in kvm.supported_cpuid()}
    assert leaves.keys() >= {0, 1, 7, 0x40000000, 0x80000000, 0x80000008}
    vendor = b"".join(leaves[0][i].to_bytes(4, "little") for i in (4, 6, 5))
    assert vendor in (b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine", b"CentaurHauls", b"  Shanghai  ")
    assert kvm.supported_cpuid() == kvm.supported_cpuid()
    assert all(len(entry) == 7 for entry in kvm.emulated_cpuid())


def test_msr_lists(kvm: Kvm) -> None:
    """The MSRs to save include the SYSENTER ones; every feature MSR can be read."""
    assert {SYSENTER_CS, 0xC0000081} <= set(kvm.msr_indices())
    indices = kvm.msr_feature_indices()
    assert set(kvm.feature_msrs(indices)) <= set(indices)
    assert len(kvm.feature_msrs(indices[:2])) == len(indices[:2])


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/nonexistent", "absent"), ("/dev/null", "other"), ("/", "other"), ("/dev/null/x", "other")],
)
def test_unusable_devices(path: str, reason: str) -> None:
    """What is no KVM says why not, and names the path."""
    with pytest.raises(KvmUnavailable) as error:
        Kvm(path)
    assert error.value.reason == reason
    assert path in str(error.value)


def test_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM that speaks another API is refused, and closed."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(Kvm, "api_version", lambda self: 11)
    with pytest.raises(KvmUnavailable) as error:
        Kvm()
    assert error.value.reason == "version"
    assert len(os.listdir("/proc/self/fd")) == before


def test_create_vm_tries_again_after_eintr(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during KVM_CREATE_VM is no error."""
    answers = [KvmError("KVM_CREATE_VM", errno.EINTR)] * 3
    ioctl = Kvm.ioctl_value

    def interrupted(self: Kvm, name: str, value: int = 0) -> int:
        if name == "KVM_CREATE_VM" and answers:
            raise answers.pop()
        return ioctl(self, name, value)

    monkeypatch.setattr(Kvm, "ioctl_value", interrupted)
    with kvm.create_vm() as vm:
        assert vm.fd >= 0 and not answers


def test_errors_say_what_and_what_to_do(kvm: Kvm) -> None:
    """A refused ioctl has its name, its errno and, where it is known, advice."""
    with pytest.raises(KvmError) as error:
        kvm.create_vm(12345)
    assert refused(error) == ("KVM_CREATE_VM", errno.EINVAL)
    assert error.value.advice and error.value.advice in str(error.value)


def test_closed_handles(kvm: Kvm) -> None:
    """A closed handle says so; closing twice is fine."""
    vm = kvm.create_vm()
    vm.close()
    vm.close()
    with pytest.raises(MachineStateError, match="closed"):
        vm.check_extension(lib.KVM_CAP_IRQCHIP)


# -- memory ----------------------------------------------------------------------------------------------------


def test_memory_regions(vm: VmFd, ram: GuestMemory) -> None:
    """Slots can be set, moved away and set again; overlapping or crooked ones are refused with advice."""
    low, high = ram.slots
    vm.set_user_memory_region(0, 0, low.size, low.hva)
    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region(1, low.size - PAGE, high.size, high.hva)
    assert refused(error) == ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST)
    assert "overlaps" in error.value.advice
    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region(1, 100, high.size, high.hva)
    assert refused(error) == ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL)
    vm.set_user_memory_region(0, 0, 0, low.hva)
    vm.set_user_memory_region(1, low.size - PAGE, high.size, high.hva)


def test_memory_region_2() -> None:
    """KVM_SET_USER_MEMORY_REGION2 maps ordinary memory as well: the guest reads what is there."""
    # mov $0x3000, %ax; mov %ax, %ds; mov 0, %al; hlt
    with machine(b"\xb8\x00\x30\x8e\xd8\xa0\x00\x00\xf4", memory="64K") as vm:
        need(vm.vm, "KVM_CAP_USER_MEMORY2")
        extra = vm.memory.add(0x30000, PAGE, name="extra")
        vm.memory[0x30000] = 0x5A
        vm.vm.set_user_memory_region2(extra.index, extra.gpa, extra.size, extra.hva, 0, 0)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert vm.vcpus[0].regs.rax & 0xFF == 0x5A


@pytest.mark.skipif(hasattr(lib, "KVM_SET_USER_MEMORY_REGION2"), reason="the kernel header knows them")
def test_ioctls_that_the_header_lacks(vm: VmFd) -> None:
    """Compiled with an old header, the newer ioctls say what is missing."""
    with pytest.raises(MissingCapability, match="KVM_SET_USER_MEMORY_REGION2"):
        vm.set_user_memory_region2(0, 0, PAGE, 0, 0, 0)
    with pytest.raises(MissingCapability, match="KVM_CREATE_GUEST_MEMFD"):
        vm.create_guest_memfd(PAGE)


def test_guest_memfd(vm: VmFd) -> None:
    """A guest_memfd has the size that was asked for."""
    need(vm, "KVM_CAP_GUEST_MEMFD")
    try:
        fd = vm.create_guest_memfd(1 << 20)
    except KvmError as error:
        pytest.skip(f"not for this VM type: {error}")
    try:
        assert os.fstat(fd).st_size == 1 << 20
    finally:
        os.close(fd)
    with pytest.raises(KvmError) as error:
        vm.create_guest_memfd(100)
    assert refused(error) == ("KVM_CREATE_GUEST_MEMFD", errno.EINVAL)


# mov $0x0300, %ax; mov %ax, %ds; mov %al, 0; hlt: dirties the page at 0x3000
DIRTY_PAGE_3 = b"\xb8\x00\x03\x8e\xd8\xa2\x00\x00\xf4"


def dirty_pages(bitmap: bytearray) -> set[int]:
    """The numbers of the set bits."""
    return {page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1}


def log_dirty(vm: Machine, flags: int) -> None:
    """Change the first slot's flags."""
    slot = vm.memory.slots[0]
    vm.vm.set_user_memory_region(slot.index, slot.gpa, slot.size, slot.hva, flags)


def test_dirty_log() -> None:
    """The log has the page that the guest wrote and forgets it when read; the host's own writes are not in it."""
    with machine(DIRTY_PAGE_3, memory="64K") as vm:
        log_dirty(vm, lib.KVM_MEM_LOG_DIRTY_PAGES)
        assert vm.run(timeout=30) == Outcome.HALTED
        vm.memory[0x5000] = 1
        assert dirty_pages(vm.vm.get_dirty_log(0, 16)) == {3}
        assert dirty_pages(vm.vm.get_dirty_log(0, 16)) == set()
        log_dirty(vm, 0)
        with pytest.raises(KvmError) as error:
            vm.vm.get_dirty_log(0, 16)
        assert refused(error) == ("KVM_GET_DIRTY_LOG", errno.ENOENT)


def test_clear_dirty_log() -> None:
    """With manual protection reading leaves the log as it is, and clearing takes out what is named."""
    with machine(DIRTY_PAGE_3, memory="1M") as vm:
        need(vm.vm, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        vm.vm.enable_cap(lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        log_dirty(vm, lib.KVM_MEM_LOG_DIRTY_PAGES)
        assert vm.run(timeout=30) == Outcome.HALTED
        log = vm.vm.get_dirty_log(0, 256)
        assert dirty_pages(log) == dirty_pages(vm.vm.get_dirty_log(0, 256)) == {3}
        vm.vm.clear_dirty_log(0, 64, 64, bytearray(b"\xff" * 8))
        assert dirty_pages(vm.vm.get_dirty_log(0, 256)) == {3}
        vm.vm.clear_dirty_log(0, 0, 64, log)
        assert dirty_pages(vm.vm.get_dirty_log(0, 256)) == set()


def test_dirty_rings(vm: VmFd, ram: GuestMemory) -> None:
    """Once the ring is on, resetting it with nothing collected gives 0; without it the ioctl is refused."""
    size = need(vm, "KVM_CAP_DIRTY_LOG_RING")
    with pytest.raises(KvmError):
        vm.reset_dirty_rings()
    vm.enable_cap(lib.KVM_CAP_DIRTY_LOG_RING, min(size, 16 * PAGE))
    with vm.create_vcpu(0):
        assert vm.reset_dirty_rings() == 0


def test_tss_and_identity_map(vm: VmFd) -> None:
    """Both addresses are taken below 4 GiB; the identity map only before the first vCPU."""
    vm.set_tss_addr(0xFFFBD000)
    vm.set_identity_map_addr(0xFFFBC000)
    with pytest.raises(KvmError) as error:
        vm.set_tss_addr(1 << 32)
    assert refused(error) == ("KVM_SET_TSS_ADDR", errno.EINVAL)
    with vm.create_vcpu(0), pytest.raises(KvmError) as error:
        vm.set_identity_map_addr(0xFFFBC000)
    assert refused(error) == ("KVM_SET_IDENTITY_MAP_ADDR", errno.EINVAL)


# -- interrupt controllers -------------------------------------------------------------------------------------


def test_irqchip_state(vm: VmFd) -> None:
    """The state of a PIC and of the IOAPIC can be read, changed and restored."""
    vm.create_irqchip()
    for chip in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE):
        state = bytearray(vm.get_irqchip(chip))
        state[PIC_IMR] = 0xA5
        vm.set_irqchip(bytes(state))
        assert vm.get_irqchip(chip)[PIC_IMR] == 0xA5
    ioapic = bytearray(vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC))
    entry = 8 + 8 + 4 + 4 + 4 + 4  # base_address, ioregsel, id, irr, pad; then 24 redirection entries
    ioapic[entry : entry + 8] = (0x01000000_00010031).to_bytes(8, "little")  # vector 0x31, masked, destination 1
    vm.set_irqchip(bytes(ioapic))
    assert vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)[entry : entry + 8] == ioapic[entry : entry + 8]
    with pytest.raises(ValueError, match="bytes"):
        vm.set_irqchip(b"short")


def test_irqchip_only_once(vm: VmFd) -> None:
    """A second irqchip is refused, and so is one after a vCPU, each with advice."""
    vm.create_irqchip()
    with pytest.raises(KvmError) as error:
        vm.create_irqchip()
    assert refused(error) == ("KVM_CREATE_IRQCHIP", errno.EEXIST)
    with vm.kvm.create_vm() as other, other.create_vcpu(0), pytest.raises(KvmError) as error:
        other.create_irqchip()
    assert refused(error) == ("KVM_CREATE_IRQCHIP", errno.EINVAL)
    assert "before the first vCPU" in error.value.advice


def test_enable_cap(vm: VmFd) -> None:
    """A capability that is enabled has its effect: with the split irqchip there is no other; a wrong one is refused."""
    need(vm, "KVM_CAP_SPLIT_IRQCHIP")
    vm.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    with pytest.raises(KvmError) as error:
        vm.create_irqchip()
    assert refused(error) == ("KVM_CREATE_IRQCHIP", errno.EEXIST)
    with pytest.raises(KvmError) as error:
        vm.enable_cap(lib.KVM_CAP_USER_MEMORY)
    assert refused(error) == ("KVM_ENABLE_CAP", errno.EINVAL)


def test_pit(vm: VmFd) -> None:
    """The PIT needs the irqchip; its state can be read, changed and restored."""
    with pytest.raises(KvmError) as error:
        vm.create_pit2()
    assert refused(error) == ("KVM_CREATE_PIT2", errno.ENOENT)
    vm.create_irqchip()
    vm.create_pit2(lib.KVM_PIT_SPEAKER_DUMMY)
    state = ffi.new("struct kvm_pit_state2 *")
    ffi.memmove(state, vm.get_pit2(), ffi.sizeof("struct kvm_pit_state2"))
    state.channels[2].count, state.channels[2].mode = 0x1234, 3
    vm.set_pit2(bytes(ffi.buffer(state)))
    ffi.memmove(state, vm.get_pit2(), ffi.sizeof("struct kvm_pit_state2"))
    assert (state.channels[2].count, state.channels[2].mode) == (0x1234, 3)


def pic(vm: VmFd, offset: int) -> int:
    """A byte of the master PIC's state."""
    return vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER)[offset]


def test_irq_line(vm: VmFd) -> None:
    """Driving a GSI moves the PIC's input, and a rising edge is remembered as a request."""
    vm.create_irqchip()
    assert pic(vm, PIC_LAST_IRR) & 0x10 == 0
    vm.irq_line(4, True)
    assert pic(vm, PIC_LAST_IRR) & pic(vm, PIC_IRR) & 0x10
    vm.irq_line(4, False)
    assert pic(vm, PIC_LAST_IRR) & 0x10 == 0
    assert pic(vm, PIC_IRR) & 0x10


def test_gsi_routing(vm: VmFd) -> None:
    """A table of routes replaces the one before; entries of both kinds are taken, nonsense is refused."""
    vm.create_irqchip()
    vm.set_gsi_routing([(5, lib.KVM_IRQCHIP_PIC_MASTER, 7), (30, 0xFEE00000, 0, 0x41)])
    vm.irq_line(5, True)
    assert pic(vm, PIC_LAST_IRR) == 1 << 7
    with pytest.raises(KvmError) as error:
        vm.set_gsi_routing([(5, 99, 0)])
    assert refused(error) == ("KVM_SET_GSI_ROUTING", errno.EINVAL)


def test_irqfd(vm: VmFd, eventfd: int) -> None:
    """An eventfd raises its GSI until it is taken off again; it cannot be bound twice."""
    vm.create_irqchip()
    vm.irqfd(eventfd, 3)
    with pytest.raises(KvmError) as error:
        vm.irqfd(eventfd, 3)
    assert refused(error) == ("KVM_IRQFD", errno.EBUSY)
    os.eventfd_write(eventfd, 1)
    for _ in range(10_000):  # the kernel does it from a work queue
        if pic(vm, PIC_IRR) & 8:
            break
    assert pic(vm, PIC_IRR) & 8
    vm.irqfd(eventfd, 3, deassign=True)
    os.eventfd_write(eventfd, 1)
    assert signalled(eventfd)  # nobody but us takes it any more


def test_irqfd_with_resample(eventfd: int) -> None:
    """A level interrupt: the handler's EOI lowers the line and signals the resample eventfd."""
    resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    # handler at 0x3000: EOI to the PIC, then cli; hlt
    with machine(STI_HLT + b"\xeb\xfd", irqchip="kernel") as vm:
        vm.memory.write(0x3000, mov_al(0x20) + out_al(0x20) + CLI_HLT)
        vm.memory.write(4 * 4, (0x3000).to_bytes(2, "little") + b"\0\0")  # the PIC is not initialised: IRQ n, vector n
        vm.vm.irqfd(eventfd, 4, resample_fd=resample)
        vm.start()
        assert not signalled(resample, 0.05)
        os.eventfd_write(eventfd, 1)
        assert signalled(resample)
        assert vm.wait(timeout=30) == Outcome.HALTED
        assert pic(vm.vm, PIC_LAST_IRR) & 0x10 == 0
        vm.vm.irqfd(eventfd, 4, deassign=True)
    os.close(resample)


class Recorder(Device):
    """Remembers (offset, size, value) of each write."""

    name = "recorder"

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_ioeventfd_port(eventfd: int) -> None:
    """Writes of the length signal the eventfd and make no exit; other lengths come to the bus."""
    recorder = Recorder()
    # out %al, $0x40 twice; out %ax, $0x40; hlt
    with machine(out_al(0x40) * 2 + b"\xe7\x40" + HLT) as vm:
        vm.attach(recorder, ports=range(0x40, 0x48))
        vm.vm.ioeventfd(eventfd, 0x40, 1, port=True)
        with pytest.raises(KvmError) as error:
            vm.vm.ioeventfd(eventfd, 0x40, 1, port=True)
        assert refused(error) == ("KVM_IOEVENTFD", errno.EEXIST)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert os.eventfd_read(eventfd) == 2
        vm.vm.ioeventfd(eventfd, 0x40, 1, port=True, deassign=True)
    assert [write[:2] for write in recorder.writes] == [(0, 2)]


def test_ioeventfd_match(eventfd: int) -> None:
    """With a value to match, other values come to the bus."""
    recorder = Recorder()
    with machine(mov_al(7) + out_al(0x40) + mov_al(8) + out_al(0x40) + HLT) as vm:
        vm.attach(recorder, ports=range(0x40, 0x48))
        vm.vm.ioeventfd(eventfd, 0x40, 1, port=True, match=7)
        assert vm.run(timeout=30) == Outcome.HALTED
    assert os.eventfd_read(eventfd) == 1
    assert recorder.writes == [(0, 1, 8)]


def test_ioeventfd_mmio_of_any_length(eventfd: int) -> None:
    """Length 0 takes writes of every length at an address; one beside it is an exit."""
    recorder = Recorder()
    # mov $0x2000, %bx; mov %bx, %ds; mov %al, 0; mov %ax, 0; mov %eax, 0; mov %al, 1; hlt
    code = b"\xbb\x00\x20\x8e\xdb\xa2\x00\x00\xa3\x00\x00\x66\xa3\x00\x00\xa2\x01\x00\xf4"
    with machine(code, memory="64K") as vm:
        need(vm.vm, "KVM_CAP_IOEVENTFD_ANY_LENGTH")
        vm.attach(recorder, mmio=range(0x20000, 0x20010))
        vm.vm.ioeventfd(eventfd, 0x20000, 0)
        assert vm.run(timeout=30) == Outcome.HALTED
    assert os.eventfd_read(eventfd) == 3
    assert [write[:2] for write in recorder.writes] == [(1, 1)]


def test_signal_msi() -> None:
    """A message sets the request bit of an enabled local APIC; to a destination that is not there it is lost."""
    with machine(HLT, irqchip="kernel") as vm:
        need(vm.vm, "KVM_CAP_SIGNAL_MSI")
        lapic = bytearray(vm.vcpus[0].fd.get_lapic())
        lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # SVR: software enabled
        vm.vcpus[0].fd.set_lapic(bytes(lapic))
        assert vm.vm.signal_msi(0xFEE00000, 0x51)
        irr = vm.vcpus[0].fd.get_lapic()[0x200 + 0x51 // 32 * 16 + 0x51 % 32 // 8]
        assert irr == 1 << (0x51 % 8)
        assert not vm.vm.signal_msi(0xFEE0F000, 0x51)  # APIC id 15


def test_coalesced_zones() -> None:
    """A zone batches writes until it is unregistered; a zone that does not exist cannot be."""
    with machine(out_al(0x50) + HLT + out_al(0x50) + HLT) as vm:
        need(vm.vm, "KVM_CAP_COALESCED_PIO")
        vm.vm.register_coalesced(0x50, 1, port=True)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert lib.KVM_EXIT_IO not in vm.vcpus[0].exit_counts()
        vm.vm.unregister_coalesced(0x50, 1, port=True)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert vm.vcpus[0].exit_counts()[lib.KVM_EXIT_IO] == 1


# -- the rest --------------------------------------------------------------------------------------------------


def test_clock(vm: VmFd) -> None:
    """The VM's clock can be set, and goes on from there."""
    vm.set_clock(10**15)
    first, _ = vm.get_clock()
    second, _ = vm.get_clock()
    assert 10**15 <= first <= second < 10**15 + 600 * 10**9


def test_msr_filter() -> None:
    """A denied MSR comes to user space; one that a range allows, and one beyond it, do not."""
    asked: list[int] = []

    def read(vcpu: object, index: int) -> int:
        asked.append(index)
        return 0x77

    # mov $SYSENTER_CS, %ecx; rdmsr; mov %ax, %bx; inc %ecx; rdmsr; hlt
    code = b"\x66\xb9\x74\x01\x00\x00\x0f\x32\x89\xc3\x66\x41\x0f\x32\xf4"
    with machine(code) as vm:
        need(vm.vm, "KVM_CAP_X86_MSR_FILTER")
        vm.on_msr(read=read)
        vm.vcpus[0].fd.set_msrs({SYSENTER_CS: 0x11, SYSENTER_CS + 1: 0x22})
        flags = lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE
        vm.vm.set_msr_filter([(flags, SYSENTER_CS, 2, b"\x02")], default_allow=True)
        assert vm.run(timeout=30) == Outcome.HALTED
        assert (vm.vcpus[0].regs.rbx & 0xFF, vm.vcpus[0].regs.rax & 0xFF) == (0x77, 0x22)
        assert vm.vcpus[0].fd.get_msrs([SYSENTER_CS]) == {SYSENTER_CS: 0x11}
    assert asked == [SYSENTER_CS]


def test_create_device(vm: VmFd) -> None:
    """A device has attributes; a type that does not exist is refused; a test creates nothing."""
    vm.create_irqchip()
    try:
        assert vm.create_device(lib.KVM_DEV_TYPE_VFIO, test=True) is None
    except KvmError as error:
        pytest.skip(f"no VFIO device: {error}")
    device = vm.create_device(lib.KVM_DEV_TYPE_VFIO)
    assert device is not None
    with device:
        assert device.has_attribute(KVM_DEV_VFIO_FILE, 1)  # KVM_DEV_VFIO_FILE_ADD
        assert not device.has_attribute(77, 0)
        with pytest.raises(KvmError) as error:
            device.set_attribute(KVM_DEV_VFIO_FILE, 1, ffi.new("int32_t *", -1))
        assert error.value.ioctl == "KVM_SET_DEVICE_ATTR"
        with pytest.raises(KvmError) as error:
            device.get_attribute(77, 0, ffi.new("uint64_t *"))
        assert error.value.ioctl == "KVM_GET_DEVICE_ATTR"
    with pytest.raises(KvmError) as error:
        vm.create_device(0x7FFF)
    assert refused(error) == ("KVM_CREATE_DEVICE", errno.ENODEV)


def test_vm_stats(vm: VmFd) -> None:
    """The binary statistics of a new VM have names and numbers; reading them leaves no descriptor open."""
    need(vm, "KVM_CAP_BINARY_STATS_FD")
    before = len(os.listdir("/proc/self/fd"))
    stats = vm.stats()
    assert "remote_tlb_flush" in stats
    assert all(isinstance(value, int | list) for value in stats.values())
    assert len(os.listdir("/proc/self/fd")) == before


def test_vcpu_ids(vm: VmFd) -> None:
    """An id can be taken once; the handle knows it."""
    with vm.create_vcpu(3) as vcpu:
        assert vcpu.id == 3
        with pytest.raises(KvmError) as error:
            vm.create_vcpu(3)
        assert refused(error) == ("KVM_CREATE_VCPU", errno.EEXIST)
        with pytest.raises(KvmError) as error:
            vm.create_vcpu(1 << 30)
        assert refused(error) == ("KVM_CREATE_VCPU", errno.EINVAL)
