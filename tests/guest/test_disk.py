"""A disk under Debian's kernel: ext4 on a raw image, its serial number and queues, and space that is given back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.virtio.blk import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BOOT_SECONDS = 120  # the lab's CPU is emulated and may share its machine
MIB = 1 << 20
SCRIPT = b"""#!/bin/sh
set -e
echo "serial $(cat /sys/block/vda/serial), queues $(ls /sys/block/vda/mq | wc -l), ro $(cat /sys/block/vdb/ro)"
mkdir /mnt
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/kept bs=1M count=2 2>/dev/null
dd if=/dev/urandom of=/mnt/gone bs=1M count=24 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
echo "kept $(sha256sum </mnt/kept)"
rm /mnt/gone
sync
fstrim /mnt
umount /mnt
! dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null
echo "second $(head -c 12 /dev/vdb)"
"""


@pytest.fixture
def disks(tmp_path: Path) -> tuple[Path, Path]:
    """64 MiB with an ext4 file system, and a little file that begins with `read only ok`."""
    first, second = tmp_path / "ext4.img", tmp_path / "second.img"
    with first.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", first], check=True)
    second.write_bytes(b"read only ok".ljust(MIB, b"."))
    return first, second


def test_ext4_on_a_disk(
    guest_kernel: Path, initrd_with: Callable[..., Path], disks: tuple[Path, Path], tmp_path: Path
) -> None:
    """Debian mounts, writes, trims and unmounts: a clean image with the data, without the space of what is gone."""
    initrd = initrd_with("virtio_mmio", "virtio_blk", files={"test": SCRIPT})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet pykvm.run=/test")
    first = Disk(disks[0], id="root-0001", queues=2)
    with Pc(boot, memory="256M", cpus=2, devices=[first, Disk(disks[1], readonly=True)]) as pc:
        outcome = pc.run(timeout=BOOT_SECONDS)
        said = pc.console.text
    assert outcome == Outcome.POWER_OFF and "status 0" in said, (outcome, said[-2000:])
    assert "serial root-0001, queues 2, ro 1" in said
    assert "second read only ok" in said
    assert first.requests["discard"] > 0 and first.requests["flush"] > 0 and not first.errors
    assert disks[0].stat().st_blocks * 512 < 24 * MIB
    subprocess.run(["/sbin/e2fsck", "-fn", disks[0]], check=True)
    subprocess.run(["/sbin/debugfs", "-R", f"dump /kept {tmp_path}/kept", disks[0]], check=True)
    found = re.search(r"kept ([0-9a-f]{64})", said)
    digest = subprocess.run(["sha256sum", tmp_path / "kept"], capture_output=True, text=True, check=True).stdout
    assert found and digest.startswith(found.group(1))
