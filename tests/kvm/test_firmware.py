"""Firmware on real KVM: Debian's SeaBIOS and qboot, configured through fw_cfg."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pykvm import Outcome
from pykvm.board import Pc
from pykvm.config import BootConfig, MachineConfig
from pykvm.devices.debugcon import DebugCon
from pykvm.x86.layout import PORT_SEABIOS_DEBUG

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
QBOOT = Path("/usr/share/qemu/qboot.rom")

# The entry of the setup code: print "ok" on port 0xe9 and power off by outw(0x604, 0x2000)
PRINT_AND_POWER_OFF = bytes.fromhex("b06f e6e9 b06b e6e9 ba0406 b80020 ef f4")


def firmware(path: Path, package: str) -> str:
    """The path, if the file is there."""
    if not path.exists():
        pytest.skip(f"{path} is not installed (Debian package {package})")
    return str(path)


def bzimage() -> bytes:
    """The smallest image with a setup header of protocol 2.06: one setup sector whose code is above."""
    setup = bytearray(1024)
    struct.pack_into("<B", setup, 0x1F1, 1)
    struct.pack_into("<H2s4sH", setup, 0x1FE, 0xAA55, b"\xeb\x6a", b"HdrS", 0x206)
    struct.pack_into("<B", setup, 0x211, 1)
    struct.pack_into("<I", setup, 0x214, 0x100000)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<I", setup, 0x238, 255)
    setup[0x26C : 0x26C + len(PRINT_AND_POWER_OFF)] = PRINT_AND_POWER_OFF
    return bytes(setup + bytes(4096))


def debug_port(pc: Pc) -> bytearray:
    """What the firmware prints on port 0x402 from now on, apart from what it shows on its screen, COM1."""
    log = bytearray()
    region = pc.bus.ports.find(PORT_SEABIOS_DEBUG, 1)
    if region is not None:
        pc.detach(region.device)
    pc.attach(DebugCon(log.extend), ports=range(PORT_SEABIOS_DEBUG, PORT_SEABIOS_DEBUG + 1))
    return log


def run_until(pc: Pc, text: bytes, timeout: float) -> Outcome:
    """Run until the console shows `text`: then Outcome STOPPED."""
    shown = bytearray()

    def look(data: bytes) -> None:
        shown.extend(data)
        if text in shown:
            pc.finish(Outcome("STOPPED"))

    pc.console.sink = look
    return pc.run(timeout)


def test_seabios_finds_nothing_to_boot() -> None:
    """POST passes: memory from fw_cfg, PCI bridge, all processors, ACPI tables; then there is no disk."""
    boot = BootConfig(bios=firmware(SEABIOS, "seabios"))
    with Pc(boot, MachineConfig(memory="64M", cpus=2, firmware=True)) as pc:
        log = debug_port(pc)
        outcome = run_until(pc, b"No bootable device", 100)
        assert outcome.kind == "STOPPED", f"{outcome}: {pc.console.text} {log.decode('latin-1')}"
        for line in (
            b"Running on QEMU (i440fx)",
            b"QEMU fw_cfg DMA interface supported",
            b"Found 2 cpu(s) max supported 2 cpu(s)",
            b"ACPI: parse DSDT",
        ):
            assert line in log


def test_qboot_starts_a_kernel_from_fw_cfg(tmp_path: Path) -> None:
    """The kernel's parts arrive, it is entered, and port 0x604 powers off; a reset machine does it again."""
    kernel = tmp_path / "bzimage"
    kernel.write_bytes(bzimage())
    boot = BootConfig(str(kernel), bios=firmware(QBOOT, "qemu-system-data"))
    with Pc(boot, MachineConfig(memory="32M", firmware=True)) as pc:
        for round_ in (1, 2):
            assert pc.run(20) == Outcome.POWER_OFF
            assert pc.console.text.count("ok") == round_
            pc.reset()
