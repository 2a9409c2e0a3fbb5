"""The PCI host bridge: configuration mechanism #1 and the reset control register."""

from __future__ import annotations

import pytest

from pykvm.core.outcome import Outcome
from pykvm.devices.pci_host import PciFunction, PciHost

ENABLE = 0x8000_0000


def address(device: int, function: int = 0, register: int = 0, bus: int = 0) -> int:
    """The value of the address register that selects this register."""
    return ENABLE | bus << 16 | device << 11 | function << 8 | register


def config_read(host: PciHost, where: int, size: int = 4) -> int:
    """One configuration read, as a driver makes it."""
    host.write(0, 4, where & ~3)
    return host.read(4 + (where & 3), size)


def config_write(host: PciHost, where: int, size: int, value: int) -> None:
    """One configuration write."""
    host.write(0, 4, where & ~3)
    assert host.write(4 + (where & 3), size, value) is None


@pytest.mark.parametrize(
    ("register", "size", "value"),
    [
        (0x00, 4, 0x1237_8086),
        (0x00, 2, 0x8086),
        (0x02, 2, 0x1237),
        (0x03, 1, 0x12),
        (0x0A, 2, 0x0600),
        (0x0E, 1, 0x00),
        (0x2C, 4, 0x1100_1AF4),
        (0x3C, 4, 0),
    ],
)
def test_host_bridge_identifies_itself(register: int, size: int, value: int) -> None:
    """An i440FX of a QEMU machine, single-function, without an interrupt; any width."""
    assert config_read(PciHost(), address(0, register=register), size) == value


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("where", [address(1), address(31, 7), address(0, 1), address(0, bus=1), address(0, bus=255)])
def test_absent_functions_read_all_ones(where: int, size: int) -> None:
    """Nothing else is on the bus, and there is no other bus."""
    host = PciHost()
    config_write(host, where, size, 0)
    assert config_read(host, where, size) == (1 << 8 * size) - 1


def test_data_window_is_closed_without_the_enable_bit() -> None:
    """Only bit 31 turns accesses to 0xcfc into configuration cycles."""
    host = PciHost()
    host.write(0, 4, address(0) & ~ENABLE)
    assert host.read(4, 4) == 0xFFFF_FFFF


def test_address_register_keeps_its_defined_bits() -> None:
    """How Linux probes for mechanism #1: write 0x80000000 and read it back; reserved bits read zero."""
    host = PciHost()
    host.write(0, 4, 0x8000_0000)
    assert host.read(0, 4) == 0x8000_0000
    host.write(0, 4, 0xFFFF_FFFF)
    assert host.read(0, 4) == 0x80FF_FFFC


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_other_widths_do_not_reach_the_address_register(offset: int, size: int) -> None:
    """The address register answers 32-bit accesses only; others pass through to nothing."""
    host = PciHost()
    host.write(0, 4, address(0, register=0x40))
    assert host.write(offset, size, 0) is None
    assert host.read(0, 4) == address(0, register=0x40)
    assert host.read(offset, size) == (1 << 8 * size) - 1


@pytest.mark.parametrize("register", range(0x59, 0x60))
def test_memory_attributes_are_kept(register: int) -> None:
    """SeaBIOS opens and closes the shadow RAM through these seven and reads them back; reserved bits stay zero."""
    host = PciHost()
    assert config_read(host, address(0, register=register), 1) == 0
    config_write(host, address(0, register=register), 1, 0xFF)
    assert config_read(host, address(0, register=register), 1) == 0x33
    config_write(host, address(0, register=register), 1, 0x10)
    assert config_read(host, address(0, register=register), 1) == 0x10


def test_read_only_registers_stay() -> None:
    """Identity and class cannot be written, at any width; a BAR that does not exist sizes as absent."""
    host = PciHost()
    for register in range(0, 0x40, 4):
        if register != 0x04:
            before = config_read(host, address(0, register=register))
            config_write(host, address(0, register=register), 4, ~before & 0xFFFF_FFFF)
            assert config_read(host, address(0, register=register)) == before
    config_write(host, address(0, register=0x04), 2, 0xFFFF)
    assert config_read(host, address(0, register=0x04), 2) == 0x0106


@pytest.mark.parametrize(
    ("writes", "resets"),
    [
        ([0x06], [True]),  # the ACPI reset register
        ([0x02, 0x06], [False, True]),  # how Linux and SeaBIOS do it
        ([0x04], [True]),
        ([0x0E], [True]),
        ([0x00, 0x02, 0xF9], [False, False, False]),
    ],
)
def test_reset_control(writes: list[int], resets: list[bool]) -> None:
    """Bit 2 resets the machine when it rises, whatever bit 1 asks for."""
    host = PciHost()
    outcomes = [host.write(1, 1, value) for value in writes]
    assert outcomes == [Outcome.RESET if reset else None for reset in resets]


def test_reset_control_needs_a_rising_bit_and_reads_back() -> None:
    """A second write of the same value does nothing; the register holds its two bits."""
    host = PciHost()
    assert host.write(1, 1, 0xFF) == Outcome.RESET
    assert host.read(1, 1) == 0x06
    assert host.write(1, 1, 0x06) is None
    assert host.write(1, 1, 0x02) is None
    assert host.write(1, 1, 0x06) == Outcome.RESET


def test_reset_returns_to_power_on() -> None:
    """Address, reset control and the functions' registers."""
    host = PciHost()
    config_write(host, address(0, register=0x59), 1, 0x33)
    host.write(1, 1, 0x06)
    host.reset()
    assert (host.read(0, 4), host.read(1, 1)) == (0, 0)
    assert config_read(host, address(0, register=0x59), 1) == 0
    assert config_read(host, address(0), 2) == 0x8086


def test_given_functions_replace_the_default_bridge() -> None:
    """The functions are the caller's to choose."""
    host = PciHost([(3, 1, PciFunction(0x1234, 0x5678, 0xFF00))])
    assert config_read(host, address(3, 1)) == 0x5678_1234
    assert config_read(host, address(0)) == 0xFFFF_FFFF


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_access_width_is_harmless(offset: int, size: int) -> None:
    """Any access that lies in the region gives a value of its size and raises nothing, in every register."""
    if offset + size > 8:
        return
    host = PciHost()
    for register in (0, 0x3C, 0x58, 0xFC):
        host.write(0, 4, address(0, register=register))
        assert 0 <= host.read(offset, size) < 1 << 8 * size
        host.write(offset, size, (1 << 8 * size) - 1)
