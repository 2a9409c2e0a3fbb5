"""The AML of the machine's fixed devices: what the DSDT says exists, and where. Layer: x86.

Ports and interrupts come from `x86.layout`, the devices of the same name serve them. Only devices that are
really present may be named: an operating system that is told of a UART or a keyboard controller waits for
it.

Source: ACPI specification 6.5, 6.1 (identification), 6.2.2 (_CRS), 7.4.2 (_S5); QEMU's docs/specs for
QEMU0001 (pvpanic) and QEMU0002 (fw_cfg).
"""

from __future__ import annotations

from pykvm.x86 import aml, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.aml import AML
    from pykvm.x86.platform import Platform

S5_SLP_TYP = 0  # as PIIX4 has it: SeaBIOS and many small kernels write 0x2000 (SLP_EN alone) to switch off

# What the host bridge forwards: nothing decodes there, but an OS wants to know where it could place a BAR.
PCI_MMIO_FIRST, PCI_MMIO_LAST = 0xE000_0000, layout.IOAPIC - 1


def definition_block(platform: Platform) -> AML:
    """The DSDT's body."""
    optional = (
        (platform.pci, pci_root),
        (platform.keyboard, ps2_keyboard),
        (platform.mouse, ps2_mouse),
        (platform.rtc, real_time_clock),
        (platform.fw_cfg, fw_cfg_device),
        (platform.pvpanic, pvpanic_device),
    )
    devices = [make() for present, make in optional if present]
    devices += [serial_port(index) for index in platform.serial]
    devices += [virtio_mmio(index) for index in range(platform.virtio)]
    s5 = aml.package(aml.integer(S5_SLP_TYP), aml.integer(S5_SLP_TYP), aml.integer(0), aml.integer(0))
    return aml.name("\\_S5", s5) + aml.scope("\\_SB", *devices, *platform.extra)


def serial_port(index: int) -> AML:
    """COM1 to COM4 (index 0 to 3): a 16550A-compatible UART."""
    return aml.device(
        f"COM{index + 1}",
        aml.name("_HID", aml.eisaid("PNP0501")),
        aml.name("_UID", aml.integer(index + 1)),
        _resources(aml.io(layout.SERIAL_PORTS[index], 8), aml.irq_no_flags(layout.SERIAL_IRQS[index])),
    )


def ps2_keyboard() -> AML:
    """The i8042's keyboard port; the controller's own two ports belong to this device."""
    return aml.device(
        "KBD",
        aml.name("_HID", aml.eisaid("PNP0303")),
        _resources(
            aml.io(layout.PORT_I8042_DATA, 1),
            aml.io(layout.PORT_I8042_STATUS, 1),
            aml.irq_no_flags(layout.IRQ_KEYBOARD),
        ),
    )


def ps2_mouse() -> AML:
    """The i8042's auxiliary port."""
    return aml.device("MOU", aml.name("_HID", aml.eisaid("PNP0F13")), _resources(aml.irq_no_flags(layout.IRQ_MOUSE)))


def real_time_clock() -> AML:
    """The MC146818 clock: index and data port (no second bank)."""
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisaid("PNP0B00")),
        _resources(aml.io(layout.PORT_RTC, 2), aml.irq_no_flags(layout.IRQ_RTC)),
    )


def pci_root() -> AML:
    """A host bridge with bus 0 alone, configuration mechanism #1, and no interrupt routes."""
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisaid("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        _resources(
            aml.word_bus_number(0, 0),
            aml.io(layout.PORT_PCI_CONFIG, 8),
            aml.word_io(0x0000, layout.PORT_PCI_CONFIG - 1),
            aml.word_io(layout.PORT_PCI_CONFIG + 8, 0xFFFF),
            aml.dword_memory(PCI_MMIO_FIRST, PCI_MMIO_LAST),
        ),
    )


def fw_cfg_device() -> AML:
    """QEMU0002: selector, data and DMA register. Present and decoding, not shown to the user (_STA 0x0b)."""
    return aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),
        _resources(aml.io(layout.PORT_FW_CFG, 12)),
    )


def pvpanic_device() -> AML:
    """QEMU0001: one port that a panicking guest writes."""
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_STA", aml.integer(0x0B)),
        _resources(aml.io(layout.PORT_PVPANIC, 1)),
    )


def virtio_mmio(index: int) -> AML:
    """LNRO0005: the window of registers and the interrupt of one virtio-mmio device (_CCA: its DMA is coherent)."""
    base = layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_SIZE
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        _resources(
            aml.memory32_fixed(base, layout.VIRTIO_MMIO_SIZE),
            aml.interrupt(layout.VIRTIO_GSIS[index], edge=True),
        ),
    )


def _resources(*descriptors: bytes) -> AML:
    return aml.name("_CRS", aml.resource_template(*descriptors))
