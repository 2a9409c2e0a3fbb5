"""The ACPI tables: RSDP, RSDT, XSDT, FADT, FACS, MADT, WAET and DSDT. Layer: x86.

`AcpiImage` is relocatable: it knows where its pointers and checksums are. `build_acpi` places it in the
BIOS area for a kernel that is booted directly; `x86.acpi_loader` hands the same image to a firmware, which
places it itself.

The machine is of the classic kind, not hardware-reduced: PM1 event and control block, PM timer, one GPE
block, SCI on IRQ 9, and no SMI command port, so ACPI mode is always on (5.2.9: SMI_CMD zero) and SCI_EN
reads one.

Source: ACPI specification 6.5, 5.2; WAET: Microsoft, Windows ACPI Emulated Devices Table, 1.0.
"""

from __future__ import annotations

import struct

from pykvm.errors import ConfigError
from pykvm.x86 import dsdt, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.x86.platform import Platform

OEM_ID = b"PYKVM "
OEM_TABLE_ID = b"PYKVMPC "
CREATOR_ID = b"PYKV"

TABLE_ALIGN = 64  # FACS wants it (5.2.10)
SYSTEM_IO = 1  # generic address structure, address space (5.2.3.2)
RESET_VALUE = 0x06  # to port 0xcf9: hard reset, now
X2APIC_FIRST_ID = 255  # xAPIC entries hold ids up to 254

# FADT flags (5.2.9, table 5.10)
WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, TMR_VAL_EXT, RESET_REG_SUP = (
    1 << 0,
    1 << 2,
    1 << 5,
    1 << 6,
    1 << 8,
    1 << 10,
)
# IA-PC boot architecture flags (5.2.9.3)
LEGACY_DEVICES, BOOT_8042, VGA_NOT_PRESENT, CMOS_RTC_NOT_PRESENT = 1 << 0, 1 << 1, 1 << 2, 1 << 5

ACTIVE_HIGH_LEVEL = 0x0D  # MPS INTI flags (5.2.12.5)


class AcpiImage:
    """Tables as one block of bytes that can lie anywhere: pointers in `data` are offsets until placed.

    `pointers` are (offset, size) of little-endian fields, `checksums` (offset of the checksum, start,
    length), `offsets` says where the table with a signature begins. `rsdp` is 36 bytes with two pointers of
    the same kind.
    """

    RSDP_POINTERS = ((16, 4), (24, 8))
    RSDP_CHECKSUMS = ((8, 0, 20), (32, 0, 36))

    __slots__ = ("checksums", "data", "offsets", "pointers", "rsdp")

    def __init__(self) -> None:
        self.data = bytearray()
        self.rsdp = b""
        self.pointers: list[tuple[int, int]] = []
        self.checksums: list[tuple[int, int, int]] = []
        self.offsets: dict[str, int] = {}

    def add(self, table: bytes, pointers: Iterable[tuple[int, int]] = (), *, align: int = 16) -> int:
        """Append a table whose `pointers` (offset in it, size) hold offsets into the image; its offset."""
        self.data += bytes(-len(self.data) % align)
        at = len(self.data)
        self.data += table
        signature = table[:4].decode("ascii")
        self.offsets[signature] = at
        self.pointers += [(at + offset, size) for offset, size in pointers]
        if signature != "FACS":  # the one table without a checksum
            self.checksums.append((at + 9, at, len(table)))
        return at

    def place(self, tables_gpa: int) -> tuple[bytes, bytes]:
        """(tables, rsdp) for tables at `tables_gpa`, with pointers and checksums right."""
        data, rsdp = bytearray(self.data), bytearray(self.rsdp)
        for block, pointers, checksums in (
            (data, self.pointers, self.checksums),
            (rsdp, self.RSDP_POINTERS, self.RSDP_CHECKSUMS),
        ):
            for offset, size in pointers:
                value = int.from_bytes(block[offset : offset + size], "little") + tables_gpa
                block[offset : offset + size] = value.to_bytes(size, "little")
            for at, start, length in checksums:
                block[at] = 0
                block[at] = -sum(block[start : start + length]) & 0xFF
        return bytes(data), bytes(rsdp)


class AcpiTables:
    """Placed tables. `pieces` are (GPA, bytes) to be written, `rsdp_gpa` is what boot protocols pass on."""

    __slots__ = ("pieces", "rsdp_gpa")

    def __init__(self, rsdp_gpa: int, pieces: tuple[tuple[int, bytes], ...]) -> None:
        self.rsdp_gpa = rsdp_gpa
        self.pieces = pieces


def build_acpi(platform: Platform, *, base: int = layout.ACPI_TABLES, end: int = layout.MP_CONFIG) -> AcpiTables:
    """Tables for a kernel booted without firmware: RSDP at `base`, the rest behind it.

    Raises ConfigError when they do not fit below `end`.
    """
    image = build_image(platform)
    tables_gpa = base + TABLE_ALIGN
    if tables_gpa + len(image.data) > end:
        raise ConfigError("acpi", f"{len(image.data)} bytes of ACPI tables do not fit in [{base:#x}, {end:#x})")
    tables, rsdp = image.place(tables_gpa)
    return AcpiTables(base, ((base, rsdp), (tables_gpa, tables)))


