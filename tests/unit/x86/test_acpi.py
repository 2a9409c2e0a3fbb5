"""The ACPI tables: followed from the RSDP as an operating system does, and read back by iasl."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pykvm.errors import ConfigError
from pykvm.x86 import aml, layout
from pykvm.x86.acpi import AcpiTables, build_acpi
from pykvm.x86.platform import Platform

FULL = Platform(
    [0, 1, 254, 255, 300], serial=range(4), mouse=True, fw_cfg=True, pvpanic=True,
    extra=[aml.device("VIO0", aml.name("_HID", aml.string("LNRO0005")), aml.name("_UID", aml.integer(0)))],
)  # fmt: skip
BARE = Platform([0], ioapic=False, pic=False, serial=(), keyboard=False, rtc=False, pci=False)
PLATFORMS = [Platform(), Platform(range(64)), FULL, BARE]


class Memory:
    """Guest memory around the BIOS area."""

    def __init__(self, tables: AcpiTables) -> None:
        self.data = bytearray(0x110000)
        for gpa, piece in tables.pieces:
            self.data[gpa : gpa + len(piece)] = piece
        self.rsdp_gpa = tables.rsdp_gpa

    def unpack(self, fields: str, gpa: int) -> tuple[int, ...]:
        return struct.unpack_from("<" + fields, self.data, gpa)

    def table(self, gpa: int) -> bytes:
        """The table at `gpa`, its checksum verified."""
        data = bytes(self.data[gpa : gpa + self.unpack("I", gpa + 4)[0]])
        assert sum(data) & 0xFF == 0, f"checksum of {data[:4]!r}"
        return data

    def root(self) -> dict[bytes, bytes]:
        """Every table that the XSDT leads to, and the DSDT and FACS that the FADT does."""
        xsdt_gpa = self.unpack("Q", self.rsdp_gpa + 24)[0]
        xsdt = self.table(xsdt_gpa)
        found = {xsdt[:4]: xsdt}
        for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
            table = self.table(gpa)
            found[table[:4]] = table
        facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
        found[b"DSDT"] = self.table(dsdt)
        assert facs % 64 == 0
        found[b"FACS"] = bytes(self.data[facs : facs + 64])
        return found


@pytest.fixture(params=PLATFORMS, ids=["default", "64 cpus", "full", "bare"])
def platform(request: pytest.FixtureRequest) -> Platform:
    """Machines with few and with many devices."""
    chosen = request.param
    assert isinstance(chosen, Platform)
    return chosen


def test_rsdp_is_found_where_it_is_searched(platform: Platform) -> None:
    """On a 16-byte boundary of the BIOS area, with both checksums right."""
    memory = Memory(build_acpi(platform))
    assert layout.BIOS_AREA <= memory.rsdp_gpa < layout.BIOS_AREA_END
    assert memory.rsdp_gpa % 16 == 0
    rsdp = memory.data[memory.rsdp_gpa : memory.rsdp_gpa + 36]
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
    assert sum(rsdp[:20]) & 0xFF == 0 and sum(rsdp) & 0xFF == 0


def test_every_table_is_reached_and_sums_to_zero(platform: Platform) -> None:
    """XSDT and RSDT lead to the same tables."""
    memory = Memory(build_acpi(platform))
    found = memory.root()
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"WAET", b"DSDT", b"FACS"}
    rsdt = memory.table(memory.unpack("I", memory.rsdp_gpa + 16)[0])
    xsdt = found[b"XSDT"]
    assert [each for (each,) in struct.iter_unpack("<I", rsdt[36:])] == [
        each for (each,) in struct.iter_unpack("<Q", xsdt[36:])
    ]


def test_fadt_addresses_of_32_and_64_bits_agree(platform: Platform) -> None:
    """Linux warns of every mismatch between a block's old and its generic address or length."""
    fadt = Memory(build_acpi(platform)).root()[b"FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<I", fadt, 40)[0] == struct.unpack_from("<Q", fadt, 140)[0]
    for short, length_at, generic in ((56, 88, 148), (64, 89, 172), (76, 91, 208), (80, 92, 220)):
        space, width, offset, _, address = struct.unpack_from("<BBBBQ", fadt, generic)
        assert (space, offset) == (1, 0)
        assert address == struct.unpack_from("<I", fadt, short)[0] != 0
        assert width == 8 * fadt[length_at]


def test_fadt_tells_only_of_what_exists() -> None:
    """The boot flags follow the keyboard controller and the clock; there is no SMI command and no VGA."""
    full = Memory(build_acpi(FULL)).root()[b"FACP"]
    bare = Memory(build_acpi(BARE)).root()[b"FACP"]
    assert struct.unpack_from("<H", full, 109)[0] == 0b000111
    assert struct.unpack_from("<H", bare, 109)[0] == 0b100100
    assert (full[108], bare[108]) == (0x32, 0)
    assert struct.unpack_from("<I", full, 48)[0] == 0
    assert struct.unpack_from("<BBBBQB", full, 116) == (1, 8, 0, 1, 0xCF9, 6)


