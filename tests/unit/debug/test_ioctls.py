"""KVM's ioctls by number and their arguments in words, from bytes as a process would have them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm._native import ffi, lib
from pykvm.debug.kvmtrace.ioctls import argument, find, ioctls, is_kvm

if TYPE_CHECKING:
    from pykvm.debug.kvmtrace.ioctls import ReadMemory

ADDRESS = 0x7000


def memory(data: bytes) -> ReadMemory:
    """A process with `data` at ADDRESS and nothing else."""
    return lambda address, size: data[address - ADDRESS :][:size] if address >= ADDRESS else b""


def said(name: str, struct: str, *, tail: bytes = b"", **fields: object) -> str:
    """What is said of an ioctl whose argument is a structure with these fields."""
    value = ffi.new(f"{struct} *")
    for field, content in fields.items():
        setattr(value, field, content)
    return argument(find(getattr(lib, name)), ADDRESS, memory(bytes(ffi.buffer(value)) + tail))


def test_the_table_is_the_headers() -> None:
    """x86's ioctls are found by number with their types; all are of KVM's type."""
    assert find(lib.KVM_RUN).name == "KVM_RUN"
    assert find(lib.KVM_SET_USER_MEMORY_REGION).kind == "struct kvm_userspace_memory_region"
    assert find(lib.KVM_GET_LAPIC).size == ffi.sizeof("struct kvm_lapic_state")
    assert len(ioctls()) > 80
    assert all(is_kvm(number) for number in ioctls())
    assert not is_kvm(0x5401)  # TCGETS


def test_an_unknown_ioctl_has_its_number() -> None:
    """A kernel newer than the header."""
    assert find(0xAEFE).name == "KVM ioctl 0xaefe"
    assert argument(find(0xAEFE), 0x12, memory(b"")) == "0x12"


def test_numbers() -> None:
    """Arguments that are no pointers: a capability by name, an index, an address."""
    assert argument(find(lib.KVM_CHECK_EXTENSION), lib.KVM_CAP_IRQCHIP, memory(b"")) == "KVM_CAP_IRQCHIP"
    assert argument(find(lib.KVM_CREATE_VCPU), 3, memory(b"")) == "3"
    assert argument(find(lib.KVM_SET_TSS_ADDR), 0xFFFBD000, memory(b"")) == "0xfffbd000"
    assert argument(find(lib.KVM_RUN), 0, memory(b"")) == ""
    pointed = memory((0xFEFFC000).to_bytes(8, "little"))
    assert argument(find(lib.KVM_SET_IDENTITY_MAP_ADDR), ADDRESS, pointed) == "0xfeffc000"


def test_a_memory_region() -> None:
    """Every field, flags by name."""
    text = said(
        "KVM_SET_USER_MEMORY_REGION", "struct kvm_userspace_memory_region",
        slot=2, flags=lib.KVM_MEM_READONLY, guest_phys_addr=0xFFFC0000, memory_size=0x40000, userspace_addr=0x1000,
    )  # fmt: skip
    assert text == (
        "{slot=2, flags=KVM_MEM_READONLY, guest_phys_addr=0xfffc0000, memory_size=0x40000, userspace_addr=0x1000}"
    )


def test_registers_leave_zeros_out() -> None:
    """Of a large structure only what is not zero."""
    assert said("KVM_SET_REGS", "struct kvm_regs", rip=0x100000, rflags=2) == "{rax=0, rip=0x100000, rflags=2}"


def test_lists() -> None:
    """CPUID entries and MSRs: as many as the count says, as far as there is memory."""
    entry = ffi.new("struct kvm_cpuid_entry2 *")
    entry.function, entry.eax, entry.flags = 4, 0x123, lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    tail = bytes(ffi.buffer(entry)) * 9
    head = (9).to_bytes(8, "little")
    text = argument(find(lib.KVM_SET_CPUID2), ADDRESS, memory(head + tail))
    assert re.match(
        r"{nent=9, (padding=0, )?entries=\[{function=4, flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax=0x123}", text
    )
    assert text.endswith("... 3 more]}")
    text = argument(find(lib.KVM_SET_CPUID2), ADDRESS, memory((0xFFFFFFFF).to_bytes(8, "little") + tail))
    assert "... 3 more" in text  # the count is a lie; nothing beyond the memory is made up


def test_routing_shows_the_member_that_holds() -> None:
    """An entry for an irqchip has a pin, one for a message an address."""
    table = ffi.new("struct kvm_irq_routing *", {"entries": 2})
    table.nr = 2
    table.entries[0].type, table.entries[0].u.irqchip.pin = lib.KVM_IRQ_ROUTING_IRQCHIP, 5
    table.entries[1].type, table.entries[1].u.msi.address_lo = lib.KVM_IRQ_ROUTING_MSI, 0xFEE00000
    data = bytes(
        ffi.buffer(table, ffi.sizeof("struct kvm_irq_routing") + 2 * ffi.sizeof("struct kvm_irq_routing_entry"))
    )
    text = argument(find(lib.KVM_SET_GSI_ROUTING), ADDRESS, memory(data))
    assert "type=KVM_IRQ_ROUTING_IRQCHIP, u={irqchip=0, pin=5}" in text
    assert "type=KVM_IRQ_ROUTING_MSI, u={address_lo=0xfee00000}" in text


def test_eventfds() -> None:
    """Descriptors are decimal, flags by name."""
    text = said("KVM_IRQFD", "struct kvm_irqfd", fd=17, gsi=5, flags=lib.KVM_IRQFD_FLAG_RESAMPLE, resamplefd=18)
    assert text.startswith("{fd=17, gsi=5, flags=KVM_IRQFD_FLAG_RESAMPLE, resamplefd=18")
    text = said("KVM_IOEVENTFD", "struct kvm_ioeventfd", addr=0xD0000050, len=4, fd=9)
    assert "addr=0xd0000050, len=4, fd=9, flags=0" in text


@pytest.mark.parametrize("data", [b"", b"\x01"])
def test_memory_that_cannot_be_read(data: bytes) -> None:
    """A wild pointer is shown as such."""
    assert argument(find(lib.KVM_SET_REGS), ADDRESS, memory(data)) == f"{ADDRESS:#x} /* not readable */"
    assert argument(find(lib.KVM_SET_REGS), 0, memory(data)) == "NULL"


@given(st.sampled_from(sorted(ioctls())), st.binary(max_size=3000))
def test_any_bytes_can_be_shown(number: int, data: bytes) -> None:
    """Whatever the process has there, for any ioctl: words, no exception, and not endless ones."""
    assert len(argument(ioctls()[number], ADDRESS, memory(data))) < 20000