def build_image(platform: Platform) -> AcpiImage:
    """All tables of `platform`, relocatable to any multiple of TABLE_ALIGN."""
    image = AcpiImage()
    facs = image.add(_facs(), align=TABLE_ALIGN)
    dsdt_at = image.add(_table("DSDT", 2, dsdt.definition_block(platform)))
    # FIRMWARE_CTRL, DSDT and its 64-bit twin X_DSDT; of the two FIRMWARE_CTRLs one has to be zero
    fadt = image.add(_fadt(platform, facs, dsdt_at), ((36, 4), (40, 4), (140, 8)))
    roots = [fadt, image.add(_table("APIC", 5, _madt(platform))), image.add(_table("WAET", 1, _WAET_FLAGS))]
    rsdt = image.add(_table("RSDT", 1, _pointers(roots, 4)), [(36 + 4 * n, 4) for n in range(len(roots))])
    xsdt = image.add(_table("XSDT", 1, _pointers(roots, 8)), [(36 + 8 * n, 8) for n in range(len(roots))])
    image.rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt, 36, xsdt, 0)
    return image


def _table(signature: str, revision: int, body: bytes) -> bytes:
    """A table with its 36-byte header (5.2.6); the checksum is filled in when it is placed."""
    header = struct.pack("<4sIBB", signature.encode(), 36 + len(body), revision, 0)
    return header + struct.pack("<6s8sI4sI", OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1) + body


def _pointers(offsets: Iterable[int], size: int) -> bytes:
    return b"".join(offset.to_bytes(size, "little") for offset in offsets)


_WAET_FLAGS = struct.pack("<I", 0b11)  # the RTC needs no double read, the PM timer is read right the first time


def _facs() -> bytes:
    """Firmware ACPI control structure: global lock, no waking vector (5.2.10)."""
    return struct.pack("<4sIIIIIQB3xI24x", b"FACS", 64, 0, 0, 0, 0, 0, 2, 0)


def _gas(port: int, width: int, access: int) -> bytes:
    """Generic address structure of a port: `width` in bits, `access` 1, 2 or 3 for byte, word or dword."""
    return struct.pack("<BBBBQ", SYSTEM_IO, width, 0, access, port)


_NO_REGISTER = bytes(12)


def _fadt(platform: Platform, facs: int, dsdt_at: int) -> bytes:
    """Fixed ACPI description table, version 6.3 (5.2.9). `facs` and `dsdt_at` are offsets into the image."""
    base = layout.PORT_ACPI_PM
    event, control = base + layout.PM1_EVENT, base + layout.PM1_CONTROL
    timer, gpe0 = base + layout.PM_TIMER, base + layout.GPE0
    flags = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP
    century = 0x32 if platform.rtc else 0
    body = struct.pack("<IIBBH", facs, dsdt_at, 0, 0, layout.IRQ_ACPI)
    body += struct.pack("<IBBBB", 0, 0, 0, 0, 0)  # no SMI_CMD: nothing to enable, nothing to hand over
    body += struct.pack("<8I", event, 0, control, 0, 0, timer, gpe0, 0)
    body += struct.pack("<8B", 4, 2, 0, 4, layout.GPE0_LENGTH, 0, 0, 0)
    body += struct.pack("<HHHHBB", 0xFFFF, 0xFFFF, 0, 0, 0, 0)  # C2 and C3 take too long: they are not supported
    body += struct.pack("<BBBHBI", 0, 0, century, _boot_architecture(platform), 0, flags)
    body += _gas(layout.PORT_PCI_CONFIG + 1, 8, 1) + struct.pack("<BHB", RESET_VALUE, 0, 3)
    body += struct.pack("<QQ", 0, dsdt_at)
    body += _gas(event, 32, 2) + _NO_REGISTER + _gas(control, 16, 2) + _NO_REGISTER * 2
    body += _gas(timer, 32, 3) + _gas(gpe0, 8 * layout.GPE0_LENGTH, 1) + _NO_REGISTER
    body += _NO_REGISTER * 2 + b"pykvm\0\0\0"  # sleep registers of reduced hardware; hypervisor vendor
    return _table("FACP", 6, body)


def _boot_architecture(platform: Platform) -> int:
    flags = VGA_NOT_PRESENT
    if platform.keyboard or platform.serial:
        flags |= LEGACY_DEVICES
    if platform.keyboard:
        flags |= BOOT_8042
    if not platform.rtc:
        flags |= CMOS_RTC_NOT_PRESENT
    return flags


def _madt(platform: Platform) -> bytes:
    """Multiple APIC description table: processors, IOAPIC, overrides, NMI inputs (5.2.12)."""
    body = struct.pack("<II", layout.LAPIC, int(platform.pic))
    for uid, apic_id in enumerate(platform.apic_ids):
        if apic_id < X2APIC_FIRST_ID:
            body += struct.pack("<BBBBI", 0, 8, uid, apic_id, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid)
    if platform.ioapic:
        body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0)
        body += struct.pack("<BBBBIH", 2, 10, 0, layout.IRQ_PIT, layout.PIT_PIN, 0)
        body += struct.pack("<BBBBIH", 2, 10, 0, layout.IRQ_ACPI, layout.IRQ_ACPI, ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # every processor: LINT1 is NMI
    if any(apic_id >= X2APIC_FIRST_ID for apic_id in platform.apic_ids):
        body += struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFF_FFFF, 1)
    return body
