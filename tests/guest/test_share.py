"""Shared folders and a qcow2 disk in Debian's kernel, with the real virtiofsd and qemu-storage-daemon."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pexpect
from qcow2 import qcow2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARKER = "pykvm-initramfs: up"


def kill_virtiofsd(folder: Path) -> None:
    """kill -9 the virtiofsd that shares `folder`, both of its processes."""
    killed = 0
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words and words[0].endswith(b"virtiofsd") and any(os.fsencode(folder) in word for word in words):
            os.kill(int(entry.name), signal.SIGKILL)
            killed += 1
    assert killed


class Shell:
    """The guest's shell: `run` gives what a command printed and its status."""

    def __init__(self, console: pexpect.spawn[str]) -> None:
        self.console = console
        console.expect_exact(MARKER)
        console.expect_exact("# ")

    def run(self, command: str) -> tuple[str, int]:
        """Run one command."""
        self.console.sendline(f"echo be''gin; {command}; echo status=$?.")
        self.console.expect(r"\nbegin\r*\n(.*)status=(\d+)\.")
        said, status = self.console.match.groups()
        return said.replace("\r", ""), int(status)


def test_shares_and_qcow2(
    start: Callable[..., pexpect.spawn[str]],
    guest_kernel: Path,
    initrd_with: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Files go both ways; ro is ro; a qcow2 disk keeps data; a killed virtiofsd gives errors, and a new mount works."""
    folders = {name: tmp_path / name for name in ("data", "fixed")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "hello").write_text(f"hello from {name}\n")
    image = qcow2(tmp_path / "disk.qcow2", 16 << 20)
    console = start(
        "--mem", "512M", guest_kernel, "--append", "console=ttyS0 quiet",
        "--initrd", initrd_with("virtio_mmio", "virtiofs", "virtio_blk"),
        "--share", folders["data"], "--share", f"{folders['fixed']}:fixed,ro", "--disk", f"{image},format=qcow2",
    )  # fmt: skip
    guest = Shell(console)
    assert guest.run("mkdir -p /data /fixed; mount -t virtiofs data /data && mount -t virtiofs fixed /fixed")[1] == 0
    both_ways(guest, folders["data"])
    read_only(guest, folders["fixed"])
    disk(guest, image)
    death(guest, folders["data"])
    console.sendline("poweroff -f")
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0


def both_ways(guest: Shell, folder: Path) -> None:
    """What one side writes the other reads, a few MiB too."""
    assert guest.run("cat /data/hello") == ("hello from data\n", 0)
    assert guest.run("dd if=/dev/urandom of=/data/big bs=64k count=48 2>/dev/null; sha256sum </data/big")[1] == 0
    (told, _) = guest.run("sha256sum </data/big")
    import hashlib

    assert (folder / "big").stat().st_size == 3 << 20
    assert hashlib.sha256((folder / "big").read_bytes()).hexdigest() in told
    assert guest.run("mkdir /data/sub && mv /data/big /data/sub/moved && ls /data/sub") == ("moved\n", 0)
    assert sorted(path.name for path in folder.iterdir()) == ["hello", "sub"]


def read_only(guest: Shell, folder: Path) -> None:
    """Nothing of a read-only share can be changed, whatever the guest thinks of its mount."""
    assert guest.run("cat /fixed/hello") == ("hello from fixed\n", 0)
    for command in ("touch /fixed/new", "echo x >/fixed/hello", "rm /fixed/hello", "chmod 0 /fixed/hello"):
        said, status = guest.run(f"{command} 2>&1")
        assert status == 1 and "Read-only file system" in said, (command, said)
    assert [path.name for path in folder.iterdir()] == ["hello"]
    assert (folder / "hello").read_text() == "hello from fixed\n"


def disk(guest: Shell, image: Path) -> None:
    """The disk has its virtual size, and what is written is in the image after a flush."""
    assert guest.run("cat /sys/block/vda/size") == ("32768\n", 0)
    assert guest.run("echo kept in qcow2 | dd of=/dev/vda bs=512 seek=100 conv=fsync 2>/dev/null")[1] == 0
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.run("dd if=/dev/vda bs=512 skip=100 count=1 2>/dev/null | head -c 14") == ("kept in qcow2\n", 0)
    assert b"kept in qcow2" in image.read_bytes()


def death(guest: Shell, folder: Path) -> None:
    """A killed virtiofsd is started again and pykvm says so; the old mount gives errors, a new one works."""
    kill_virtiofsd(folder)
    guest.console.expect("vhost-user back end died and was started again.*mount the share again.*SIGKILL")
    said, status = guest.run("echo 3 >/proc/sys/vm/drop_caches; cat /data/hello 2>&1")
    assert status == 1 and re.search("error|Bad file descriptor|No such file", said, re.IGNORECASE), said
    assert guest.run("umount /data; mount -t virtiofs data /data && cat /data/hello") == ("hello from data\n", 0)
