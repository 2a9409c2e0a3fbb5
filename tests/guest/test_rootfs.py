"""A stock Debian with systemd on a virtio disk, made by scripts/make-rootfs: to its login prompt, and down again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pexpect
import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BOOT_SECONDS = 240
# Units that a test machine can do without; each costs the lab's emulated CPU a second or two.
MASKED = (
    "e2scrub_reap.service", "systemd-binfmt.service", "systemd-journal-flush.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@dm_mod.service", "modprobe@loop.service", "systemd-update-utmp.service",
    "getty@tty1.service", "systemd-pstore.service",
)  # fmt: skip
QUIET = "quiet " + " ".join(f"systemd.mask={unit}" for unit in MASKED)


@pytest.mark.timeout(2 * BOOT_SECONDS)
def test_debian_boots_and_shuts_down_cleanly(start: Callable[..., pexpect.spawn[str]], rootfs: Path) -> None:
    """systemd brings a getty to the serial port, no unit fails, and after poweroff the file system is clean."""
    kernel, initrd = rootfs.with_name("debian.img.vmlinuz"), rootfs.with_name("debian.img.initrd")
    console = start(
        "--mem", "1G", "--cpus", "2", "--disk", rootfs, kernel, "--initrd", initrd,
        "--append", f"console=ttyS0 root=/dev/vda rw {QUIET}",
    )  # fmt: skip
    console.expect("login: ", timeout=BOOT_SECONDS)
    console.sendline("root")
    console.expect(r"root@pykvm:\S+ ")
    console.sendline(
        "date > /root/was-here; echo failed=$(systemctl --failed --plain --no-legend | wc -l) cpus=$(nproc)"
    )
    console.expect(r"failed=(\d+) cpus=(\d+)")
    assert console.match.groups() == ("0", "2")
    console.sendline("poweroff")
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
    checked = subprocess.run(["e2fsck", "-fn", rootfs], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    found = subprocess.run(["debugfs", "-R", "cat /root/was-here", rootfs], capture_output=True, text=True, check=True)
    assert " UTC 20" in found.stdout  # the date that the guest wrote
