"""Unmodified guests under pykvm in the lab, where ring 0 is native: Debian's kernel, memtest86+, iPXE."""

from __future__ import annotations

import re
from pathlib import Path

import pexpect
import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.boot.image import ImageFile
from pykvm.boot.setup_header import SetupHeader
from pykvm.boot.unpack import find_payload, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARKER = "pykvm-initramfs: up"
PROMPT = "# "
BOOT_SECONDS = 120  # for one boot; the lab's CPU is emulated and may share its machine
COMPLAINT = re.compile(r".*(ACPI (BIOS )?(Error|Warning)|ACPI Exception).*")


def test_boot_to_a_shell_with_two_cpus(
    start: Callable[..., pexpect.spawn[str]], guest_kernel: Path, initramfs: Path
) -> None:
    """Debian's kernel reaches a shell with both CPUs; commands typed on the console run; poweroff ends it with 0."""
    console = start(
        "--mem", "512M", "--cpus", "2", guest_kernel, "--initrd", initramfs, "--append", "console=ttyS0"
    )  # fmt: skip
    console.expect_exact(MARKER)
    console.expect_exact(PROMPT)
    console.sendline("echo cpus=$(nproc)")
    console.expect_exact("cpus=2")
    console.sendline("dmesg | grep -i acpi; echo dmesg-done")
    console.expect(r"\ndmesg-done")
    assert "ACPI: Interpreter enabled" in console.before
    assert [line for line in console.before.splitlines() if COMPLAINT.match(line)] == []
    console.sendline("poweroff -f")
    console.expect(pexpect.EOF)
    console.close()
    assert (console.exitstatus, console.signalstatus) == (0, None)


@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("classic", {"unpack": False}, {}),
        ("split", {}, {"irqchip": "split"}),
        ("python", {}, {"c_actions": False}),
    ],
)
def test_other_ways_to_boot(
    name: str, options: dict[str, bool], config: dict[str, object], guest_kernel: Path, initramfs: Path
) -> None:
    """The kernel also boots by decompressing itself, on a split irqchip, and with every access handled in Python."""
    boot = BootConfig(
        str(guest_kernel), initrd=str(initramfs), cmdline="console=ttyS0 quiet pykvm.run=nproc", **options
    )  # fmt: skip
    with Pc(boot, memory="512M", cpus=2, **config) as pc:
        assert pc.boot is not None
        assert pc.boot.protocol == ("linux64" if name == "classic" else "linux64-unpacked")
        outcome = pc.run(timeout=BOOT_SECONDS)
        assert outcome == Outcome.POWER_OFF, (outcome, pc.console.text[-2000:])
        assert re.search(r"^2\r?$", pc.console.text, re.MULTILINE)
        assert "pykvm-initramfs: status 0" in pc.console.text


def test_pvh(guest_kernel: Path, initramfs: Path, tmp_path: Path) -> None:
    """The unpacked vmlinux boots by its PVH note and powers off."""
    vmlinux = tmp_path / "vmlinux"
    vmlinux.write_bytes(unpacked(guest_kernel))
    boot = BootConfig(str(vmlinux), initrd=str(initramfs), cmdline="console=ttyS0 quiet pykvm.run=true")
    with Pc(boot, memory="512M") as pc:
        assert pc.boot is not None and pc.boot.protocol == "pvh"
        outcome = pc.run(timeout=BOOT_SECONDS)
        assert outcome == Outcome.POWER_OFF, (outcome, pc.console.text[-2000:])
        assert "pykvm-initramfs: status 0" in pc.console.text


def unpacked(bzimage: Path) -> bytes:
    """The vmlinux inside a bzImage."""
    payload = find_payload(SetupHeader(ImageFile(bzimage)))
    whole = bytearray(payload.size)

    def sink(offset: int, piece: bytes | bytearray) -> None:
        whole[offset : offset + len(piece)] = piece

    unpack(payload, lambda head: sink)
    return bytes(whole)


def test_memtest_starts(start: Callable[..., pexpect.spawn[str]]) -> None:
    """memtest86+ (Linux boot protocol, no payload) draws its screen on the serial console."""
    console = start("--mem", "64M", "/boot/memtest86+x64.bin", "--append", "console=ttyS0,115200")
    console.expect("Memtest86")
    console.send("\x01x")
    console.expect(pexpect.EOF)


def test_ipxe_starts(start: Callable[..., pexpect.spawn[str]]) -> None:
    """ipxe.lkrn (16-bit Linux boot protocol) says who it is on the serial console."""
    console = start("--mem", "128M", "/boot/ipxe.lkrn")
    console.expect("iPXE")
    console.send("\x01x")
    console.expect(pexpect.EOF)
