"""Persistent memory under Debian's kernel: ext4 with DAX on /dev/pmem0."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    import pexpect

MIB = 1 << 20
SCRIPT = b"""#!/bin/sh
set -e
mkdir /mnt /ro
mount -t ext4 -o dax /dev/pmem0 /mnt
mount -t ext4 -o ro,dax /dev/pmem1 /ro
grep -E ' /(mnt|ro) ' /proc/mounts
echo "readable $(sha256sum </ro/word)"
dd if=/dev/urandom of=/mnt/kept bs=1M count=3 2>/dev/null
sync
echo "kept $(sha256sum </mnt/kept)"
while :; do dd if=/dev/urandom of=/mnt/noise bs=64k count=16 conv=notrunc 2>/dev/null; done
"""


def make_ext4(path: Path, word: Path | None = None) -> None:
    """64 MiB with ext4 in blocks of a page, as DAX wants it."""
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", path], check=True)
    if word is not None:
        subprocess.run(["/sbin/debugfs", "-w", "-R", f"write {word} word", path], check=True)


def digest(path: Path) -> str:
    """Its SHA-256."""
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


@pytest.mark.timeout(300)
def test_ext4_with_dax(
    guest_kernel: Path, initrd_with: Callable[..., Path], start: Callable[..., pexpect.spawn[str]], tmp_path: Path
) -> None:
    """Debian mounts a writable and a read-only one; after kill -9 amid writes all that was synced is there."""
    first, second, word = tmp_path / "first.img", tmp_path / "second.img", tmp_path / "word"
    word.write_bytes(os.urandom(10000))
    make_ext4(first)
    make_ext4(second, word)
    before = digest(second)
    initrd = initrd_with("virtio_mmio", "virtio_pmem", "nd_pmem", files={"test": SCRIPT})
    console = start(
        *("--mem", "256M", "--pmem", first, "--pmem", f"{second},ro", "--initrd", initrd),
        *("--append", "console=ttyS0 quiet pykvm.run=/test", guest_kernel),
    )
    console.expect("/dev/pmem0 /mnt ext4 rw,[^\n]*dax")
    console.expect("/dev/pmem1 /ro ext4 ro,[^\n]*dax")
    console.expect(f"readable {digest(word)}")
    console.expect("kept ([0-9a-f]{64})")
    kept = console.match[1]
    console.kill(signal.SIGKILL)
    console.wait()
    subprocess.run(["/sbin/e2fsck", "-fp", first], check=False)  # 1: its journal was replayed
    subprocess.run(["/sbin/e2fsck", "-fn", first], check=True)
    subprocess.run(["/sbin/debugfs", "-R", f"dump /kept {tmp_path}/kept", first], check=True)
    assert digest(tmp_path / "kept") == kept
    assert digest(second) == before
