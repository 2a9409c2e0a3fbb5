"""A machine with every virtio device is reset, again and again: each driver finds its device as new."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import guests
import pytest
from qcow2 import qcow2

from pykvm import Outcome
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.blk import Disk
from pykvm.virtio.console import Console
from pykvm.virtio.imagedisk import ImageDisk
from pykvm.virtio.rng import Rng
from pykvm.virtio.share import Share
from pykvm.virtio.vsock import Vsock

if TYPE_CHECKING:
    from pathlib import Path

    from pykvm.virtio.device import VirtioDevice

VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")


@pytest.mark.host
@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_all_devices_through_resets(tmp_path: Path, irqchip: str) -> None:
    """The driver of the last disk, natively served or by a daemon, works after each reset, by interrupts."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    devices: list[VirtioDevice] = [Rng(), Balloon(), Vsock(3, str(tmp_path / "vsock")), Console()]
    if os.geteuid() == 0 and any(map(os.path.exists, VIRTIOFSD)):
        devices.append(Share(str(tmp_path), tag="work"))
    devices.append(Disk(image, queues=2, thread=True))
    if shutil.which("qemu-storage-daemon"):
        devices.append(ImageDisk(str(qcow2(tmp_path / "disk.qcow2", 1 << 20)), "qcow2"))
    last = len(devices) - 1
    cmdline = f"mode=check count=8 irq=1 base={0xD0000000 + last * 0x1000:#x} gsi={16 + last}"
    with guests.pc("blk.elf", cmdline, devices=devices, irqchip=irqchip) as machine:
        for _ in range(4):
            assert machine.run(guests.RUN_S) == Outcome("DEBUG_EXIT", 0), guests.text(machine)
            machine.reset()
    assert guests.text(machine).count("by interrupt, ok") == 4
