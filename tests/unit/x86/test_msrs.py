"""Names and power-on values of model-specific registers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.x86.msrs import (
    IA32_BIOS_SIGN_ID,
    IA32_EFER,
    IA32_FEATURE_CONTROL,
    IA32_MISC_ENABLE,
    IA32_MTRR_DEF_TYPE,
    name_of,
    power_on,
)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0x10, "IA32_TSC"),
        (0x1B, "IA32_APIC_BASE"),
        (IA32_EFER, "IA32_EFER"),
        (0xC0000102, "IA32_KERNEL_GS_BASE"),
        (0x4B564D01, "KVM_SYSTEM_TIME_NEW"),
        (0x40000000, "HV_GUEST_OS_ID"),
        (0xC0010015, "HWCR"),
        (0x200, "IA32_MTRR_PHYSBASE0"),
        (0x20F, "IA32_MTRR_PHYSMASK7"),
        (0x268, "IA32_MTRR_FIX4K_C0000"),
        (0x26F, "IA32_MTRR_FIX4K_F8000"),
        (0x400, "IA32_MC0_CTL"),
        (0x405, "IA32_MC1_STATUS"),
        (0x47F, "IA32_MC31_MISC"),
        (0x480, "IA32_VMX_BASIC"),
        (0x48B, "IA32_VMX_PROCBASED_CTLS2"),
        (0x493, "IA32_VMX_EXIT_CTLS2"),
        (0x802, "IA32_X2APIC_APICID"),
        (0x817, "IA32_X2APIC_ISR7"),
        (0x820, "IA32_X2APIC_IRR0"),
        (0x830, "IA32_X2APIC_ICR"),
        (0x83F, "IA32_X2APIC_SELF_IPI"),
        (0xC1, "IA32_PMC0"),
        (0xC0010203, "PERF_CTR1"),
        (0xC0002011, "MCA_STATUS_BANK1"),
        (0xC0010058, "MMIO_CONF_BASE"),
    ],
)
def test_names(index: int, name: str) -> None:
    """Single registers, rows of registers and the x2APIC range have the manuals' names."""
    assert name_of(index) == name


@pytest.mark.parametrize("index", [0x2, 0x494, 0x800, 0x831, 0x8FF, 0xC0002017, 0xDEADBEEF, 0xFFFFFFFF])
def test_unknown_index_is_shown_as_a_number(index: int) -> None:
    """A register that the tables lack, or a hole in a row, is given by its number."""
    assert name_of(index) == f"MSR {index:#x}"


@given(st.integers(0, 0xFFFFFFFF))
def test_every_index_has_a_name(index: int) -> None:
    """name_of is total: the guest chooses the index."""
    assert name_of(index)


def test_names_are_unique() -> None:
    """No two registers below 0x1000 or in AMD's ranges share a name."""
    ranges = (range(0x1000), range(0xC0000000, 0xC0002400), range(0xC0010000, 0xC0012000))
    names = [name_of(index) for each in ranges for index in each]
    assert len(set(names)) == len(names)


def test_power_on_without_firmware() -> None:
    """A directly booted kernel finds fast strings and write-back MTRRs, and VMX unlocked if it has it."""
    values = dict(power_on())
    assert values[IA32_MISC_ENABLE] & 1
    assert values[IA32_MTRR_DEF_TYPE] == 0x806
    assert IA32_FEATURE_CONTROL not in values
    assert dict(power_on(vmx=True))[IA32_FEATURE_CONTROL] == 0x5


def test_power_on_with_firmware() -> None:
    """Firmware sets the MTRRs and the feature lock itself."""
    assert set(dict(power_on(firmware=True, vmx=True))) == {IA32_MISC_ENABLE}


def test_microcode_revision() -> None:
    """The microcode revision is set only when it was asked for."""
    assert dict(power_on(microcode=0x1_0000_0000))[IA32_BIOS_SIGN_ID] == 0x1_0000_0000
    assert IA32_BIOS_SIGN_ID not in dict(power_on())