def madt_entries(platform: Platform) -> tuple[int, list[bytes]]:
    """The MADT's flags and its entries."""
    madt = Memory(build_acpi(platform)).root()[b"APIC"]
    address, flags = struct.unpack_from("<II", madt, 36)
    assert address == 0xFEE0_0000
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return flags, entries


def test_madt_names_every_processor_once() -> None:
    """APIC ids from 255 on need the x2APIC structure; UIDs count through."""
    flags, entries = madt_entries(FULL)
    assert flags == 1
    assert [struct.unpack("<BBBBI", each) for each in entries if each[0] == 0] == [
        (0, 8, 0, 0, 1), (0, 8, 1, 1, 1), (0, 8, 2, 254, 1),
    ]  # fmt: skip
    assert [struct.unpack("<BBHIII", each) for each in entries if each[0] == 9] == [
        (9, 16, 0, 255, 1, 3), (9, 16, 0, 300, 1, 4),
    ]  # fmt: skip
    assert [each[0] for each in entries if each[0] in (4, 10)] == [4, 10]


def test_madt_routes_the_timer_and_the_sci() -> None:
    """ISA interrupt 0 arrives at pin 2, interrupt 9 is level-triggered and active high."""
    _, entries = madt_entries(Platform())
    assert [struct.unpack("<BBBBII", each) for each in entries if each[0] == 1] == [(1, 12, 0, 0, 0xFEC0_0000, 0)]
    assert [struct.unpack("<BBBBIH", each) for each in entries if each[0] == 2] == [
        (2, 10, 0, 0, 2, 0), (2, 10, 0, 9, 9, 0x0D),
    ]  # fmt: skip
    assert [struct.unpack("<BBBHB", each) for each in entries if each[0] == 4] == [(4, 6, 0xFF, 0, 1)]


def test_madt_without_pic_and_ioapic() -> None:
    """No compatibility flag, no IOAPIC and no overrides of its inputs."""
    flags, entries = madt_entries(BARE)
    assert flags == 0
    assert {each[0] for each in entries} == {0, 4}


def test_tables_leave_the_mp_table_alone() -> None:
    """Sixty-four processors and a hundred devices fit; what does not is refused."""
    many = [aml.device(f"V{n:03}", aml.name("_UID", aml.integer(n))) for n in range(100)]
    tables = build_acpi(Platform(range(64), extra=many))
    assert all(gpa >= layout.BIOS_AREA and gpa + len(data) <= layout.MP_CONFIG for gpa, data in tables.pieces)
    with pytest.raises(ConfigError, match="do not fit"):
        build_acpi(Platform(extra=[aml.buffer(bytes(layout.MP_CONFIG - layout.ACPI_TABLES))]))


# -- iasl ----------------------------------------------------------------------------------------------------


def iasl(directory: Path, *arguments: str) -> str:
    """Run iasl; its output. It must succeed."""
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")
    done = subprocess.run([program, *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_iasl_disassembles_every_table_without_complaint(platform: Platform, tmp_path: Path) -> None:
    """Every table is decoded to its end, with a good checksum and no unknown field."""
    for signature, table in Memory(build_acpi(platform)).root().items():
        source = tmp_path / f"{signature.decode()}.dat"
        source.write_bytes(table)
        text = iasl(tmp_path, "-d", source.name) + source.with_suffix(".dsl").read_text()
        assert not re.search(r"(?i)\berror|\bwarning|invalid|incorrect|unknown|should be", text), text


def test_iasl_recompiles_the_dsdt_to_the_same_objects(platform: Platform, tmp_path: Path) -> None:
    """The disassembled DSDT is correct ASL: the compiler has no error and no warning."""
    (tmp_path / "dsdt.dat").write_bytes(Memory(build_acpi(platform)).root()[b"DSDT"])
    iasl(tmp_path, "-d", "dsdt.dat")
    assert "0 Errors, 0 Warnings" in iasl(tmp_path, "dsdt.dsl")


def test_dsdt_holds_exactly_the_devices_that_exist(tmp_path: Path) -> None:
    """The device list follows the platform."""
    expected = {
        FULL: {"PCI0", "KBD", "MOU", "RTC", "FWCF", "PEVT", "COM1", "COM2", "COM3", "COM4", "VIO0"},
        BARE: set(),
        Platform(serial=(1,)): {"PCI0", "KBD", "RTC", "COM2"},
    }
    for number, (platform, devices) in enumerate(expected.items()):
        source = tmp_path / f"dsdt{number}.dat"
        source.write_bytes(Memory(build_acpi(platform)).root()[b"DSDT"])
        iasl(tmp_path, "-d", source.name)
        assert set(re.findall(r"Device \((\w+)\)", source.with_suffix(".dsl").read_text())) == devices
