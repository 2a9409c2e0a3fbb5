"""The linker/loader files, followed by a small model of the firmware that executes them."""

from __future__ import annotations

import struct

import pytest

from pykvm.x86.acpi import build_image
from pykvm.x86.acpi_loader import COMMAND_LENGTH, LOADER_FILE, RSDP_FILE, TABLES_FILE, loader_files
from pykvm.x86.platform import Platform

TABLES_GPA, RSDP_GPA = 0x7FFE_0000, 0xF_5A00


def execute(files: dict[str, bytes]) -> dict[str, bytes]:
    """What a firmware makes of the files when it allocates them at the addresses above."""
    addresses = {TABLES_FILE: TABLES_GPA, RSDP_FILE: RSDP_GPA}
    memory: dict[str, bytearray] = {}
    script = files[LOADER_FILE]
    assert len(script) % COMMAND_LENGTH == 0
    for at in range(0, len(script), COMMAND_LENGTH):
        entry = script[at : at + COMMAND_LENGTH]
        command = int.from_bytes(entry[:4], "little")
        file = entry[4:60].rstrip(b"\0").decode()
        if command == 1:
            align, zone = struct.unpack_from("<IB", entry, 60)
            assert addresses[file] % align == 0
            assert zone == {TABLES_FILE: 1, RSDP_FILE: 2}[file]
            memory[file] = bytearray(files[file])
        elif command == 2:
            source = entry[60:116].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", entry, 116)
            assert source in memory
            value = int.from_bytes(memory[file][offset : offset + size], "little") + addresses[source]
            memory[file][offset : offset + size] = value.to_bytes(size, "little")
        elif command == 3:
            at_byte, start, length = struct.unpack_from("<III", entry, 60)
            memory[file][at_byte] = (memory[file][at_byte] - sum(memory[file][start : start + length])) & 0xFF
        else:
            pytest.fail(f"unknown command {command}")
    return {name: bytes(data) for name, data in memory.items()}


@pytest.mark.parametrize("cpus", [1, 64])
def test_firmware_arrives_at_the_same_tables(cpus: int) -> None:
    """Executing the commands gives byte for byte what placing the image directly gives."""
    image = build_image(Platform(range(cpus), fw_cfg=True))
    loaded = execute(loader_files(image))
    assert (loaded[TABLES_FILE], loaded[RSDP_FILE]) == image.place(TABLES_GPA)
