"""Every fixed guest address, port and interrupt, each with its reason. Layer: x86; imports nothing.

Guest physical map:

    0x0000_0000  real-mode vectors, BIOS data area
    0x0000_0500  boot-time GDT, page tables, boot parameters (free below 0x7_0000 for loaders)
    0x0001_0000  flat real-mode kernels (CS=0x1000)
    0x0009_fc00  EBDA: MP floating pointer (searched there by Linux and every MP 1.4 kernel), 1 KiB
    0x000a_0000  VGA hole (no memory is reported)
    0x000e_0000  BIOS area: RSDP and the ACPI tables, MP configuration table at its end
    0x0010_0000  kernels
    ...          RAM up to the PCI hole
    0xc000_0000  PCI hole: MMIO
    0xfec0_0000  IOAPIC;  0xfee0_0000 local APIC
    0xfeff_c000  KVM's identity map page, then 3 pages of its TSS (VMX without unrestricted guest)
    4 GiB - n    firmware
    0x1_0000_0000  the rest of RAM
    ...            memory that devices bring along, each at a multiple of 1 GiB; not in the e820 map, as with QEMU
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_SIZE = 4 * KIB

# -- boot-time structures (only until the guest installs its own; all below the EBDA) -----------------------------
BOOT_GDT = 0x500
BOOT_IDT = 0x520 + 0x60  # after room for 16 descriptors
BOOT_STACK_TOP = 0x8000  # grows down; PVH and the 64-bit protocol do not need one, flat images like one
PVH_START_INFO = 0x6000
ZERO_PAGE = 0x7000  # Linux boot_params, 4 KiB: overlaps no stack because Linux sets its own first
BOOT_PML4 = 0x9000
BOOT_PDPT = 0xA000
BOOT_PD = 0xB000  # four of them: identity map of 4 GiB in 2 MiB pages
MULTIBOOT_INFO = 0x10000  # information, memory map, module list and strings; up to 64 KiB
CMDLINE = 0x20000  # up to CMDLINE_MAX + NUL
CMDLINE_MAX = 0xFFFF

FLAT_REAL_BASE = 0x10000  # kvmtool's CS=0x1000:IP=0
KERNEL_BASE = 0x100000  # where protected and long mode images go

EBDA = 0x9FC00
LOW_RAM_END = 0xA0000
BIOS_AREA = 0xE0000  # RSDP is searched in [0xe0000, 0xfffff] (ACPI 5.2.5.1)
ACPI_TABLES = 0xE0000
MP_CONFIG = 0xFC000  # MP configuration table: 5.4 KiB for 254 CPUs, more than the EBDA has; ends below BIOS16
BIOS16 = 0xFE000  # the real-mode BIOS of the 16-bit Linux protocol, 4 KiB
BIOS_AREA_END = 0x100000

# -- RAM above and below the hole ------------------------------------------------------------------------------
PCI_HOLE = 0xC000_0000  # 3 GiB: as QEMU's q35 with more than 2.75 GiB; leaves 1 GiB for MMIO
HIGH_RAM = 0x1_0000_0000
DEVICE_MEMORY_ALIGN = GIB  # no two share a section of Linux's (128 MiB), nor one with RAM; good for large pages, too

# -- MMIO ------------------------------------------------------------------------------------------------------
VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_SIZE = 0x1000  # of device n's window, at VIRTIO_MMIO_BASE + n * VIRTIO_MMIO_SIZE
IOAPIC = 0xFEC0_0000
IOAPIC_SIZE = 0x100
LAPIC = 0xFEE0_0000
TESTDEV_MMIO = 0xFF00_0000  # kvm-unit-tests' pci-less iomem window, 64 KiB
TESTDEV_MMIO_SIZE = 0x10000
IDENTITY_MAP = 0xFEFF_C000  # KVM_SET_IDENTITY_MAP_ADDR: one page, clear of any firmware (as QEMU has it)
KVM_TSS = 0xFEFF_D000  # KVM_SET_TSS_ADDR: three pages
FIRMWARE_TOP = 0x1_0000_0000
RESET_VECTOR = 0xFFFF_FFF0
MAX_FIRMWARE_SIZE = 16 * MIB  # OVMF is 4 MiB, some coreboot images are 16

# -- ports -----------------------------------------------------------------------------------------------------
PORT_POST = 0x80
PORT_I8042_DATA = 0x60
PORT_SYSTEM_CONTROL_B = 0x61
PORT_I8042_STATUS = 0x64
PORT_RTC = 0x70  # index; data at 0x71
PORT_FAST_A20 = 0x92
PORT_TESTDEV_LATCH32 = 0xE0
PORT_TESTDEV_FLUSH = 0xE4
PORT_TESTDEV_LATCH8 = 0xE8
PORT_DEBUGCON = 0xE9  # Bochs, QEMU
PORT_DEBUG_TRAP = 0xEC  # of pykvm's own breakpoints where KVM does not intercept INT3; no PC has anything there
PORT_DEBUG_EXIT = 0xF4  # QEMU isa-debug-exit as everybody configures it
PORT_SEABIOS_DEBUG = 0x402
PORT_PVPANIC = 0x505
PORT_FW_CFG = 0x510  # selector, data; DMA address at 0x514
PORT_ACPI_PM = 0x600  # SeaBIOS expects 0x600; hobby kernels power off by writing 0x2000 to port 0x604
PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0 = 0x00, 0x04, 0x08, 0x10  # offsets of its blocks
GPE0_LENGTH = 4  # status and enable of 16 events; an OS clears every byte of it at boot, one exit each
ACPI_PM_LENGTH = GPE0 + GPE0_LENGTH
PORT_PCI_CONFIG = 0xCF8  # address; reset control at 0xcf9; data at 0xcfc
PORT_TESTDEV_IRQ = 0x2000  # + n drives IRQ line n
SERIAL_PORTS = (0x3F8, 0x2F8, 0x3E8, 0x2E8)

# -- interrupts ------------------------------------------------------------------------------------------------
IRQ_PIT = 0
IRQ_KEYBOARD = 1
SERIAL_IRQS = (4, 3, 4, 3)  # COM3 and COM4 share, as on a PC
IRQ_RTC = 8
IRQ_ACPI = 9
IRQ_MOUSE = 12
PIT_PIN = 2  # the IOAPIC input (and GSI) of ISA interrupt 0, as on every PC
IOAPIC_PINS = 24
# One edge-triggered GSI for each virtio device: those above the ISA interrupts, then ISA ones that nothing here uses.
VIRTIO_GSIS = (16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 13, 14, 15)
