"""ACPI tables for a firmware: the files of QEMU's linker/loader, through fw_cfg. Layer: x86.

The firmware (SeaBIOS, OVMF) copies the tables where it likes and then follows the commands: allocate a
file, add the address of one file to a pointer in another, compute a checksum. A command has 128 bytes.

Source: QEMU, hw/acpi/bios-linker-loader.c (the format's only description); SeaBIOS,
src/fw/romfile_loader.h.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.acpi import AcpiImage

TABLES_FILE, RSDP_FILE, LOADER_FILE = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"

ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
ZONE_HIGH, ZONE_FSEG = 1, 2  # anywhere in RAM below 4 GiB; the segment at 0xf0000, where the RSDP is searched
COMMAND_LENGTH = 128


def loader_files(image: AcpiImage, *, align: int = 64) -> dict[str, bytes]:
    """The three fw_cfg files, by name, that make a firmware install `image`."""
    commands = [
        _command(ALLOCATE, "<56sIB", RSDP_FILE.encode(), 16, ZONE_FSEG),
        _command(ALLOCATE, "<56sIB", TABLES_FILE.encode(), align, ZONE_HIGH),
    ]
    for name, pointers, checksums in (
        (TABLES_FILE, image.pointers, image.checksums),
        (RSDP_FILE, image.RSDP_POINTERS, image.RSDP_CHECKSUMS),
    ):
        commands += [
            _command(ADD_POINTER, "<56s56sIB", name.encode(), TABLES_FILE.encode(), offset, size)
            for offset, size in pointers
        ]
        commands += [
            _command(ADD_CHECKSUM, "<56sIII", name.encode(), at, start, length) for at, start, length in checksums
        ]
    return {TABLES_FILE: bytes(image.data), RSDP_FILE: image.rsdp, LOADER_FILE: b"".join(commands)}


def _command(command: int, layout: str, *fields: object) -> bytes:
    return (struct.pack("<I", command) + struct.pack(layout, *fields)).ljust(COMMAND_LENGTH, b"\0")
